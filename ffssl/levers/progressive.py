"""Super Progressive Learning: resolution and augmentation strength as functions of the epoch."""

import itertools
from dataclasses import dataclass

from ffssl import schedules
from ffssl.errors import UserError


@dataclass(frozen=True)
class ProgressiveResolution:
    """The side of the views in pixels, of an epoch (section 3.2 of the paper).

    It is `high` in the warm-up. Then it goes from `low` to `high` in stages of equal length, one
    for each multiple of `step`.

    resolution = ProgressiveResolution(epochs=480, warmup_epochs=80, low=96, high=224)
    resolution(80)       # 96
    resolution.stages    # [(224, 80), (96, 80), (128, 80), (160, 80), (192, 80), (224, 80)]

    epochs: of the whole training.
    warmup_epochs: that of the learning rate; 0 is plain Progressive Learning.
    low, high: in pixels; their difference is a multiple of `step`.
    step: in pixels; a convolutional network's stride, or a multiple of it, wastes no border.

    Raise UserError for values that do not fit together.
    """

    epochs: int
    warmup_epochs: int
    low: int
    high: int
    step: int = 32

    def __post_init__(self):
        if not 0 <= self.warmup_epochs < self.epochs:
            raise UserError(
                f"ProgressiveResolution: warmup_epochs is {self.warmup_epochs}, must lie in "
                f"0..{self.epochs - 1}, below epochs={self.epochs}"
            )
        if self.step < 1 or not 0 < self.low <= self.high or (self.high - self.low) % self.step:
            raise UserError(
                f"ProgressiveResolution: from low={self.low} to high={self.high} there is no whole "
                f"number of steps of {self.step} px"
            )

    def __call__(self, epoch: int) -> int:
        """Return the side in the epoch, counted from 0."""
        _check_epoch(self, epoch)
        return schedules.resolution(
            epoch,
            schedule="spl",
            epochs=self.epochs,
            warmup=self.warmup_epochs,
            low=self.low,
            high=self.high,
            step=self.step,
        )

    @property
    def stages(self) -> list[tuple[int, int]]:
        """The sides in their order, with the number of epochs of each."""
        sides = itertools.groupby(map(self, range(self.epochs)))
        return [(side, len(list(epochs))) for side, epochs in sides]


@dataclass(frozen=True)
class ProgressiveMagnitude:
    """The strength of the augmentation, of an epoch (section 3.2 of the paper).

    It rises linearly from `low` in the first epoch to `high` in the last. Of a `ViewLoader`, 5 is
    the strength that the view policy states, and 10 is twice that.

    magnitude = ProgressiveMagnitude(epochs=480, low=4, high=6)
    magnitude(0), magnitude(479)     # 4.0, 6.0

    Raise UserError for an epoch of which there is none.
    """

    epochs: int
    low: float
    high: float

    def __post_init__(self):
        if self.epochs < 1:
            raise UserError(f"ProgressiveMagnitude: epochs is {self.epochs}, must be at least 1")

    def __call__(self, epoch: int) -> float:
        """Return the magnitude in the epoch, counted from 0."""
        _check_epoch(self, epoch)
        return float(schedules.magnitude(epoch, epochs=self.epochs, low=self.low, high=self.high))


def _check_epoch(schedule: ProgressiveResolution | ProgressiveMagnitude, epoch: int) -> None:
    if not 0 <= epoch < schedule.epochs:
        raise UserError(
            f"{type(schedule).__name__}: epoch {epoch} is none of its {schedule.epochs}, which are "
            "counted from 0; make it with the epochs of the training"
        )
