"""Whether a run would be faster in bf16 on this CPU."""

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from ffssl.errors import UserError
from ffssl.parallel.device import has_bf16

SECONDS = 0.5  # after which a trial ends, if it has had two rounds
ROUNDS = 9
MOST_IMAGES = 16
PIXELS = MOST_IMAGES * 48**2  # of all images
PAYS = 1.2  # less may be the clock's error


def bf16_speed_up(
    backbone: nn.Module, side: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return how many times faster a backbone's passes are in bf16 than in float32, on the CPU.

    backbone: maps images (N, 3, side, side) to features. It is left as it is, like the random
        state.
    clock: returns seconds.

    Forward and backward passes over a few images take turns in both precisions. The median of the
    ratios counts; the first round, in which kernels are made, does not.
    """
    network = copy.deepcopy(backbone).train()
    count = max(2, min(MOST_IMAGES, PIXELS // side**2))
    images = torch.linspace(-1, 1, count * 3 * side**2).view(count, 3, side, side)
    images = images.contiguous(memory_format=torch.channels_last)

    def seconds(dtype: torch.dtype) -> float:
        network.zero_grad(set_to_none=True)
        started = clock()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            features = network(images)
        features.float().square().mean().backward()
        return clock() - started

    ratios: list[float] = []
    with torch.random.fork_rng(devices=[]):
        begun = clock()
        seconds(torch.float32), seconds(torch.bfloat16)
        while not ratios or (len(ratios) < ROUNDS and clock() - begun < SECONDS):
            ratios.append(seconds(torch.float32) / seconds(torch.bfloat16))
    return statistics.median(ratios)


def require_bf16(amp: str, device: torch.device) -> None:
    """Raise UserError if a run is to compute in bf16 on a CPU that only emulates it."""
    if amp == "bf16" and device.type == "cpu" and not has_bf16(device):
        raise UserError("--training.amp: this CPU has no bf16; use off")


def advise_bf16(amp: str, device: torch.device, backbone: nn.Module, side: int) -> str:
    """Say in one line if bf16 would be faster than the float32 that "auto" is on a CPU.

    Return an empty string if it would not, or if there is nothing to decide. The line is advice: a
    clock that chose would train other weights on a busy machine, and runs in one precision would
    be compared with runs in the other.
    """
    if amp != "auto" or device.type != "cpu" or not has_bf16(device):
        return ""
    speed_up = bf16_speed_up(backbone, side)
    if speed_up < PAYS:
        return ""
    return (
        f"bf16 was {speed_up:.1f}x faster than float32 in a short trial of the backbone; "
        "--training.amp=bf16, in a new run, takes it"
    )
