"""Build a run's method with random weights."""

import torch

from ffssl import hard_augment
from ffssl.backbones import build_backbone, check_resolutions
from ffssl.config import Options
from ffssl.errors import UserError
from ffssl.methods import Method, build_method
from ffssl.training.schedule import RunSchedule, input_sides, view_policies


def build(options: Options, device: torch.device) -> Method:
    """Return a run's method with random weights, in channels_last.

    Raise UserError for options that no run can have.
    """
    model, training = options.model, options.training
    backbone = build_backbone(
        model.backbone, zero_init_residual=model.zero_init_residual, stem=model.stem
    )
    check_resolutions(model.backbone, backbone, input_sides(options))
    method = build_method(options.method.name, backbone, options.method.settings)
    method.check(training.batch_size)
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
