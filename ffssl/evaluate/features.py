"""Features of a frozen backbone.

The backbone is in evaluation mode: BatchNorm uses its running statistics. Nothing has a gradient.
"""

import collections
import os
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ffssl.config.options import DataOptions
from ffssl.data.beton.files import Files
from ffssl.data.loader import ViewLoader
from ffssl.data.normalise import to_input
from ffssl.data.policy import EVALUATION
from ffssl.parallel.device import mark_work
from ffssl.run_folder.background_writer import copy_to_host
from ffssl.training.transfer import views_to_device

Other = TypeVar("Other")

# Through the backbone; a probe's batches are larger, and would need memory in proportion.
IMAGES_AT_ONCE = 256


def open_views(files: Files, data: DataOptions, resolution: int, **settings) -> ViewLoader:
    """Return a loader of one view of every image: its centre crop, in the files' order.

    `settings` of the loader override this. data: the options of the section data.
    """
    usual = {
        "batch_size": 256,
        "policy": EVALUATION,
        "shuffle": False,
        "workers": data.workers,
        "batches_ahead": 2,
        "scaled_decoding": data.scaled_decoding,
        "label_field": data.label_field,
    }
    return ViewLoader(files, views=1, resolution=resolution, drop_last=False, **usual | settings)


def labelled_images(loader: ViewLoader, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the first view of each image of a batch, and the labels.

    Views: uint8 (B, 3, R, R), on `device`, valid until the next batch is asked for (see
    `to_device`). Labels: (B,), in the host's memory.
    """
    for views, labels in views_to_device(loader, device):
        yield views[:, 0], labels


@torch.no_grad()
def frozen_features(backbone: nn.Module, images: Tensor, amp: torch.autocast) -> Tensor:
    """Return pooled features (B, d), float32, of uint8 images (B, 3, R, R).

    `backbone` must be in evaluation mode, and on the images' device.
    """
    with amp:
        return torch.cat(
            [backbone(to_input(part)).float() for part in images.split(IMAGES_AT_ONCE)]
        )


def at_the_host(batches: Iterator[tuple[Tensor, Other]]) -> Iterator[tuple[Tensor, Other]]:
    """Yield tensors in the host's memory, with what came with them.

    Those of a GPU arrive while the next are computed.
    """
    arriving: collections.deque[tuple[Tensor, Other, torch.cuda.Event]] = collections.deque()

    def first() -> tuple[Tensor, Other]:
        copied, other, event = arriving.popleft()
        event.synchronize()
        return copied, other

    for tensor, other in batches:
        if not tensor.is_cuda:
            yield tensor, other
            continue
        arriving.append((copy_to_host(tensor), other, mark_work(tensor.device)))
        if len(arriving) > 1:
            yield first()
    while arriving:
        yield first()


def extract_features(
    backbone: nn.Module,
    loader: ViewLoader,
    device: torch.device,
    amp: torch.autocast,
    *,
    store: torch.device | None = None,
    unit_length: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return pooled features (N, d) and labels int64 (N,) of the first views of `loader`.

    The backbone returns to the mode it was in.

    store: the device that keeps the features, by default the one that computes. unit_length:
    normalise features (L2) and keep them as float16; otherwise they are float32.
    """
    store = store or device
    features = torch.empty(
        len(loader.samples),
        backbone.features,
        dtype=torch.float16 if unit_length else torch.float32,
        device=store,
    )
    labels = torch.empty(len(loader.samples), dtype=torch.int64)
    training, done = backbone.training, 0
    backbone.eval()
    batches = tqdm(
        labelled_images(loader, device),
        desc=f"features of {os.path.basename(loader.beton.name)}",
        total=len(loader),
        unit="batch",
        leave=False,
        disable=None,
    )

    def computed() -> Iterator[tuple[Tensor, Tensor]]:
        for images, batch_labels in batches:
            found = frozen_features(backbone, images, amp)
            found = F.normalize(found, dim=1) if unit_length else found
            yield found.to(features.dtype), batch_labels

    for found, batch_labels in computed() if store.type == "cuda" else at_the_host(computed()):
        rows = slice(done, done + len(found))
        features[rows], labels[rows] = found, batch_labels
        done += len(found)
    backbone.train(training)
    return features[:done], labels[:done].to(store)
