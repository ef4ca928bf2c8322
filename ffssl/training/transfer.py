"""Batches on their way to the device."""

import collections
import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ffssl.parallel.device import mark_work


def to_device(batches: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Batches of one shape, of which the last may be shorter, on the `device`.

    Their memory is overwritten by the next. On a GPU a batch is copied while the one before it is
    computed with; it is overwritten by the next but one.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    computing, copying = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    batches, buffers, read = iter(batches), [], []
    for turn in itertools.cycle((0, 1)):
        # On which a loader notes that its last batch has been read.
        with torch.cuda.stream(copying):
            batch = next(batches, None)
        if batch is None:
            return
        if len(buffers) < 2:
            buffers.append(torch.empty_like(batch, device=device))
            read.append(computing.record_event())  # the memory may have been something else's
        copying.wait_event(read[turn])
        with torch.cuda.stream(copying):
            on_device = buffers[turn][: len(batch)].copy_(batch, non_blocking=True)
        computing.wait_stream(copying)
        yield on_device
        read[turn] = computing.record_event()


class RunAheadLimit:
    """How far the host may be ahead of a GPU: by `steps` steps, so that waiting for the GPU is not
    taken for waiting for data.

    Call after each step; does nothing on a CPU.
    """

    def __init__(self, device: torch.device, steps: int = 2):
        self._device, self._steps, self._ends = device, steps, collections.deque()

    def __call__(self) -> None:
        if self._device.type == "cuda":
            self._ends.append(mark_work(self._device))
            if len(self._ends) > self._steps:
                self._ends.popleft().synchronize()
