"""From uint8 views to a network's input."""

import functools

import torch
from torch import Tensor

# Per channel, over ImageNet's training images, in 0..1. Networks pre-trained on it expect these.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@functools.cache
def _scale_and_shift(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the normalisation of values in 0..255: two tensors (3, 1, 1), float32, on `device`.

    Cached, since a copy to the device makes the host wait.
    """
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


def to_input(views: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normalise images for a network.

    views: uint8, float16 or float32 (N, 3, R, R), values in 0..255.

    Return (N, 3, R, R) of `dtype`, on the same device, channels_last. One operation normalises,
    casts (with one rounding) and changes the layout; on a GPU that is one pass over the memory.
    """
    scale, shift = _scale_and_shift(views.device)
    images = torch.empty(
        views.shape, dtype=dtype, device=views.device, memory_format=torch.channels_last
    )
    return torch.addcmul(shift, views, scale, out=images)
