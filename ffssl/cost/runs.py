"""The cost of runs from their options alone: without weights, data or training."""

import functools

import torch

from ffssl.config import Options
from ffssl.cost import STANDARD, Flops, Stage, count_step, stages, step_options
from ffssl.data.beton.several import read_betons
from ffssl.errors import UserError
from ffssl.methods import Method
from ffssl.training.build import build
from ffssl.training.run_schedule import RunSchedule, StepShape

IMAGES = {"imagenet": 1_281_167, "imagenette": 9_469}  # in their training sets


class RunCosts:
    """Count the steps of runs. A step that was counted for one run is not counted again."""

    def __init__(self):
        self._flops: dict[str, Flops] = {}

    def stages(self, options: Options) -> list[Stage]:
        """Return the stages of a run. Raise UserError for options that no run can have."""
        schedule = RunSchedule(options, steps_per_epoch=1)
        step = step_options(schedule)

        @functools.cache
        def method() -> Method:
            with torch.device("meta"):
                return build(options, torch.device("meta"))

        def image_flops(shape: StepShape) -> Flops:
            key = repr((options.model, options.method, step, shape))
            if key not in self._flops:
                self._flops[key] = count_step(method(), shape, **step) / step["batch_size"]
            return self._flops[key]

        return stages(schedule, image_flops)


def petaflop(stages: list[Stage], images: int, backward: int = STANDARD) -> float:
    """Return the PFLOP of a run in which every epoch sees all images.

    A run itself leaves out the last batch of an epoch if it is not full.
    """
    return images * sum(stage.epochs * stage.flops.total(backward) for stage in stages) / 1e15


def number_of_images(images: str | None, file: str) -> int:
    if images in IMAGES:
        return IMAGES[images]
    if images is not None:
        if not images.isdecimal() or not int(images):
            raise UserError(f"--images: expected a number, {' or '.join(IMAGES)}, got {images!r}")
        return int(images)
    if not file:
        raise UserError(
            "--images: how many images the runs train on is not known; give a number, "
            f"{' or '.join(IMAGES)}, or a --data.train=FILE"
        )
    return len(read_betons(file))
