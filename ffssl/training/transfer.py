"""Copy batches to the device while it computes."""

import collections
import itertools
from collections.abc import Generator, Iterable, Iterator

import torch
from torch import Tensor

from ffssl.data.loader import Batch
from ffssl.parallel.device import mark_work
from ffssl.training.views import Views, map_sizes


def to_device(batches: Iterable[Views], device: torch.device) -> Generator[Views, None, None]:
    """Yield the batches on `device`.

    All batches have the same shapes, but the last may be shorter. The memory of a yielded batch is
    reused: on a CPU by the next batch; on a GPU by the next but one. A GPU copies a batch while it
    computes with the one before.
    """
    if device.type != "cuda":
        yield from (map_sizes(lambda part: part.to(device), batch) for batch in batches)
        return
    computing, copying = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    coming = iter(batches)
    buffers: list[Views] = []
    read: list[torch.cuda.Event] = []
    for turn in itertools.cycle((0, 1)):
        # The loader records on this stream when its last batch has been read.
        with torch.cuda.stream(copying):
            batch = next(coming, None)
        if batch is None:
            return
        if len(buffers) < 2:
            buffers.append(map_sizes(lambda part: torch.empty_like(part, device=device), batch))
            read.append(computing.record_event())  # work queued earlier may still use the memory
        copying.wait_event(read[turn])
        with torch.cuda.stream(copying):
            on_device = map_sizes(_copy, buffers[turn], batch)
        computing.wait_stream(copying)
        yield on_device
        read[turn] = computing.record_event()


def _copy(buffer: Tensor, batch: Tensor) -> Tensor:
    return buffer[: len(batch)].copy_(batch, non_blocking=True)


def views_to_device(
    batches: Iterable[Batch], device: torch.device
) -> Generator[tuple[Views, Tensor], None, None]:
    """Yield the views of a loader's batches on `device`, as `to_device`, and their labels.

    The labels, int64 (B,), stay in the host's memory.
    """
    labels: collections.deque[Tensor] = collections.deque()

    def views() -> Iterator[Views]:
        for views, of_batch, _ in batches:
            labels.append(of_batch)
            yield views

    for on_device in to_device(views(), device):
        yield on_device, labels.popleft()


class RunAheadLimit:
    """Keep the host at most `steps` steps ahead of a GPU.

    Otherwise waiting for the GPU would be counted as waiting for data. Call after each step. Does
    nothing on a CPU.
    """

    def __init__(self, device: torch.device, steps: int = 2):
        self._device, self._steps = device, steps
        self._ends: collections.deque[torch.cuda.Event] = collections.deque()

    def __call__(self) -> None:
        if self._device.type == "cuda":
            self._ends.append(mark_work(self._device))
            if len(self._ends) > self._steps:
                self._ends.popleft().synchronize()
