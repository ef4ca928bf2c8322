"""From uint8 views to a network's input."""

import functools

import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's training images, per channel, in 0..1; what its pre-trained networks expect
STD = (0.229, 0.224, 0.225)


@functools.cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """Per channel in 0..255, on `device`: copied there once, since a copy makes the host wait."""
    return tuple(255 * torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))


def to_input(views: Tensor, device: torch.device) -> Tensor:
    """uint8 (..., 3, R, R) on any device to normalised float32 on `device`; four-dimensional results are channels_last."""
    mean, std = _mean_and_std(device)
    images = views.to(device, non_blocking=True).float().sub_(mean).div_(std)
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images
