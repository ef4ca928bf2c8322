"""Copy batches to the device while it computes."""

import collections
import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ffssl.parallel.device import mark_work
from ffssl.training.sizes import Views, each


def to_device(batches: Iterable[Views], device: torch.device) -> Iterator[Views]:
    """Yield the batches on `device`.

    All batches have the same shapes, but the last may be shorter. The memory of a yielded batch is
    reused: on a CPU by the next batch; on a GPU by the next but one. A GPU copies a batch while it
    computes with the one before.
    """
    if device.type != "cuda":
        yield from (each(lambda part: part.to(device), batch) for batch in batches)
        return
    computing, copying = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    batches, buffers, read = iter(batches), [], []
    for turn in itertools.cycle((0, 1)):
        # The loader records on this stream when its last batch has been read.
        with torch.cuda.stream(copying):
            batch = next(batches, None)
        if batch is None:
            return
        if len(buffers) < 2:
            buffers.append(each(lambda part: torch.empty_like(part, device=device), batch))
            read.append(computing.record_event())  # work queued earlier may still use the memory
        copying.wait_event(read[turn])
        with torch.cuda.stream(copying):
            on_device = each(_copy, buffers[turn], batch)
        computing.wait_stream(copying)
        yield on_device
        read[turn] = computing.record_event()


def _copy(buffer: Tensor, batch: Tensor) -> Tensor:
    return buffer[: len(batch)].copy_(batch, non_blocking=True)


class RunAheadLimit:
    """Keep the host at most `steps` steps ahead of a GPU.

    Otherwise waiting for the GPU would be counted as waiting for data. Call after each step. Does
    nothing on a CPU.
    """

    def __init__(self, device: torch.device, steps: int = 2):
        self._device, self._steps, self._ends = device, steps, collections.deque()

    def __call__(self) -> None:
        if self._device.type == "cuda":
            self._ends.append(mark_work(self._device))
            if len(self._ends) > self._steps:
                self._ends.popleft().synchronize()
