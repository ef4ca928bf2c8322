"""The cost of a training step in floating-point operations. 1 multiply-add is 2 FLOPs.

The standard count takes a backward pass for two forward passes. The costs in the paper's tables
follow from taking it for one.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ffssl.hard_augment import Selection, choose_views, local_argument
from ffssl.methods.base import Method
from ffssl.training.run_schedule import RunSchedule, StepShape
from ffssl.training.views import global_and_local, make_views

STANDARD, PAPERS = 2, 1  # forward passes that a backward pass counts for


@dataclass(frozen=True)
class Flops:
    """FLOPs by purpose.

    forward: of what is trained, including heads and loss.
    teacher: of what the loss computes without gradient.
    selection: of Hard Augment's low-resolution passes, including those for extra targets.
    """

    forward: float
    teacher: float
    selection: float

    def total(self, backward: int = STANDARD) -> float:
        """Return the total with the backward pass, which counts for `backward` forward passes."""
        return (1 + backward) * self.forward + self.teacher + self.selection

    def __truediv__(self, parts: int) -> "Flops":
        return Flops(self.forward / parts, self.teacher / parts, self.selection / parts)

    def __rmul__(self, times: int) -> "Flops":
        return Flops(times * self.forward, times * self.teacher, times * self.selection)


@dataclass(frozen=True)
class Stage:
    """Consecutive epochs of a run whose steps cost the same."""

    shape: StepShape
    epochs: int
    flops: Flops  # of one image


class _WithoutGradient(TorchDispatchMode):
    """Count the FLOPs of what runs under no_grad and has no backward pass."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        with FlopCounterMode(display=False) as counter:
            result = func(*args, **(kwargs or {}))
        self.flops += counter.get_total_flops()
        return result


def count_step(
    method: Method, shape: StepShape, *, batch_size: int, selection: Selection = Selection()
) -> Flops:
    """Count the FLOPs of one optimiser step on `batch_size` images.

    torch counts them on the meta device, without computing anything.
    """
    clone = copy.deepcopy(method).to("meta").train()
    images, local = global_and_local(
        make_views(
            lambda size: torch.empty(size, dtype=torch.uint8, device="meta"),
            shape.of_batch(batch_size),
        )
    )
    with FlopCounterMode(display=False) as selecting:
        chosen = choose_views(clone, images, selection)
    with FlopCounterMode(display=False) as loss, _WithoutGradient() as teacher:
        clone.loss(*chosen, **local_argument(local))
    return Flops(loss.get_total_flops() - teacher.flops, teacher.flops, selecting.get_total_flops())


def count_flops(schedule: RunSchedule, method: Method) -> dict[StepShape, int]:
    """Return the FLOPs of a run's step in the standard count, for each shape in its schedule."""
    return {
        shape: count_run_step(schedule, method, shape).total() for shape in schedule.first_epochs
    }


def count_run_step(schedule: RunSchedule, method: Method, shape: StepShape) -> Flops:
    """Count the FLOPs of a run's step, of all parts of the batch."""
    parts = schedule.options.training.accumulate
    return parts * count_step(method, shape, **step_options(schedule))


def step_options(schedule: RunSchedule) -> dict:
    """Return the arguments of `count_step` for a part of a run's batch, besides the shape."""
    t = schedule.options.training
    return {
        "batch_size": t.batch_size // t.accumulate,
        "selection": schedule.selection(t.epochs - 1),
    }


def stages(schedule: RunSchedule, image_flops: Callable[[StepShape], Flops]) -> list[Stage]:
    """Return a run's stages in their order.

    image_flops: FLOPs of one image in a step of a given shape.
    """
    return [Stage(shape, epochs, image_flops(shape)) for shape, epochs in schedule.stages]
