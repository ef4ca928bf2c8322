"""Hard Augment (section 3.3): of m views of an image, train on the pair with the largest loss.

The loss of all pairs comes from one forward pass over all views of the batch, without gradient, at a low resolution.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ffssl.methods.base import Method


def pairs(views: int, device: torch.device | None = None) -> Tensor:
    """All m(m-1)/2 pairs (i, j) with i < j of `views` views: int64 (pairs, 2)."""
    return torch.triu_indices(views, views, offset=1, device=device).T


def hardest_pair(projections: Tensor) -> Tensor:
    """Of each image the pair of views with the largest negative cosine similarity. projections: (B, m, d). Returns int64 (B, 2)."""
    candidates = pairs(projections.shape[1], projections.device)
    with torch.autocast(projections.device.type, enabled=False):  # half precision can't tell views that look alike apart
        z = F.normalize(projections.float(), dim=2)
        loss = -(z @ z.transpose(1, 2))[:, candidates[:, 0], candidates[:, 1]]
    return candidates[loss.argmax(1)]


def random_pair(batch: int, views: int, generator: torch.Generator) -> Tensor:
    """A random pair of views of each image, the comparison to `hardest_pair`: int64 (batch, 2)."""
    candidates = pairs(views)
    return candidates[torch.randint(len(candidates), (batch,), generator=generator)]


@contextmanager
def batch_statistics_untracked(model: nn.Module) -> Iterator[None]:
    """In training mode, let BatchNorm normalise by the batch and leave its running statistics alone."""
    tracking = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


@torch.no_grad()
def select_hardest(method: Method, views: Tensor, resolution: int) -> Tensor:
    """The selection pass: int64 (B, 2), the chosen views of each image.

    views: (B, m, 3, R, R), normalised. They are downsampled to `resolution` with antialiasing where they are larger. Changes
    nothing: neither BatchNorm's statistics nor the random state.
    """
    batch, m = views.shape[:2]
    flat = views.flatten(0, 1)
    if views.shape[-1] > resolution:
        flat = F.interpolate(flat, (resolution, resolution), mode="bilinear", antialias=True)
    with batch_statistics_untracked(method):
        projections = method.project(flat.contiguous(memory_format=torch.channels_last))
    return hardest_pair(projections.view(batch, m, -1))


def take_pair(views: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen two views of each image. views: (B, m, ...), chosen: (B, 2). Returns two of (B, ...)."""
    image = torch.arange(len(views), device=views.device)
    return views[image, chosen[:, 0]], views[image, chosen[:, 1]]
