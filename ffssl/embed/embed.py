"""Compute the features of images, from their files to a file of features."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ffssl.embed.feature_file import FeatureFile
from ffssl.embed.images import CropBatch, CropLoader, Images, labels_of
from ffssl.encoder import Trained
from ffssl.errors import UserError
from ffssl.evaluate.features import at_the_host, frozen_features, labelled_images
from ffssl.parallel.device import choose_device, keep_freed_memory, mixed_precision, precision
from ffssl.run_folder.machine import describe_machine

PACKAGES = ("ffssl", "torch", "torchvision", "timm")


@dataclass(frozen=True)
class Settings:
    """How features are computed.

    batch_size: images at once. workers: threads that decode; 0 for one per core. device, amp: see
    `choose_device` and `mixed_precision`. skip_unreadable: leave images out that can't be read,
    instead of stopping at the first. overwrite: replace what is there.
    """

    batch_size: int = 256
    workers: int = 0
    device: str = "auto"
    amp: str = "auto"
    skip_unreadable: bool = False
    overwrite: bool = False


def embed(encoder: Trained, images: Images, output: Path, settings: Settings = Settings()) -> str:
    """Write the features of all images, in order, to a file; say in a line what was written.

    What an earlier, interrupted call has written is continued, at the next batch. Raise UserError
    for an image that can't be read, unless they are skipped, and if the file can't be written.
    """
    device = choose_device(settings.device, "--device")
    amp, _ = mixed_precision(settings.amp, device, "--amp")
    if device.type == "cpu":
        keep_freed_memory()
    identity = {
        "weights": encoder.weights,
        "images": images.identity(),
        "resolution": images.settings.resolution,
        "precision": precision(settings.amp, device),
        "batch size": settings.batch_size,
        "labels": images.labels is not None,
    }
    with (
        contextlib.closing(images),
        FeatureFile(
            output,
            identity,
            width=encoder.backbone.features,
            images=len(images),
            overwrite=settings.overwrite,
        ) as file,
        tqdm(total=len(images), initial=file.done, unit="image", disable=None) as bar,
        contextlib.closing(_batches(encoder, images, device, amp, settings, file.done)) as batches,
    ):
        continued = f", {file.done} of them before" if file.done else ""
        for features, batch in batches:
            _add(file, images, features, batch, settings.skip_unreadable)
            bar.update(len(batch.indices))
        if not file.rows:
            file.discard()
            name, reason = file.skipped[0]
            raise UserError(f"{images.source}: no image can be read; the first, {name}: {reason}")
        file.finish(
            {
                "encoder": {
                    "backbone": encoder.name,
                    "stem": encoder.stem,
                    "network": encoder.network,
                },
                **identity,
                "class_names": images.class_names,
                "machine": describe_machine(PACKAGES),
                "skipped": [{"name": name, "reason": reason} for name, reason in file.skipped],
            }
        )
    left_out = ""
    if file.skipped:
        name, reason = file.skipped[0]
        left_out = f"; {len(file.skipped)} unreadable left out, the first {name}: {reason}"
    return (
        f"{output}: {encoder.backbone.features} features of {file.rows} images{continued}{left_out}"
    )


def _batches(
    encoder: Trained,
    images: Images,
    device: torch.device,
    amp: torch.autocast,
    settings: Settings,
    done: int,
) -> Iterator[tuple[Tensor, CropBatch]]:
    """Yield features, float32 (b, d), in the host's memory, of each batch after `done` images."""
    backbone = encoder.backbone.to(device, memory_format=torch.channels_last)
    loader = CropLoader(
        images,
        settings.batch_size,
        first_batch=-(-done // settings.batch_size),
        workers=settings.workers,
        pin=device.type == "cuda",
    )
    return at_the_host(
        (frozen_features(backbone, views, amp), batch)
        for views, batch in labelled_images(loader, device)
    )


def _add(file: FeatureFile, images: Images, features: Tensor, batch: CropBatch, skip: bool) -> None:
    """Append the features of a batch but for unreadable images. Raise UserError for those."""
    skipped = [(images.described(i), reason) for i, reason in sorted(batch.unreadable.items())]
    if skipped and not skip:
        name, reason = skipped[0]
        raise UserError(f"{name}: {reason}; repair it, or pass --skip-unreadable")
    kept = np.array([i for i in batch.indices if i not in batch.unreadable], np.int64)
    rows = features.numpy()[kept - batch.indices.start]
    file.add(rows, [images.name(i) for i in kept.tolist()], labels_of(images, kept), skipped)
