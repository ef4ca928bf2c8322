"""The loaders that the benchmark compares. Each is a function from `Workload` to `Batches`."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np

from ffssl.benchmark.peers import (
    albumentations,
    dali,
    stock_ffcv,
    torchvision_pil,
    torchvision_tensors,
)
from ffssl.benchmark.workload import Batches, Workload


def ours(workload: Workload, jitter_form: str = "torchvision") -> Batches:
    """Return batches of ViewLoader with one of the two forms of colour jitter."""
    from ffssl.data.loader import ViewLoader

    views, sides, policies = zip(*workload.sizes)
    loader = ViewLoader(
        workload.beton,
        batch_size=workload.batch_size,
        views=views,
        resolution=sides,
        policy=[replace(policy, jitter_form=jitter_form) for policy in policies],
        workers=workload.workers,
    )
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        for batch in loader:
            yield batch.views


def one_worker(workload: Workload) -> Batches:
    return ours(replace(workload, workers=1))


def decode_only(workload: Workload) -> Batches:
    """Return the limit: decode every image once with ffcv's decoder, no more.

    What stands for a batch is the numbers of its images.
    """
    from ffssl.data.beton.read import read_beton
    from ffssl.data.kernels.decode import decode, most_pixels
    from ffssl.data.kernels.jit import compiled_uncached

    @compiled_uncached
    def decode_samples(file, pointers, sizes, images, indices):
        pixels = np.empty(3 * most_pixels(images, indices), np.uint8)
        for i in indices:
            image = images[i]
            begin = image["data_ptr"]
            data = file[begin : begin + sizes[np.searchsorted(pointers, begin)]]
            decode(data, image["mode"], np.int64(image["height"]), np.int64(image["width"]), pixels)

    beton = read_beton(workload.beton)
    file = np.memmap(beton.files[0].path, np.uint8, "r")
    parts = np.array_split(np.arange(len(beton)), 16 * workload.workers)
    pool = ThreadPoolExecutor(workload.workers)

    def decode_part(part):
        decode_samples(file, beton.pointers, beton.sizes, beton.images, part)
        return (part,)

    while True:
        yield from pool.map(decode_part, parts)


CONTENDERS: dict[str, Callable[[Workload], Batches]] = {
    "ffssl": ours,
    "ffssl, one worker": one_worker,
    "ffssl, affine jitter": partial(ours, jitter_form="affine"),
    "decode only": decode_only,
    "ffcv, crop and flip only": stock_ffcv,
    "DALI, CPU": dali,
    "torchvision v1, PIL + DataLoader": torchvision_pil,
    "torchvision v2, tensors + DataLoader": torchvision_tensors,
    "Albumentations + DataLoader": albumentations,
}
