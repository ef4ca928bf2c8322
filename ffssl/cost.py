"""What a training step costs, in floating-point operations. 1 multiply-add is 2 FLOPs.

The standard count takes a backward pass for two forward passes. The paper's tables follow from taking it for one; use
`backward=1` to compare with them.
"""

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from ffssl.methods.base import Method


def _forward_flops(method: Method, call: str, *shapes: tuple[int, ...]) -> int:
    """FLOPs of a forward call of `method`, counted by torch without computing anything."""
    clone = copy.deepcopy(method).to("meta").train()
    with FlopCounterMode(display=False) as counter:
        getattr(clone, call)(*(torch.empty(shape, device="meta") for shape in shapes))
    return counter.get_total_flops()


def step_flops(method: Method, *, batch_size: int, resolution: int, views: int = 2, selection_resolution: int = 0, backward: int = 2) -> int:
    """FLOPs of one optimiser step on `batch_size` images.

    A forward pass of the loss and `backward` times as much for its gradient; and, where `selection_resolution` is not 0, the
    forward pass of all `views` of each image at that resolution (at most `resolution`).
    """
    pair = (batch_size, 3, resolution, resolution)
    flops = (1 + backward) * _forward_flops(method, "loss", pair, pair)
    if selection_resolution:
        side = min(selection_resolution, resolution)
        flops += _forward_flops(method, "project", (batch_size * views, 3, side, side))
    return flops
