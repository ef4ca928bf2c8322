"""What a training step costs, in floating-point operations. 1 multiply-add is 2 FLOPs.

The standard count takes a backward pass for two forward passes. The paper's tables follow from taking it for one; use
`backward=1` to compare with them.
"""

import copy

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ffssl.hard_augment import choose_views
from ffssl.methods.base import Method


class _WithoutGradient(TorchDispatchMode):
    """Counts the FLOPs of what runs under no_grad, which has no backward pass: the selection pass, a teacher."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        with FlopCounterMode(display=False) as counter:
            result = func(*args, **(kwargs or {}))
        self.flops += counter.get_total_flops()
        return result


def step_flops(
    method: Method, *, batch_size: int, resolution: int, views: int = 2, hard_augment: dict | None = None, backward: int = 2
) -> int:
    """FLOPs of one optimiser step on `batch_size` images, counted by torch without computing anything.

    What runs under no_grad counts once, the rest 1 + `backward` times. hard_augment: what `choose_views` takes besides the views.
    """
    clone = copy.deepcopy(method).to("meta").train()
    images = torch.empty((batch_size, views, 3, resolution, resolution), device="meta")
    with FlopCounterMode(display=False) as everything, _WithoutGradient() as without_gradient:
        clone.loss(*choose_views(clone, images, **(hard_augment or {})))
    total = everything.get_total_flops()
    return total + backward * (total - without_gradient.flops)
