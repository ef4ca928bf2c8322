"""Copies to a GPU and the host's lead over it, on a GPU that is made up of queues.

Its host is far ahead: nothing that is queued runs before all is queued. The queues then run in the
order that a test chooses, as far as events let them.
"""

import contextlib
import itertools
from collections import deque
from types import SimpleNamespace

import pytest
import torch

from ffssl.training import transfer
from ffssl.training.transfer import RunAheadLimit, to_device

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Stream:
    """Work in its order: functions to call, and events to wait for."""

    def __init__(self):
        self.queue = deque()

    def record_event(self):
        event = SimpleNamespace(passed=False)
        self.queue.append(lambda: setattr(event, "passed", True))
        return event

    def wait_event(self, event):
        self.queue.append(event)

    def wait_stream(self, stream):
        self.wait_event(stream.record_event())

    def step(self):
        """Do the next piece of work. Return whether there was one that need not wait."""
        if not self.queue or not getattr(self.queue[0], "passed", True):
            return False
        work = self.queue.popleft()
        if callable(work):
            work()
        return True


class Memory:
    """A tensor on the GPU. A copy to it is queued on the current stream."""

    def __init__(self, gpu, values):
        self.gpu, self.values = gpu, values

    def __getitem__(self, part):
        return Memory(self.gpu, self.values[part])

    def copy_(self, source, non_blocking):
        assert non_blocking
        self.gpu.current.queue.append(lambda: self.values.copy_(source))
        return self


class MadeUpGpu:
    def __init__(self):
        self.computing = self.current = Stream()
        self.streams = [self.computing]

    def current_stream(self, device):
        return self.current

    def Stream(self, device):
        self.streams.append(Stream())
        return self.streams[-1]

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def empty_like(self, batch, device):
        """Memory that work queued before still writes to, as the allocator may hand it out."""
        values = torch.zeros_like(batch)
        self.computing.queue.appendleft(lambda: values.fill_(-1))
        return Memory(self, values)

    def run(self, streams):
        while any(stream.step() for stream in streams):
            pass
        assert not any(stream.queue for stream in streams), "the streams wait for each other"


@pytest.fixture
def gpu(monkeypatch):
    gpu = MadeUpGpu()
    monkeypatch.setattr(transfer, "torch", SimpleNamespace(cuda=gpu, empty_like=gpu.empty_like))
    return gpu


@pytest.mark.parametrize("first", ["computing", "copying"])
def test_a_gpu_computes_with_the_batch_that_was_copied_for_it(gpu, first):
    batches = [torch.full((3 if i < 6 else 2, 4), i) for i in range(7)]  # the last is shorter
    asked, seen = [], []

    def loader():
        for batch in batches:
            asked.append(gpu.current)
            yield batch

    def compute(batch):
        gpu.computing.queue.append(lambda: seen.append(batch.values.clone()))

    for batch in to_device(loader(), GPU):
        compute(batch)
    _, copying = gpu.streams
    # The loader learns from that stream when a batch has been read.
    assert asked == [copying] * 7
    assert seen == []
    gpu.run(gpu.streams if first == "computing" else gpu.streams[::-1])
    assert len(seen) == 7 and all(map(torch.equal, seen, batches))


def test_a_gpu_copies_a_batch_while_it_computes_with_the_one_before(gpu):
    copied = to_device((torch.full((1,), i) for i in range(4)), GPU)
    next(copied), next(copied)
    busy = SimpleNamespace(passed=False)
    gpu.computing.wait_event(busy)  # with the second batch
    third, fourth = next(copied), next(copied)
    while any(stream.step() for stream in gpu.streams):
        pass
    # The fourth would overwrite the second.
    assert (third.values.item(), fourth.values.item()) == (2, 1)
    busy.passed = True
    gpu.run(gpu.streams)
    assert fourth.values.item() == 3


def test_on_cpu_batches_pass_as_they_are():
    batches = [torch.full((2,), i) for i in range(3)]
    assert [a is b for a, b in zip(to_device(batches, CPU), batches, strict=True)] == [True] * 3


@pytest.fixture
def marks(monkeypatch):
    """What is marked and what is waited for, in order."""
    told, numbers = [], itertools.count()

    def mark_work(device):
        number = next(numbers)
        told.append(("mark", number))
        return SimpleNamespace(synchronize=lambda: told.append(("wait", number)))

    monkeypatch.setattr(transfer, "mark_work", mark_work)
    return told


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_the_host_waits_for_the_step_that_lies_so_many_back(marks, ahead):
    limit, expected = RunAheadLimit(GPU, steps=ahead), []
    for step in range(6):
        limit()
        expected.append(("mark", step))
        if step >= ahead:
            expected.append(("wait", step - ahead))
        assert marks == expected


def test_on_cpu_no_step_is_marked(marks):
    limit = RunAheadLimit(CPU)
    for _ in range(5):
        limit()
    assert marks == []
