"""Build a run's method with random weights, and compile it."""

from collections.abc import Iterable

import torch
from torch import nn

from ffssl import hard_augment
from ffssl.backbones import build_backbone, check_resolutions
from ffssl.config import Options
from ffssl.errors import UserError
from ffssl.methods import METHODS, Method, build_method
from ffssl.training.schedule import RunSchedule, input_sides, view_policies

# The methods of a Method that run its networks.
COMPILED_METHODS = ("loss", "project", "targets", "compare")
# torch.compile gives up after this many shapes and states of one function: resolutions, and what a
# method adds to them.
SHAPES_COMPILED = 64


def build(options: Options, device: torch.device) -> Method:
    """Return a run's method with random weights, in channels_last.

    Raise UserError for options that no run can have.
    """
    model, training = options.model, options.training
    backbone = build_backbone(
        model.backbone,
        zero_init_residual=model.zero_init_residual,
        stem=model.stem,
        drop_path=model.drop_path,
    )
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
    return method.to(device, memory_format=torch.channels_last)


def compile_methods(
    module: nn.Module, passes: Iterable[str], mode: str, device: torch.device, **settings
) -> str:
    """Make torch.compile compile these methods of a module, once for each shape.

    passes: names of the methods.
    mode: a mode of torch.compile, "off", or "auto": "default" on a GPU and "off" on a CPU.
    settings: further arguments of torch.compile.

    Return the mode that is used: "off" if nothing is compiled.
    """
    if mode == "auto":
        mode = "default" if device.type == "cuda" else "off"
    if mode != "off":
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, SHAPES_COMPILED)
        for name in passes:
            compiled = torch.compile(getattr(module, name), dynamic=False, mode=mode, **settings)
            setattr(module, name, compiled)
    return mode
