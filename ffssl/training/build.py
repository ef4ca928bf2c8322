"""The method of a run, with random weights, and its compiled code."""

from collections.abc import Iterable

import torch
from torch import nn

from ffssl import hard_augment
from ffssl.backbones import build_backbone, check_resolutions
from ffssl.config import Options
from ffssl.errors import UserError
from ffssl.methods import Method, build_method
from ffssl.training.schedule import RunSchedule, input_sides, view_policies

COMPILED_METHODS = (
    "loss",
    "project",
    "targets",
    "compare",
)  # of a method: all that computes with networks
# For how many shapes and states torch.compile makes code before it gives up: resolutions, and each
# method's own.
SHAPES_COMPILED = 64


def build(options: Options, device: torch.device) -> Method:
    """A run's method with random weights, channels_last.

    Raises UserError for options that no run can have.
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
    hard_augment.check(
        method, RunSchedule(options, steps_per_epoch=1).selection(training.epochs - 1)
    )
    if training.joint_views is not None:
        method.joint_views = training.joint_views
    return method.to(device, memory_format=torch.channels_last)


def compile_methods(
    module: nn.Module, passes: Iterable[str], mode: str, device: torch.device, **settings
) -> str:
    """Have torch.compile make code of these methods of a module, once for each shape.

    Returns the mode, "off" if it does nothing.

    mode: one of torch.compile's, "off", or "auto": "default" on a GPU. settings: others that
    torch.compile takes.
    """
    if mode == "auto":
        mode = "default" if device.type == "cuda" else "off"
    if mode != "off":
        torch._dynamo.config.recompile_limit = max(
            torch._dynamo.config.recompile_limit, SHAPES_COMPILED
        )
        for name in passes:
            setattr(
                module,
                name,
                torch.compile(getattr(module, name), dynamic=False, mode=mode, **settings),
            )
    return mode
