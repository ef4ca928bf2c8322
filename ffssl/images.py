"""From uint8 views to a network's input."""

import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's training images, per channel, in 0..1; what its pre-trained networks expect
STD = (0.229, 0.224, 0.225)


def to_input(views: Tensor, device: torch.device) -> Tensor:
    """uint8 (..., 3, R, R) on any device to normalised float32 on `device`; four-dimensional results are channels_last."""
    images = views.to(device, non_blocking=True).float()
    mean = torch.tensor(MEAN, device=device).view(3, 1, 1) * 255
    std = torch.tensor(STD, device=device).view(3, 1, 1) * 255
    images = images.sub_(mean).div_(std)
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images
