"""The loaders that the benchmark compares.

Each is a function from `Workload` to a function that serves one epoch. That second function goes
once through all images, and returns how many it served. All serve batches of uint8 views.

Peers are imported where they are used. One that is not installed raises ImportError; the benchmark
names it and leaves it out.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ffssl.data.policy import STANDARD_MAGNITUDE, ViewPolicy

Epoch = Callable[[], int]


class Size(NamedTuple):
    """Views of one size and one policy."""

    views: int
    side: int
    policy: ViewPolicy


@dataclass(frozen=True)
class Workload:
    """The same images as a beton file and as a folder of JPEG files, and what to make of each."""

    beton: Path
    folder: Path
    sizes: tuple[Size, ...]
    workers: int
    batch_size: int


def ours(workload: Workload, jitter_form: str) -> Epoch:
    """Return epochs of ViewLoader with one of the two forms of colour jitter."""
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
    epochs = iter(range(10**9))

    def epoch() -> int:
        loader.set_epoch(next(epochs))
        return sum(len(batch.indices) for batch in loader)

    return epoch


def decode_only(workload: Workload) -> Epoch:
    """Return the limit: epochs that decode every image once with ffcv's decoder, no more."""
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

    def epoch() -> int:
        list(
            pool.map(
                lambda part: decode_samples(file, beton.pointers, beton.sizes, beton.images, part),
                parts,
            )
        )
        return len(beton)

    return epoch


def stock_ffcv(workload: Workload) -> Epoch:
    """Return epochs of ffcv's own loader with its own operations.

    These are crop and flip only, which is all that ffcv has compiled. It decodes once a view.
    """
    from unittest import mock

    import numba.typed

    with mock.patch.object(numba.typed, "Dict", dict):  # see ffssl.data.beton.ffcv_operation
        from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    views = {
        f"view{side}-{v}": PipelineSpec(
            "image",
            RandomResizedCropRGBImageDecoder((side, side), policy.crop_scale),
            [RandomHorizontalFlip(), ToTensor()],
        )
        for number, side, policy in workload.sizes
        for v in range(number)
    }
    loader = Loader(
        str(workload.beton),
        batch_size=workload.batch_size,
        num_workers=workload.workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        pipelines={"image": None, "label": None, **views},
    )
    return lambda: sum(len(batch[0]) for batch in loader)


def torchvision_dataloader(workload: Workload) -> Epoch:
    """Return epochs of torchvision's transforms on PIL images, in a DataLoader's workers.

    The files are held in memory.
    """
    import io

    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    def view_maker(side: int, policy: ViewPolicy) -> Callable:
        jitter = transforms.ColorJitter(
            policy.brightness, policy.contrast, policy.saturation, policy.hue
        )
        blur = transforms.GaussianBlur(int(0.1 * side) // 2 * 2 + 1, policy.blur_sigma)
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(side, policy.crop_scale, policy.crop_ratio),
                transforms.RandomHorizontalFlip(policy.flip),
                transforms.RandomApply([jitter], policy.jitter),
                transforms.RandomGrayscale(policy.grey),
                transforms.RandomApply([blur], policy.blur),
                transforms.RandAugment(policy.rand_augment, int(STANDARD_MAGNITUDE)),
                transforms.PILToTensor(),
            ]
        )

    makers = [(views, view_maker(side, policy)) for views, side, policy in workload.sizes]

    class Images(Dataset):
        def __init__(self):
            self.files = [path.read_bytes() for path in sorted(workload.folder.iterdir())]

        def __len__(self):
            return len(self.files)

        def __getitem__(self, index):
            image = Image.open(io.BytesIO(self.files[index])).convert("RGB")
            return [
                torch.stack([make_view(image) for _ in range(views)]) for views, make_view in makers
            ]

    loader = DataLoader(
        Images(),
        workload.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workload.workers,
        persistent_workers=True,
        # Safe here: this process has no other threads, and the class above can't be pickled.
        multiprocessing_context="fork",
    )
    return lambda: sum(len(views) for views, *_ in loader)


def dali(workload: Workload) -> Epoch:
    """Return epochs of NVIDIA DALI's CPU backend: one decode, then the policy for each view.

    Grey is saturation 0, and RandAugment is DALI's own.
    """
    from nvidia.dali import fn, pipeline_def, types

    files = [str(path) for path in sorted(workload.folder.iterdir())]

    @pipeline_def(enable_conditionals=True)
    def views():
        data, _ = fn.readers.file(files=files, random_shuffle=True, name="files")
        image = fn.decoders.image(data, device="cpu", output_type=types.RGB)
        made = []
        for number, side, policy in workload.sizes:
            for _ in range(number):
                made.append(dali_view(image, side, policy))
        return tuple(made)

    pipeline = views(
        batch_size=workload.batch_size, num_threads=workload.workers, device_id=None, seed=0
    )
    pipeline.build()
    batches = len(files) // workload.batch_size

    def epoch() -> int:
        for _ in range(batches):
            for view in pipeline.run():
                view.as_array()
        return batches * workload.batch_size

    return epoch


def dali_view(image, side: int, policy: ViewPolicy):
    """Return one view of an image, as nodes of a DALI pipeline with conditionals."""
    from nvidia.dali import fn, types
    from nvidia.dali.auto_aug.rand_augment import rand_augment

    view = fn.random_resized_crop(
        image,
        size=side,
        random_area=policy.crop_scale,
        random_aspect_ratio=policy.crop_ratio,
        antialias=True,
    )
    if fn.random.coin_flip(probability=policy.jitter, dtype=types.BOOL):
        view = fn.color_twist(
            view,
            brightness=fn.random.uniform(range=(1 - policy.brightness, 1 + policy.brightness)),
            contrast=fn.random.uniform(range=(1 - policy.contrast, 1 + policy.contrast)),
            saturation=fn.random.uniform(range=(1 - policy.saturation, 1 + policy.saturation)),
            hue=fn.random.uniform(range=(-360 * policy.hue, 360 * policy.hue)),
        )
    if fn.random.coin_flip(probability=policy.grey, dtype=types.BOOL):
        view = fn.hsv(view, saturation=0.0)
    if fn.random.coin_flip(probability=policy.blur, dtype=types.BOOL):
        view = fn.gaussian_blur(view, sigma=fn.random.uniform(range=policy.blur_sigma))
    if policy.rand_augment > 0:
        view = rand_augment(
            view,
            policy.rand_augment,
            int(STANDARD_MAGNITUDE),
            shape=(side, side),
            fill_value=0,
            interp_type=types.INTERP_NN,
            max_translate_rel=150 / 331,
        )
    return fn.crop_mirror_normalize(
        view,
        mirror=fn.random.coin_flip(probability=policy.flip),
        dtype=types.UINT8,
        output_layout="CHW",
    )


CONTENDERS: dict[str, Callable[[Workload], Epoch]] = {
    "ffssl": lambda workload: ours(workload, "torchvision"),
    "ffssl, one worker": lambda workload: ours(replace(workload, workers=1), "torchvision"),
    "ffssl, affine jitter": lambda workload: ours(workload, "affine"),
    "decode only": decode_only,
    "ffcv, crop and flip only": stock_ffcv,
    "DALI, CPU": dali,
    "torchvision + DataLoader": torchvision_dataloader,
}
