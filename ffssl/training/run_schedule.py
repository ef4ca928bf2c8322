"""The schedules of one run: `ffssl.schedules` with a run's options filled in."""

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

from ffssl import methods, schedules
from ffssl.config import Options
from ffssl.config.checks import read_stages
from ffssl.data.policy import ViewPolicy, choose_policies
from ffssl.hard_augment import Selection


class StepShape(NamedTuple):
    """What the cost of a step depends on.

    resolution: side of the (global) views in pixels.
    views: (global) views of each image.
    local_resolution: side of the local views in pixels.
    local_views: local views of each image.
    """

    resolution: int
    views: int
    local_resolution: int = 0
    local_views: int = 0

    @property
    def for_loader(self) -> dict[str, Any]:
        """The arguments `resolution` and `views` of the loader."""
        if not self.local_views:
            return {"resolution": self.resolution, "views": self.views}
        return {
            "resolution": (self.resolution, self.local_resolution),
            "views": (self.views, self.local_views),
        }

    def of_batch(self, batch_size: int) -> list[tuple[int, int, int, int, int]]:
        """Return the shapes (B, m, 3, R, R) of a batch's views: the global ones, then the local."""
        sizes = [(self.views, self.resolution), (self.local_views, self.local_resolution)]
        return [(batch_size, views, 3, side, side) for views, side in sizes if views]


@dataclass(frozen=True)
class RunSchedule:
    """What to do in each epoch and in each step of a run.

    options: all sections, see `ffssl.config`.
    steps_per_epoch: optimiser steps.
    """

    options: Options
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
        if r.stages is not None:
            return schedules.staged_resolution(epoch, epochs=epochs, stages=read_stages(r.stages))
        return schedules.resolution(
            epoch,
            schedule=r.schedule,
            epochs=epochs,
            warmup=round(self.warmup_epochs),
            low=r.min,
            high=r.max,
            step=r.step,
        )

    @property
    def selection_start(self) -> int:
        """The first epoch in which Hard Augment chooses pairs.

        By default it is the one after the warm-up, or the method's own, if that is later.
        """
        if self.options.hard_augment.start_epoch is not None:
            return self.options.hard_augment.start_epoch
        epochs = self.options.training.epochs
        method = methods.method_class(self.options.method.name)
        start = max(self.warmup_epochs, method.share_before_hard_augment * epochs)
        return min(round(start), epochs - 1)

    def views(self, epoch: int) -> int:
        """Return the number of views rendered of each image: 2 before pairs are chosen."""
        return self.options.augment.views if epoch >= self.selection_start else 2

    def selection(self, epoch: int) -> Selection:
        """Return how the training pair of each image's views is chosen."""
        h, epochs = self.options.hard_augment, self.options.training.epochs
        if h.select == "off" or epoch < self.selection_start:
            return Selection()
        policies = len(view_policies(self.options)) if h.across_policies is not False else 1
        low = methods.method_class(self.options.method.name).first_hard_share
        if h.share_min is not None:
            low = h.share_min
        share = schedules.hard_share(
            epoch,
            epochs=epochs,
            start=self.selection_start,
            low=min(low, h.share_max),
            high=h.share_max,
        )
        return Selection(h.select, h.resolution, h.loss, h.extra_targets, share, policies)

    def shape(self, epoch: int) -> StepShape:
        return self.shape_at(self.resolution(epoch), self.views(epoch))

    def shape_at(self, resolution: int, views: int) -> StepShape:
        """Return the shape of a step with that many (global) views of that side."""
        augment = self.options.augment
        if not augment.local_views:
            return StepShape(resolution, views)
        side = schedules.local_side(
            resolution, share=augment.local_share, step=self.options.resolution.step
        )
        return StepShape(resolution, views, side, augment.local_views)

    @property
    def stages(self) -> list[tuple[StepShape, int]]:
        """Runs of consecutive epochs whose steps have one shape: (shape, number of epochs)."""
        shapes = (self.shape(epoch) for epoch in range(self.options.training.epochs))
        return [(shape, len(list(epochs))) for shape, epochs in itertools.groupby(shapes)]

    @property
    def first_epochs(self) -> dict[StepShape, int]:
        """The first epoch of each step shape, by resolution in ascending order."""
        epochs = reversed(range(self.options.training.epochs))
        return dict(sorted((self.shape(epoch), epoch) for epoch in epochs))

    @property
    def resolutions(self) -> list[int]:
        """All resolutions of the run, in ascending order."""
        return sorted({shape.resolution for shape, _ in self.stages})

    def magnitude(self, epoch: int) -> float:
        a = self.options.augment
        return schedules.magnitude(
            epoch, epochs=self.options.training.epochs, low=a.magnitude_min, high=a.magnitude_max
        )

    def learning_rate_and_momentum(self, step: int) -> tuple[float, float]:
        t = self.options.training
        warmup = round(self.warmup_epochs * self.steps_per_epoch)
        return schedules.learning_rate_and_momentum(
            step,
            schedule=t.schedule,
            total=self.total_steps,
            warmup=warmup,
            peak=t.learning_rate,
            momentum=t.momentum,
            momentum_low=t.momentum_low,
            momentum_high=t.momentum_high,
        )

    def weight_decay(self, step: int) -> float:
        t = self.options.training
        if t.weight_decay_end is None:
            return t.weight_decay
        return schedules.half_cosine(
            step, total=self.total_steps, first=t.weight_decay, last=t.weight_decay_end
        )

    def noise_scale(self, step: int, samples: int) -> float:
        learning_rate, momentum = self.learning_rate_and_momentum(step)
        return schedules.noise_scale(
            learning_rate=learning_rate,
            momentum=momentum,
            samples=samples,
            batch_size=self.options.training.batch_size,
        )


def view_policies(options: Options) -> tuple[ViewPolicy, ...]:
    """Return the policies that render a run's views, in turn.

    Raise UserError for an unknown name.
    """
    augment = options.augment
    return choose_policies(
        augment.policy or methods.method_class(options.method.name).policy,
        crop_scale_min=augment.crop_scale_min,
        blur=augment.blur,
        blur_side=options.resolution.max if augment.blur_scale == "proportional" else None,
        jitter_form=augment.jitter_form,
        interpolation=augment.interpolation,
    )


def input_sides(options: Options) -> dict[int, str]:
    """Map each side in pixels of the images that the backbone sees to the option it comes from.

    The images are the training views, global and local, those of Hard Augment's selection pass, and
    those of the evaluation.
    """
    r, hard_augment = options.resolution, options.hard_augment
    bounds = {r.max: "--resolution.max"}
    if r.stages is None:
        bounds[r.min] = "--resolution.min"
    others = "--resolution.step" if r.stages is None else "--resolution.stages"
    schedule = RunSchedule(options, steps_per_epoch=1)
    sides = {side: bounds.get(side, others) for side in schedule.resolutions}
    for shape, _ in schedule.stages:
        if shape.local_views:
            sides.setdefault(shape.local_resolution, "--augment.local_share")
    if hard_augment.select == "hard" or hard_augment.extra_targets:
        sides.setdefault(min(hard_augment.resolution, max(sides)), "--hard_augment.resolution")
    if options.data.validation:
        sides[r.max] = "--resolution.max"
    return sides
