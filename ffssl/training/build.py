"""Build a run's method."""

from pathlib import Path
from typing import Any

import torch

from ffssl import hard_augment
from ffssl.backbones import Backbone, build_backbone, check_resolutions
from ffssl.config import Options
from ffssl.errors import UserError
from ffssl.files import sha256
from ffssl.methods import METHODS, Method, build_method
from ffssl.training.run_schedule import RunSchedule, input_sides, view_policies
from ffssl.weights import load_weights, read_weights


def random_backbone(options: Options) -> Backbone:
    """Return a run's backbone with random weights. Raise UserError if there is none such."""
    model = options.model
    return build_backbone(
        model.backbone,
        zero_init_residual=model.zero_init_residual,
        stem=model.stem,
        drop_path=model.drop_path,
        patch_drop=model.patch_drop,
    )


def first_backbone(options: Options) -> tuple[Backbone, dict[str, Any]]:
    """Return a run's backbone before its first step, and a record of the file it starts from.

    The record holds the file's name, its sha256, and lists of names: of tensors that were left at
    random, ignored, ignored as a classifier's, and interpolated. It is empty without a file.

    Raise UserError if the file can't be loaded, or does not fit and need not in part.
    """
    backbone, model = random_backbone(options), options.model
    if not model.weights:
        return backbone, {}
    path = Path(model.weights)
    try:
        tensors = read_weights(path)
        digest = sha256(path)
    except UserError as error:
        raise UserError(f"--model.weights: {error}") from error
    try:
        fit = load_weights(backbone, model.backbone, tensors, partial=model.weights_partial)
    except UserError as error:
        advice = "" if model.weights_partial else "; --model.weights_partial=true takes what fits"
        raise UserError(f"--model.weights: {path} {error}{advice}") from error
    return backbone, {
        "file": path.name,
        "sha256": digest,
        "loaded": len(fit.loaded),
        "left_at_random": fit.left,
        "ignored": fit.ignored,
        "classifier": fit.heads,
        "interpolated": fit.resampled,
    }


def build(options: Options, device: torch.device, backbone: Backbone | None = None) -> Method:
    """Return a run's method in channels_last.

    backbone: as `first_backbone` returns it; by default one with random weights.

    Raise UserError for options that no run can have.
    """
    model, training = options.model, options.training
    backbone = random_backbone(options) if backbone is None else backbone
    check_resolutions(model.backbone, backbone, input_sides(options))
    method = build_method(options.method.name, backbone, options.method.settings)
    method.check(training.batch_size)
    if options.augment.local_views and not method.takes_local_views:
        takers = ", ".join(name for name, one in METHODS.items() if one.takes_local_views)
        raise UserError(
            f"--augment.local_views: {method.name} has no use for local views; leave them out, or "
            f"take one of {takers}"
        )
    if options.hard_augment.across_policies and len(view_policies(options)) == 1:
        raise UserError(
            "--hard_augment.across_policies: the views have one policy alone; leave this out, or "
            "take --augment.policy=byol"
        )
    schedule = RunSchedule(options, steps_per_epoch=1)
    hard_augment.check(method, schedule.selection(training.epochs - 1))
    if training.joint_views is not None:
        method.joint_views = training.joint_views
    return method.to(device).to(memory_format=torch.channels_last)
