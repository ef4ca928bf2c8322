"""What a training step costs, in floating-point operations. 1 multiply-add is 2 FLOPs.

The standard count takes a backward pass for two forward passes. The costs in the paper's tables follow from taking it for one.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ffssl.hard_augment import choose_views
from ffssl.methods.base import Method
from ffssl.plan import Plan

STANDARD, PAPERS = 2, 1  # forward passes that a backward pass counts for


@dataclass(frozen=True)
class Flops:
    """FLOPs by what they are for.

    forward: of what is trained, heads and loss included. teacher: of what the loss computes without gradient.
    selection: of Hard Augment's low-resolution passes, those for extra targets included.
    """

    forward: float
    teacher: float
    selection: float

    def total(self, backward: int = STANDARD) -> float:
        """With the backward pass, of what is trained alone, taken for `backward` forward passes."""
        return (1 + backward) * self.forward + self.teacher + self.selection

    def __truediv__(self, parts: int) -> "Flops":
        return Flops(self.forward / parts, self.teacher / parts, self.selection / parts)

    def __rmul__(self, times: int) -> "Flops":
        return Flops(times * self.forward, times * self.teacher, times * self.selection)


@dataclass(frozen=True)
class Stage:
    """Consecutive epochs of a run at one resolution."""

    resolution: int
    epochs: int
    flops: Flops  # of one image


class _WithoutGradient(TorchDispatchMode):
    """Counts the FLOPs of what runs under no_grad, which has no backward pass."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        with FlopCounterMode(display=False) as counter:
            result = func(*args, **(kwargs or {}))
        self.flops += counter.get_total_flops()
        return result


def count_step(method: Method, *, batch_size: int, resolution: int, views: int = 2, hard_augment: dict | None = None) -> Flops:
    """FLOPs of one optimiser step on `batch_size` images, counted by torch without computing anything.

    hard_augment: what `choose_views` takes besides the views.
    """
    clone = copy.deepcopy(method).to("meta").train()
    images = torch.empty((batch_size, views, 3, resolution, resolution), dtype=torch.uint8, device="meta")
    with FlopCounterMode(display=False) as selection:
        chosen = choose_views(clone, images, **(hard_augment or {}))
    with FlopCounterMode(display=False) as loss, _WithoutGradient() as teacher:
        clone.loss(*chosen)
    return Flops(loss.get_total_flops() - teacher.flops, teacher.flops, selection.get_total_flops())


def count_flops(plan: Plan, method: Method) -> dict[int, int]:
    """FLOPs of a step of a run, in the standard count, at each resolution of its schedule."""
    return {side: count_run_step(plan, method, side).total() for side in plan.resolutions}


def count_run_step(plan: Plan, method: Method, resolution: int) -> Flops:
    """FLOPs of a step of a run at a resolution, of all parts of the batch."""
    return plan.options.training.accumulate * count_step(method, resolution=resolution, **step_options(plan))


def step_options(plan: Plan) -> dict:
    """What `count_step` takes of a run's options for a part of a batch, besides the resolution."""
    options = plan.options
    return {"batch_size": options.training.batch_size // options.training.accumulate, "views": options.augment.views, "hard_augment": vars(options.hard_augment)}


def stages(plan: Plan, image_flops: Callable[[int], Flops]) -> list[Stage]:
    """A run's epochs, grouped by resolution in their order. image_flops: of one image at a resolution."""
    return [Stage(side, epochs, image_flops(side)) for side, epochs in plan.stages]
