"""Features of a frozen backbone: in evaluation mode (BatchNorm by its running statistics) and without gradient."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ffssl.config.options import DataOptions
from ffssl.data.loader import ViewLoader
from ffssl.data.policy import (EVALUATION)
from ffssl.data.normalise import to_input

IMAGES_AT_ONCE = 256  # through the backbone; a probe's batches are larger, and would need memory in proportion


def open_views(path: str | Path, data: DataOptions, resolution: int, **settings) -> ViewLoader:
    """One view of every image: its centre crop, in the file's order, unless `settings` of the loader say otherwise.

    data: the options of the section data.
    """
    usual = {
        "batch_size": 256, "policy": EVALUATION, "shuffle": False, "workers": data.workers, "batches_ahead": 2,
        "scaled_decoding": data.scaled_decoding, "label_field": data.label_field,
    }  # fmt: skip
    return ViewLoader(path, views=1, resolution=resolution, drop_last=False, **usual | settings)


@torch.no_grad()
def frozen_features(backbone: nn.Module, images: Tensor, device: torch.device, amp: torch.autocast) -> Tensor:
    """Pooled features (B, d), float32 on `device`, of uint8 images (B, 3, R, R). `backbone` must be in evaluation mode."""
    with amp:
        return torch.cat([backbone(to_input(part.to(device))).float() for part in images.split(IMAGES_AT_ONCE)])


def extract_features(
    backbone: nn.Module, loader: ViewLoader, device: torch.device, amp: torch.autocast, *, store: torch.device | None = None,
    unit_length: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Pooled features (N, d) and labels int64 (N,) of the first views of all images of `loader`. The backbone's mode is put back.

    store: the device that keeps them, by default the one that computes. unit_length: L2-normalised, which lets float16 hold them;
    otherwise float32.
    """
    store = store or device
    features = torch.empty(len(loader.samples), backbone.features, dtype=torch.float16 if unit_length else torch.float32, device=store)
    labels = torch.empty(len(loader.samples), dtype=torch.int64, device=store)
    training, done = backbone.training, 0
    backbone.eval()
    for views, batch_labels, _ in tqdm(loader, desc=f"features of {loader.beton.path.name}", unit="batch", leave=False, disable=None):
        found = frozen_features(backbone, views[:, 0], device, amp)
        rows = slice(done, done + len(found))
        features[rows] = F.normalize(found, dim=1) if unit_length else found
        labels[rows] = batch_labels
        done += len(found)
    backbone.train(training)
    return features[:done], labels[:done]
