"""Views for a training loop, rendered by a pool of threads that never wait for one another.

    loader = ViewLoader("train.beton", batch_size=256, views=2, resolution=224)
    for epoch in range(100):
        loader.set_epoch(epoch, resolution=160, magnitude=4.5)
        for views, labels, indices in loader:     # uint8 (256, 2, 3, 160, 160)
            ...
"""

import os
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ffssl.data.beton import read_beton
from ffssl.data.decoder import ViewSettings, render_samples
from ffssl.data.order import epoch_order
from ffssl.data.policy import STANDARD_MAGNITUDE, ViewPolicy
from ffssl.errors import UserError

SAMPLES_PER_TASK = 4  # small enough that the threads finish a batch together, large enough that starting a task costs nothing


class Batch(NamedTuple):
    """views: uint8 (batch, views, 3, R, R); labels: int64 (batch,), -1 where there are none; indices: int64 (batch,) into the file."""

    views: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor


class ViewLoader:
    """Iterates over a beton file, an epoch at a time.

    path: a beton file with an image field; its int field `label` is served where there is one.
    batch_size: samples of this rank in a batch. views, resolution, policy, scaled_decoding: see `ViewSettings`.
    indices: the samples to visit, all by default. shuffle: a new order every epoch, by `seed` and epoch, the same on all ranks.
    drop_last: leave out the incomplete last batch. workers: threads, 0 for one per core.
    batches_ahead: batches being rendered while one is consumed; memory is (batches_ahead + 1) batches at `max_resolution`.
    rank, world_size: this process's share of every epoch.

    A batch's views are a window on a buffer that is reused: they hold until the next batch is asked for (on CUDA, until the work
    queued by then has read them). What goes wrong in a thread is raised in the loop; leaving the loop early stops the threads'
    work. Raises UserError for a file that can't be trained on and for an image that does not decode.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        batch_size: int,
        views: int,
        resolution: int,
        policy: ViewPolicy | Sequence[ViewPolicy] = ViewPolicy(),
        max_resolution: int | None = None,
        indices: Sequence[int] | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        seed: int = 0,
        workers: int = 0,
        batches_ahead: int = 3,
        scaled_decoding: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.beton = read_beton(path)
        self.samples = np.arange(len(self.beton)) if indices is None else np.asarray(indices, np.int64)
        for name, value in (("batch_size", batch_size), ("batches_ahead", batches_ahead)):
            if value < 1:
                raise UserError(f"{path}: {name} is {value}, must be at least 1")
        if workers < 0 or (max_resolution or resolution) < resolution:
            raise UserError(f"{path}: {workers} workers, resolution {resolution} of at most {max_resolution}: out of range")
        if len(self.samples) and not 0 <= self.samples.min() <= self.samples.max() < len(self.beton):
            raise UserError(f"{path}: indices from {self.samples.min()} to {self.samples.max()}, but it holds {len(self.beton)} samples")
        if drop_last and len(self.samples) // world_size < batch_size:
            each = f" on each of {world_size} processes" if world_size > 1 else ""
            raise UserError(f"{path}: {len(self.samples)} samples are fewer than one batch of {batch_size}{each}")
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.workers = workers or len(os.sched_getaffinity(0))
        self._slots = batches_ahead + 1
        self._max_resolution = max_resolution or resolution
        self._settings = ViewSettings(views, resolution, policy, seed, scaled_decoding)
        self._file = np.memmap(self.beton.path, np.uint8, "r")
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="ffssl-views")
        self._buffer: torch.Tensor | None = None
        self._running: weakref.ref[Iterator[Batch]] | None = None  # weak: a loop left by break then ends its iteration at once
        self._consumed: torch.cuda.Event | None = None  # the consumer's work on the last batch served has read its views

    @property
    def resolution(self) -> int:
        return self._settings.resolution

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all view buffers, which are taken when the first epoch starts and held until `close`."""
        return self._slots * self.batch_size * self._settings.views * 3 * self._max_resolution**2

    def __len__(self) -> int:
        """Batches in an epoch."""
        share = len(self.samples) // self.world_size
        return share // self.batch_size if self.drop_last else -(-share // self.batch_size)

    def require_labels(self) -> None:
        """Raises UserError where the samples have no labels."""
        if self.beton.labels is None or (self.beton.labels[self.samples] < 0).any():
            raise UserError(f"{self.beton.path}: the online kNN needs labels, and this file lacks some; train without --data.validation")

    def set_epoch(self, epoch: int, resolution: int | None = None, magnitude: float = STANDARD_MAGNITUDE) -> None:
        """Choose what the next iteration serves. Ends an iteration that is under way."""
        self._stop()
        resolution = resolution or self.resolution
        if resolution > self._max_resolution:
            self._max_resolution, self._buffer = resolution, None
        self.epoch = epoch
        self._settings.set_epoch(epoch, resolution, magnitude)

    def __iter__(self) -> Iterator[Batch]:
        self._stop()
        batches = self._batches()
        self._running = weakref.ref(batches)
        return batches

    def close(self) -> None:
        """End the threads and free the buffers."""
        self._stop()
        self._pool.shutdown()
        self._buffer = None

    def __enter__(self) -> "ViewLoader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _stop(self) -> None:
        running = self._running() if self._running is not None else None
        if running is not None:
            running.close()

    def _batches(self) -> Iterator[Batch]:
        order = epoch_order(
            len(self.samples), seed=self.seed, epoch=self.epoch, shuffle=self.shuffle, rank=self.rank, world_size=self.world_size
        )
        order = self.samples[order]
        starts = deque(range(0, len(self) * self.batch_size, self.batch_size))
        slots = self._take_slots()
        under_way: deque[tuple[torch.Tensor, np.ndarray, list[Future]]] = deque()

        def start_batch(slot: int) -> None:
            indices = order[starts[0] : starts[0] + self.batch_size]
            starts.popleft()
            views = slots[slot][: len(indices)]
            tasks = [
                self._pool.submit(self._render, indices[i : i + SAMPLES_PER_TASK], views.numpy()[i : i + SAMPLES_PER_TASK], self._consumed)
                for i in range(0, len(indices), SAMPLES_PER_TASK)
            ]
            under_way.append((views, indices, tasks))

        try:
            for slot in range(min(len(slots) - 1, len(starts))):
                start_batch(slot)
            slot = len(slots) - 1
            while under_way:
                if starts:
                    start_batch(slot)
                    slot = (slot + 1) % len(slots)
                views, indices, tasks = under_way[0]
                for task in tasks:
                    task.result()
                under_way.popleft()
                labels = np.full(len(indices), -1) if self.beton.labels is None else self.beton.labels[indices]
                try:
                    yield Batch(views, torch.from_numpy(labels), torch.from_numpy(indices))
                finally:
                    if torch.cuda.is_initialized():
                        self._consumed = torch.cuda.Event()
                        self._consumed.record()
        finally:
            for _, _, tasks in under_way:
                for task in tasks:
                    task.cancel()
            for _, _, tasks in under_way:
                for task in tasks:
                    if not task.cancelled():
                        task.exception()  # waits: nobody may write into the buffers any more

    def _take_slots(self) -> torch.Tensor:
        if self._buffer is None:
            self._buffer = torch.empty(self.buffer_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        shape = (self._slots, self.batch_size, self._settings.views, 3, self.resolution, self.resolution)
        return self._buffer[: int(np.prod(shape))].view(shape)

    def _render(self, indices: np.ndarray, views: np.ndarray, after: "torch.cuda.Event | None") -> None:
        if after is not None:
            after.synchronize()
        try:
            render_samples(
                self._file, self.beton.pointers, self.beton.sizes, self.beton.images, indices,
                self._settings.counters, self._settings.policy_rows, self._settings.scaled_decoding, views,
            )  # fmt: skip
        except ValueError as error:
            raise UserError(
                f"{self.beton.path}: image {error.args[-1]} does not decode; write the file again, with --skip-broken to leave it out"
            ) from error
