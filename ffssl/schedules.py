"""The schedules: learning rate, momentum, resolution and augmentation magnitude.

They are pure functions of the step or the epoch. Equations and sections are those of "Accelerating
Self-Supervised Learning via Efficient Training Strategies".
"""

import math
from collections.abc import Sequence

LEARNING_RATE_SCHEDULES = ("f1-clr", "1-clr", "cosine", "cosine-warmup")
RESOLUTION_SCHEDULES = ("spl", "progressive", "stages", "constant")


def f1_clr(step: int, *, total: int, warmup: int, peak: float) -> float:
    """Learning rate of the fixed one-cycle schedule (eq. 8) at `step` of `total` optimiser steps.

    The one-cycle schedule (eq. 7) is the same with a `warmup` in proportion to `total`.
    """
    if step < warmup:
        return peak * (1 - math.cos(math.pi * step / warmup)) / 2
    return cosine(step - warmup, total=total - warmup, peak=peak)


def anti_phase_momentum(step: int, *, total: int, warmup: int, low: float, high: float) -> float:
    """Momentum of the one-cycle schedules (eqs. 7 and 8).

    It is `high` where the learning rate is 0, and `low` at its peak.
    """
    return high - (high - low) * f1_clr(step, total=total, warmup=warmup, peak=1.0)


def cosine(step: int, *, total: int, peak: float) -> float:
    """Cosine annealing (eq. 5)."""
    return peak * (1 + math.cos(math.pi * step / total)) / 2


def half_cosine(step: int, *, total: int, first: float, last: float) -> float:
    """A value that goes from `first` to `last` along a half cosine (BYOL, section 3.3)."""
    return last + cosine(step, total=total, peak=first - last)


def cosine_with_warmup(step: int, *, total: int, warmup: int, peak: float) -> float:
    """Linear warm-up, then cosine annealing over the rest (eq. 6)."""
    if step < warmup:
        return peak * step / warmup
    return cosine(step - warmup, total=total - warmup, peak=peak)


def exponential(step: int, *, total: int, low: float, high: float) -> float:
    """Learning rate of the range test (section C).

    It rises from `low` at the first of `total` steps to `high` at the last.
    """
    return low * (high / low) ** (step / (total - 1))


def learning_rate_and_momentum(
    step: int,
    *,
    schedule: str,
    total: int,
    warmup: int,
    peak: float,
    momentum: float,
    momentum_low: float,
    momentum_high: float,
) -> tuple[float, float]:
    """Learning rate and momentum at `step` under one of LEARNING_RATE_SCHEDULES.

    The cosine schedules keep `momentum`.
    """
    if schedule in ("f1-clr", "1-clr"):
        cycle = {"total": total, "warmup": warmup}
        anti_phase = anti_phase_momentum(step, **cycle, low=momentum_low, high=momentum_high)
        return f1_clr(step, **cycle, peak=peak), anti_phase
    if schedule == "cosine":
        return cosine(step, total=total, peak=peak), momentum
    return cosine_with_warmup(step, total=total, warmup=warmup, peak=peak), momentum


def noise_scale(*, learning_rate: float, momentum: float, samples: int, batch_size: int) -> float:
    """Scale of the gradient noise, g = eps |D| / (b (1 - beta)) (section 3, below eq. 4)."""
    return learning_rate * samples / (batch_size * (1 - momentum))


def resolution(
    epoch: int, *, schedule: str, epochs: int, warmup: int, low: int, high: int, step: int
) -> int:
    """Side of the views in pixels (section 3.2, fig. 3).

    "spl" stays at `high` for `warmup` epochs and then goes from `low` to `high` in stages of equal
    length, one a multiple of `step`; "progressive" does so from the first epoch; "constant" is
    `high`.
    """
    if schedule == "constant" or (schedule == "spl" and epoch < warmup):
        return high
    start = warmup if schedule == "spl" else 0
    stages = (high - low) // step + 1
    return low + step * ((epoch - start) * stages // (epochs - start))


def staged_resolution(epoch: int, *, epochs: int, stages: Sequence[tuple[int, float]]) -> int:
    """Side of the views in pixels, by free stages.

    stages: side and share of the epochs of each stage, in order; the shares sum to 1. FastDINOv2
        (Zhang et al., NeurIPS 2025) trains three quarters of its epochs at half resolution.
    """
    share_done = 0.0
    for side, share in stages:
        share_done += share
        if epoch < round(share_done * epochs):
            return side
    raise ValueError(f"epoch {epoch} lies behind the stages of {epochs} epochs")


def local_side(resolution: int, *, share: float, step: int) -> int:
    """Side of local views beside global ones of side `resolution`, in pixels.

    It is the multiple of `step` that is nearest to a `share` of `resolution`, and at least `step`.
    """
    return step * max(1, math.floor(share * resolution / step + 0.5))


def magnitude(epoch: int, *, epochs: int, low: float, high: float) -> float:
    """Augmentation magnitude (section 3.2, fig. 3).

    It rises linearly from `low` in the first epoch to `high` in the last.
    """
    return low + (high - low) * epoch / max(epochs - 1, 1)


def hard_share(epoch: int, *, epochs: int, start: int, low: float, high: float) -> float:
    """Fraction of the images that Hard Augment trains on their hardest pair.

    It is 0 before the epoch `start`, then rises linearly from `low` to `high` in the last epoch.
    """
    if epoch < start:
        return 0.0
    return low + (high - low) * (epoch - start) / max(epochs - 1 - start, 1)
