"""The schedules of one run: `ffssl.schedules` with a run's options filled in."""

import itertools
from dataclasses import dataclass
from types import SimpleNamespace

from ffssl import schedules


@dataclass(frozen=True)
class Plan:
    """What each epoch and each step of a run is to be. `options`: all sections; see `ffssl.config`."""

    options: SimpleNamespace
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        return self.options.training.epochs * self.steps_per_epoch

    @property
    def warmup_epochs(self) -> float:
        t = self.options.training
        return t.warmup_share * t.epochs if t.schedule == "1-clr" else t.warmup_epochs

    def resolution(self, epoch: int) -> int:
        r, epochs = self.options.resolution, self.options.training.epochs
        return schedules.resolution(
            epoch, schedule=r.schedule, epochs=epochs, warmup=round(self.warmup_epochs), low=r.min, high=r.max, step=r.step
        )

    @property
    def stages(self) -> list[tuple[int, int]]:
        """The epochs by resolution, in their order: the resolution, and of how many consecutive epochs it is."""
        resolutions = itertools.groupby(self.resolution(epoch) for epoch in range(self.options.training.epochs))
        return [(resolution, len(list(epochs))) for resolution, epochs in resolutions]

    @property
    def resolutions(self) -> list[int]:
        """All of the run, in ascending order."""
        return sorted({resolution for resolution, _ in self.stages})

    def magnitude(self, epoch: int) -> float:
        a = self.options.augment
        return schedules.magnitude(epoch, epochs=self.options.training.epochs, low=a.magnitude_min, high=a.magnitude_max)

    def learning_rate_and_momentum(self, step: int) -> tuple[float, float]:
        t = self.options.training
        warmup = round(self.warmup_epochs * self.steps_per_epoch)
        return schedules.learning_rate_and_momentum(
            step, schedule=t.schedule, total=self.total_steps, warmup=warmup, peak=t.learning_rate,
            momentum=t.momentum, momentum_low=t.momentum_low, momentum_high=t.momentum_high,
        )  # fmt: skip

    def noise_scale(self, step: int, samples: int) -> float:
        learning_rate, momentum = self.learning_rate_and_momentum(step)
        return schedules.noise_scale(
            learning_rate=learning_rate, momentum=momentum, samples=samples, batch_size=self.options.training.batch_size
        )


def input_sides(options: SimpleNamespace) -> dict[int, str]:
    """Every side in pixels of the images that a run's backbone sees, of views, of Hard Augment's low-resolution pass and of the
    evaluation, with the option that it comes from.
    """
    r, hard_augment = options.resolution, options.hard_augment
    bounds = {r.min: "--resolution.min", r.max: "--resolution.max"}
    sides = {side: bounds.get(side, "--resolution.step") for side in Plan(options, steps_per_epoch=1).resolutions}
    if hard_augment.select == "hard" or hard_augment.extra_targets:
        sides.setdefault(min(hard_augment.resolution, max(sides)), "--hard_augment.resolution")
    if options.data.validation:
        sides[r.max] = "--resolution.max"
    return sides
