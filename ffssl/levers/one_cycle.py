"""F1-CLR as a scheduler of torch: a one-cycle learning rate whose warm-up has a fixed length."""

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ffssl.errors import UserError
from ffssl.schedules import anti_phase_momentum, f1_clr


class FixedOneCycleLR(LRScheduler):
    """The learning rate and the momentum of F1-CLR (eq. 8 of the paper).

    Call `step()` after each optimiser step. The learning rate rises from 0 to `max_lr` in the
    warm-up, and falls to 0 over the rest, along half cosines. The momentum moves against it.

    optimizer: its momentum is SGD's `momentum`, or the first of Adam's `betas`.
    total_steps: optimiser steps of the whole training.
    warmup_steps: those of the warm-up. It stays as long when the training gets shorter.
    max_lr: the peak; a list has one for each parameter group.
    momentum: at the peak, and where the learning rate is 0. None leaves the optimiser's alone.
    last_epoch: steps taken before, less one; -1 starts at the beginning.

    It sets the learning rate anew in each step. So it works in torch's SequentialLR, and first in
    a ChainedScheduler whose others multiply. `state_dict` holds all but the optimiser.

    Raise UserError for values that do not fit together, for an optimiser without momentum, and
    for a step beyond `total_steps`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int,
        max_lr: float | Sequence[float],
        momentum: tuple[float, float] | None = (0.85, 0.95),
        last_epoch: int = -1,
    ):
        if not 0 <= warmup_steps < total_steps:
            raise UserError(
                f"FixedOneCycleLR: warmup_steps is {warmup_steps}, must lie in 0..{total_steps - 1}"
                f", below total_steps={total_steps}"
            )
        groups = optimizer.param_groups
        max_lrs = [max_lr] * len(groups) if isinstance(max_lr, int | float) else list(max_lr)
        if len(max_lrs) != len(groups):
            raise UserError(
                f"FixedOneCycleLR: max_lr has {len(max_lrs)} values for {len(groups)} parameter "
                "groups; give one for each, or one for all"
            )
        if momentum is not None:
            _check_momentum(momentum, optimizer)
        self.total_steps, self.warmup_steps = total_steps, warmup_steps
        self.max_lrs, self.momentum = max_lrs, momentum
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Return each group's learning rate, and set its momentum. Called by `step`."""
        step = self.last_epoch
        if step > self.total_steps:
            raise UserError(
                f"FixedOneCycleLR: step {step} of {self.total_steps}; total_steps must be the "
                "optimiser steps of all epochs, and `step` called once after each"
            )
        cycle = {"total": self.total_steps, "warmup": self.warmup_steps}
        if self.momentum is not None:
            low, high = self.momentum
            set_momentum(self.optimizer, anti_phase_momentum(step, **cycle, low=low, high=high))
        return [f1_clr(step, **cycle, peak=peak) for peak in self.max_lrs]


def _check_momentum(momentum: tuple[float, float], optimizer: Optimizer) -> None:
    low, high = momentum
    if not 0 <= low <= high < 1:
        raise UserError(
            f"FixedOneCycleLR: momentum is ({low}, {high}), must be two numbers from 0 to below 1, "
            "the smaller first"
        )
    if not all("momentum" in group or "betas" in group for group in optimizer.param_groups):
        raise UserError(
            f"FixedOneCycleLR: {type(optimizer).__name__} has neither momentum nor betas; "
            "say momentum=None"
        )


def set_momentum(optimizer: Optimizer, momentum: float) -> None:
    """Set SGD's momentum, or Adam's beta1, in all groups."""
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (momentum, *group["betas"][1:])
        else:
            group["momentum"] = momentum
