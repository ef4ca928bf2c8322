"""Compile a run's networks with torch.compile, stage by stage."""

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from ffssl.parallel.ranks import world_size
from ffssl.training.run_schedule import StepShape

# The methods of a Method that run its networks.
COMPILED_METHODS = ("loss", "project", "targets", "compare")
# torch.compile gives up after this many shapes and states of one function: resolutions, and what a
# method adds to them.
SHAPES_COMPILED = 64
# Modes that record a step's kernels as CUDA graphs. The host then launches graphs, not kernels.
GRAPHS = "reduce-overhead"
WITH_GRAPHS = (GRAPHS, "max-autotune")
# FLOPs of a step for each parameter tensor. Below this the fastest GPUs wait for the host, which
# takes some 0.1 ms to launch a tensor's kernels, selection and backward pass included. Slower GPUs
# gain less by graphs. Graphs cost only memory.
FLOPS_TO_LAUNCH = 3e10


def stage_modes(
    option: str,
    flops: Mapping[StepShape, float],
    method: nn.Module,
    device: torch.device,
    parts: int = 1,
) -> dict[StepShape, str]:
    """Return the mode of torch.compile for steps of each shape; "off" compiles nothing.

    option: a mode of torch.compile, "off", or "auto". That is off on a CPU, "default" on several
        GPUs, and on one GPU "reduce-overhead" for steps that are bound by launches, else "default".
    flops: of a step.
    parts: in which a step computes its batch.

    No clock decides: a resumed run has the modes that it had before.
    """
    if option != "auto":
        return dict.fromkeys(flops, option)
    if device.type != "cuda":
        return dict.fromkeys(flops, "off")
    limit = 0.0
    if world_size() == 1:
        limit = FLOPS_TO_LAUNCH * parts * sum(1 for _ in method.parameters())
    return {shape: GRAPHS if work < limit else "default" for shape, work in flops.items()}


def describe_modes(modes: Mapping[StepShape, str]) -> str:
    """Return "default", or with several modes "default at 224 px, reduce-overhead at 96 px"."""
    kinds = dict.fromkeys(modes.values())
    if len(kinds) == 1:
        return next(iter(kinds))
    told = []
    for kind in kinds:
        # Of one resolution there may be two shapes, with different numbers of views.
        shapes = [shape for shape, mode in modes.items() if mode == kind]
        sides = ", ".join(map(str, sorted({shape.resolution for shape in shapes})))
        told.append(f"{kind} at {sides} px")
    return ", ".join(told)


def compile_methods(module: nn.Module, names: Iterable[str], mode: str, **settings: Any) -> None:
    """Make torch.compile compile these methods of a module, once for each shape.

    mode: a mode of torch.compile, or "off". It replaces the mode of an earlier call. What was
        compiled in a mode is still there when that mode returns.
    settings: further arguments of torch.compile.
    """
    if mode != "off":
        keep_code()
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, SHAPES_COMPILED)
    for name in names:
        vars(module).pop(name, None)  # as an earlier call compiled it
        if mode != "off":
            compiled = torch.compile(getattr(module, name), dynamic=False, mode=mode, **settings)
            setattr(module, name, compiled)


def keep_code() -> None:
    """Keep torch.compile's code in the user's cache folder, for later runs.

    By default it is in the temporary folder, which many machines empty. TORCHINDUCTOR_CACHE_DIR
    names another folder.
    """
    # torch puts its default there when it is imported.
    default = default_cache_dir()
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default) != default:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ffssl" / "compiled"
    with contextlib.suppress(OSError):  # the default then
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(cache, os.W_OK):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)


class StageCompiler:
    """Compiles a method in the mode of the stage under way.

    modes: for each shape of a step.
    """

    def __init__(self, method: nn.Module, modes: Mapping[StepShape, str]):
        self.modes = modes
        self._method = method
        self._shape: StepShape | None = None

    def begin(self, shape: StepShape) -> None:
        """Begin or continue the stage of a shape, and free the CUDA graphs of another."""
        if shape == self._shape:
            return
        if self._shape is not None and self.modes[self._shape] in WITH_GRAPHS:
            # The only public way to free graphs also forgets the code. Of that, the selection
            # pass's alone is used again, and comes from the disk.
            torch.compiler.reset()
        compile_methods(self._method, COMPILED_METHODS, self.modes[shape])
        self._shape = shape
