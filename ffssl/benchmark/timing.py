"""Clocks of the benchmarks of training."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor


def where(device: torch.device) -> str:
    """Say on what a benchmark runs."""
    return (
        "on the CPU, there being no GPU"
        if device.type == "cpu" and not torch.cuda.is_available()
        else f"on {device}"
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, from an idle device to an idle device."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


class Stopwatch:
    """Times the parts of steps by the device's own clock.

    A part lasts from the mark before it to its own. `mark` is the `mark` of
    `ffssl.training.step.train_step`; call `start` before each step.
    """

    def __init__(self, device: torch.device):
        self._cuda, self._device = device.type == "cuda", device
        self._steps: list[list[tuple[str, float | torch.cuda.Event]]] = []

    def start(self) -> None:
        self._steps.append([("", self._now())])

    def mark(self, part: str) -> None:
        self._steps[-1].append((part, self._now()))

    def _now(self) -> "float | torch.cuda.Event":
        if not self._cuda:
            return time.perf_counter()
        return torch.cuda.current_stream(self._device).record_event(
            torch.cuda.Event(enable_timing=True)
        )

    def milliseconds(self) -> dict[str, float]:
        """Return each part's time, the median over the steps."""
        times = defaultdict(list)
        for step in self._steps:
            of_step = defaultdict(float)
            for (_, begin), (part, end) in zip(step, step[1:]):
                of_step[part] += begin.elapsed_time(end) if self._cuda else 1000 * (end - begin)
            for part, value in of_step.items():
                times[part].append(value)
        return {part: statistics.median(values) for part, values in times.items()}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the product of two large square matrices in `dtype`.

    No convolution can be expected to reach more.
    """
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def multiply() -> Tensor:
        return a @ b

    multiply()
    return 2 * side**3 / min(seconds_of(multiply, device) for _ in range(10))
