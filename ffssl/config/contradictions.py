"""Contradictions between options."""

from ffssl.config.checks import read_stages
from ffssl.config.options import (
    HardAugmentOptions,
    ModelOptions,
    Options,
    ResolutionOptions,
    TrainingOptions,
)
from ffssl.errors import UserError


def check_together(options: Options) -> None:
    """Raise UserError if options contradict each other."""
    _check_resolution(options.resolution)
    _check_stages(options.resolution, options.training.epochs)
    _check_model(options.model)
    _check_training(options.training)
    _check_views(options.augment.views, options.hard_augment.select)
    _check_hard_augment(options.hard_augment, options.training.epochs)


def _check_resolution(resolution: ResolutionOptions) -> None:
    grows = resolution.schedule in ("spl", "progressive")
    for name in ("max", "min") if grows else ("max",):
        if getattr(resolution, name) % resolution.step:
            raise UserError(
                f"--resolution.{name}: {getattr(resolution, name)} is no multiple of "
                f"--resolution.step={resolution.step}"
            )
    if grows and resolution.min > resolution.max:
        raise UserError(
            f"--resolution.min: {resolution.min} is larger than --resolution.max={resolution.max}"
        )


def _check_stages(resolution: ResolutionOptions, epochs: int) -> None:
    if (resolution.schedule == "stages") != (resolution.stages is not None):
        raise UserError(
            "--resolution.stages: they go with --resolution.schedule=stages; give both, or neither"
        )
    if resolution.stages is None:
        return
    done = 0.0
    for side, share in read_stages(resolution.stages):
        if side % resolution.step:
            raise UserError(
                f"--resolution.stages: {side} is no multiple of --resolution.step={resolution.step}"
            )
        if side > resolution.max:
            raise UserError(
                f"--resolution.stages: {side} is larger than --resolution.max={resolution.max}"
            )
        if round((done + share) * epochs) == round(done * epochs):
            raise UserError(
                f"--resolution.stages: {share:g} of {epochs} epochs leave none at {side}"
            )
        done += share


def _check_model(model: ModelOptions) -> None:
    if model.weights_partial and not model.weights:
        raise UserError("--model.weights_partial: there are no weights; name them, --model.weights")


def _check_training(training: TrainingOptions) -> None:
    if training.schedule == "1-clr":
        if training.warmup_share == 1:
            raise UserError(
                "--training.warmup_share: 1 leaves no training after the warm-up; give less"
            )
    elif training.warmup_epochs >= training.epochs:
        raise UserError(
            f"--training.warmup_epochs: {training.warmup_epochs:g} of {training.epochs} "
            "epochs leave none after the warm-up"
        )
    part, rest = divmod(training.batch_size, training.accumulate)
    if rest or part < 2:
        raise UserError(
            f"--training.accumulate: {training.accumulate} equal parts of 2 images or more "
            f"can't be made of --training.batch_size={training.batch_size}"
        )
    if training.weight_decay_end is not None and not training.weight_decay:
        raise UserError(
            "--training.weight_decay_end: a --training.weight_decay of 0 stays 0; give more, or "
            "leave this out"
        )
    if training.momentum_low > training.momentum_high:
        raise UserError(
            f"--training.momentum_low: {training.momentum_low} is larger than "
            f"--training.momentum_high={training.momentum_high}"
        )


def _check_views(views: int, select: str) -> None:
    if select == "off" and views > 2:
        raise UserError(
            f"--augment.views: {views} views, of which only 2 would be used; give 2, or "
            "--hard_augment.select=hard"
        )
    if select != "off" and views < 3:
        raise UserError(
            f"--augment.views: {views} views leave no pair to choose; hard_augment needs 3 or more"
        )


def _check_hard_augment(hard_augment: HardAugmentOptions, epochs: int) -> None:
    if hard_augment.loss is not None and hard_augment.select != "hard":
        raise UserError(
            "--hard_augment.loss: pairs are compared to find the hardest alone; set "
            "--hard_augment.select=hard, or leave this out"
        )
    if hard_augment.start_epoch is not None:
        if hard_augment.select == "off":
            raise UserError(
                "--hard_augment.start_epoch: no pairs are chosen; set "
                "--hard_augment.select=hard, or leave this out"
            )
        if hard_augment.start_epoch >= epochs:
            raise UserError(
                f"--hard_augment.start_epoch: {hard_augment.start_epoch} is past the last "
                f"epoch, {epochs - 1}; epochs count from 0"
            )
    share_min = hard_augment.share_min
    if share_min is not None and share_min > hard_augment.share_max:
        raise UserError(
            f"--hard_augment.share_min: {share_min} is larger than "
            f"--hard_augment.share_max={hard_augment.share_max}"
        )
    has_share = share_min is not None or hard_augment.share_max != 1
    if has_share and hard_augment.select != "hard":
        name = "share_max" if share_min is None else "share_min"
        raise UserError(
            f"--hard_augment.{name}: only hard pairs have a share; set "
            "--hard_augment.select=hard, or leave this out"
        )
    if hard_augment.extra_targets and hard_augment.select == "off":
        raise UserError(
            "--hard_augment.extra_targets: they are the views not chosen; set "
            "--hard_augment.select=hard or random, and 3 views or more"
        )
