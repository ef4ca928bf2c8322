"""The peers: other loaders, and the transforms of other libraries in a DataLoader.

Each is a function from `Workload` to `Batches`. A peer's package is imported where it is used,
since it may not be installed.
"""

import io
import itertools
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from ffssl.benchmark.workload import Batches, Workload
from ffssl.data.policy import STANDARD_MAGNITUDE, ViewPolicy
from ffssl.errors import UserError


def stock_ffcv(workload: Workload) -> Batches:
    """Return batches of ffcv's own loader with its own operations.

    These are crop and flip only, which is all that ffcv has compiled. It decodes once a view.
    """
    from unittest import mock

    import numba.typed

    with mock.patch.object(numba.typed, "Dict", dict):  # see ffssl.data.beton.ffcv_operation
        from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    views = {
        f"view{side}-{v}": PipelineSpec(
            "image",
            RandomResizedCropRGBImageDecoder((side, side), policy.crop_scale, policy.crop_ratio),
            [RandomHorizontalFlip(policy.flip), ToTensor(), ToTorchImage()],
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
    return itertools.chain.from_iterable(itertools.repeat(loader))


def torchvision_pil(workload: Workload) -> Batches:
    """Return batches of torchvision's transforms on PIL images."""
    from torchvision import transforms

    return dataloader(workload, decode_pil, partial(torchvision_view, transforms))


def torchvision_tensors(workload: Workload) -> Batches:
    """Return batches of torchvision's transforms v2 on tensors."""
    from torchvision.transforms import v2

    return dataloader(workload, decode_torchvision, partial(torchvision_view, v2))


def albumentations(workload: Workload) -> Batches:
    """Return batches of Albumentations' transforms on arrays."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no question to the network
    import albumentations
    import cv2

    cv2.setNumThreads(0)  # the processes take all cores
    return dataloader(workload, decode_opencv, partial(albumentations_view, albumentations))


def dataloader(
    workload: Workload,
    decode: Callable[[bytes], Any],
    view_maker: Callable[[int, ViewPolicy], Callable],
) -> Batches:
    """Return batches of a DataLoader. Its processes decode an image once and transform it.

    decode: from a JPEG file, held in memory, to an image.
    view_maker: from the side and the policy of views to a function that makes them of an image:
        uint8 tensors (3, side, side).
    """
    import torch
    from torch.utils.data import DataLoader, Dataset, RandomSampler

    makers = [(views, view_maker(side, policy)) for views, side, policy in workload.sizes]

    class Images(Dataset):
        def __init__(self):
            self.files = [path.read_bytes() for path in sorted(workload.folder.iterdir())]

        def __len__(self):
            return len(self.files)

        def __getitem__(self, index):
            image = decode(self.files[index])
            return [
                torch.stack([make_view(image) for _ in range(views)]) for views, make_view in makers
            ]

    images = Images()
    return iter(
        DataLoader(
            images,
            workload.batch_size,
            # One random order after another. At the end of an epoch the processes would wait.
            sampler=RandomSampler(images, num_samples=10**12),
            num_workers=workload.workers,
            # Safe here: this process has no other threads, and the class above can't be pickled.
            multiprocessing_context="fork",
        )
    )


def decode_pil(file: bytes):
    """Return a JPEG file as a PIL image."""
    from PIL import Image

    return Image.open(io.BytesIO(file)).convert("RGB")


def decode_torchvision(file: bytes):
    """Return a JPEG file as a tensor, uint8 (3, height, width)."""
    import torch
    from torchvision.io import ImageReadMode, decode_image

    return decode_image(torch.frombuffer(bytearray(file), dtype=torch.uint8), ImageReadMode.RGB)


def decode_opencv(file: bytes):
    """Return a JPEG file as an array, uint8 (height, width, 3)."""
    import cv2
    import numpy as np

    return cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR_RGB)


def torchvision_view(transforms, side: int, policy: ViewPolicy) -> Callable:
    """Return a maker of views of torchvision's `transforms`, or of its `transforms.v2`."""
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
            transforms.PILToTensor(),  # v2's leaves tensors as they are
        ]
    )


def albumentations_view(transforms, side: int, policy: ViewPolicy) -> Callable:
    """Return a maker of views of the module `albumentations`."""
    from albumentations.pytorch import ToTensorV2

    if policy.rand_augment:
        raise UserError("it has no RandAugment")
    make_view = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                (side, side),
                policy.crop_scale,
                policy.crop_ratio,
                area_for_downscale="image",  # the others antialias too
            ),
            transforms.HorizontalFlip(p=policy.flip),
            transforms.ColorJitter(
                brightness=(1 - policy.brightness, 1 + policy.brightness),
                contrast=(1 - policy.contrast, 1 + policy.contrast),
                saturation=(1 - policy.saturation, 1 + policy.saturation),
                hue=(-policy.hue, policy.hue),
                p=policy.jitter,
            ),
            transforms.ToGray(p=policy.grey),
            transforms.GaussianBlur(sigma_limit=policy.blur_sigma, p=policy.blur),
            ToTensorV2(),
        ]
    )
    return lambda image: make_view(image=image)["image"]


def dali(workload: Workload) -> Batches:
    """Return batches of NVIDIA DALI's CPU backend: one decode, then the policy for each view.

    Grey is saturation 0, and RandAugment is DALI's own.
    """
    from nvidia.dali import fn, pipeline_def, types

    files = [str(path) for path in sorted(workload.folder.iterdir())]

    @pipeline_def(enable_conditionals=True)
    def views():
        data, _ = fn.readers.file(files=files, random_shuffle=True)
        image = fn.decoders.image(
            data,
            device="cpu",
            output_type=types.RGB,
            use_fast_idct=True,  # as ffcv's decoder and ours
        )
        made = []
        for number, side, policy in workload.sizes:
            for _ in range(number):
                made.append(dali_view(image, side, policy))
        return tuple(made)

    pipeline = views(
        batch_size=workload.batch_size, num_threads=workload.workers, device_id=None, seed=0
    )
    pipeline.build()
    while True:
        yield [view.as_array() for view in pipeline.run()]


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
