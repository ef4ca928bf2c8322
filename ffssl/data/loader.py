"""Views for a training loop, rendered by a pool of threads that never wait for one another.

loader = ViewLoader("train.beton", batch_size=256, views=2, resolution=224)
for epoch in range(100):
    loader.set_epoch(epoch, resolution=160, magnitude=4.5)
    for views, labels, indices in loader:     # uint8 (256, 2, 3, 160, 160)
        ...
"""

import inspect
import itertools
import math
import os
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from ffssl.data.beton.description import description_or_empty
from ffssl.data.beton.files import Files
from ffssl.data.beton.mapped import ImageFiles
from ffssl.data.beton.read import UNLABELLED, describe_fields
from ffssl.data.beton.several import read_betons
from ffssl.data.kernels.decode import render_samples
from ffssl.data.kernels.own_step import compile_view_kernel
from ffssl.data.memory import available_memory
from ffssl.data.order import epoch_order, rank_part
from ffssl.data.policy import STANDARD_MAGNITUDE, ViewPolicy, ViewSettings
from ffssl.errors import UserError
from ffssl.parallel.device import mark_work, wait_in_thread

# Small enough that the threads finish a batch together, large enough that starting a task costs
# nothing.
SAMPLES_PER_TASK = 8


class Batch(NamedTuple):
    """One batch of an epoch.

    views: uint8 (batch, views, 3, R, R). If the loader was made for several sizes, a tuple with
        such a tensor for each size.
    labels: int64 (batch,), UNLABELLED (-1) for a sample without one.
    indices: int64 (batch,), the samples' indices in the file; in several files, counted on from
        file to file, see `ViewLoader.beton.place`.
    """

    views: Any
    labels: torch.Tensor
    indices: torch.Tensor


class _BatchUnderWay(NamedTuple):
    """A batch that the threads are rendering.

    views: windows on the buffer, one a size. planned: the samples of the epoch's order. indices:
    the samples rendered; the threads put another one in the place of an image that does not decode.
    """

    views: tuple[torch.Tensor, ...]
    planned: np.ndarray
    indices: np.ndarray
    tasks: list[Future]


class ViewLoader:
    """Iterates over a beton file, or several as one, an epoch at a time.

    Which samples, in which batches:

    files: a beton file with an image field, or several: a sequence of paths, a text with commas
        between them, or a pattern ("train-*.beton"), see `beton_files` and `read_betons`. An epoch
        is one order of all their samples. A sample's number, on which its views depend, is its
        index in its file and the samples in the files before it.
    batch_size: samples in a batch of this rank.
    indices: the samples to visit; all by default.
    shuffle: draw a new order every epoch, from `seed` and epoch; it is the same on all ranks.
    drop_last: leave out the incomplete last batch.
    rank, world_size: this process's part of every epoch.
    label_field: the field served as labels, see `read_beton`. The loader warns if it is not given
        and several fields could be meant.
    broken: "stop" names an image that does not decode; "replace" serves another sample of the
        epoch in its place.

    Which views:

    views, resolution, policy, seed, scaled_decoding: see `ViewSettings`. `views=(2, 6),
        resolution=(224, 96)` are views of two sizes, from one decode.
    kernel: a function (view, key) of the user's own. Numba compiles it, and it changes every
        finished view in place, see `compile_view_kernel`.

    With which means:

    workers: threads; 0 for one per core.
    batches_ahead: batches in memory: the one being consumed and those rendered meanwhile. With 1
        nothing is rendered meanwhile.
    max_resolution: the largest resolution to expect, in the form of `resolution`, for which
        buffers are sized; `resolution` by default.
    loaders_here: loaders like this one on the machine, each of which takes as much memory.

    A batch's views are a window on a buffer that is reused. They hold until the next batch is
    asked for (on CUDA, until the work queued by then has read them).

    A loader serves one loop at a time. An iteration that another one has ended raises UserError
    when it is asked for a batch. In a forked process, as of torch's DataLoader, the loader works
    on its own; an iteration that was under way at the fork raises UserError there.

    An error in a thread is raised in the loop. Leaving the loop early stops the threads' work.

    Raises UserError for a file that can't be trained on, for an image that does not decode (with
    "replace", if no image decodes), and if there is not enough memory.
    """

    def __init__(
        self,
        files: Files,
        *,
        batch_size: int,
        views: int | Sequence[int],
        resolution: int | Sequence[int],
        policy: ViewPolicy | Sequence[ViewPolicy] | Sequence[Sequence[ViewPolicy]] = ViewPolicy(),
        max_resolution: int | Sequence[int] | None = None,
        indices: Sequence[int] | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        seed: int = 0,
        workers: int = 0,
        batches_ahead: int = 3,
        scaled_decoding: bool = True,
        kernel: Callable | None = None,
        rank: int = 0,
        world_size: int = 1,
        loaders_here: int = 1,
        broken: str = "stop",
        label_field: str | None = None,
    ):
        self.beton = read_betons(files, label_field)
        path = self.beton.name
        if self.beton.labels is None and self.beton.may_have_labels:
            fields = describe_fields(self.beton.fields)
            warnings.warn(
                f"{path}: no labels are served, since it is not clear which field holds them; "
                f"its fields: {fields}",
                stacklevel=2,
            )
        self.samples = (
            np.arange(len(self.beton)) if indices is None else self._checked_indices(indices)
        )

        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("batches_ahead", batches_ahead, 1),
            ("workers", workers, 0),
        ):
            if value < least:
                raise UserError(f"{path}: {name} is {value}, must be at least {least}")
        if not 0 <= rank < world_size:
            raise UserError(f"{path}: rank {rank} of {world_size}: must lie in 0..{world_size - 1}")
        if broken not in ("stop", "replace"):
            raise UserError(f"{path}: broken is {broken!r}, must be 'stop' or 'replace'")
        if len(self.samples) < world_size:
            raise UserError(
                f"{path}: {len(self.samples)} samples are fewer than the {world_size} processes; "
                "start fewer"
            )
        if drop_last and len(self.samples) // world_size < batch_size:
            each = f" on each of {world_size} processes" if world_size > 1 else ""
            raise UserError(
                f"{path}: {len(self.samples)} samples are fewer than one batch of "
                f"{batch_size}{each}; lower batch_size"
            )

        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        self.broken = broken
        self.epoch = 0
        self.first_batch = 0
        self.replaced = 0  # images in the batches served by the last iteration that did not decode
        self.workers = workers or len(os.sched_getaffinity(0))
        self.batches_ahead = batches_ahead

        self._settings = ViewSettings(views, resolution, policy, seed, scaled_decoding)
        self._max_sides = self._settings.by_size("max_resolution", max_resolution or resolution)
        if any(most < size.side for most, size in zip(self._max_sides, self._settings.sizes)):
            raise UserError(
                f"{path}: resolution {resolution} is more than max_resolution {max_resolution}"
            )
        self._kernel = compile_view_kernel(kernel) if kernel is not None else None
        self._start()
        self._require_memory(loaders_here)
        self._file = ImageFiles(self.beton.files)

    def _start(self) -> None:
        """Set up what belongs to one process.

        A forked process has no threads, and its copy of the buffers is unknown to the GPU.
        """
        self._process = os.getpid()
        self._pins = torch.cuda.is_available() and not torch.cuda._is_in_bad_fork()
        self._buffer: torch.Tensor | None = None
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="ffssl-views")
        # Weak, so that an iteration ends as soon as its loop is left by break.
        self._running: weakref.ref[_Iteration] | None = None
        # Reached once the consumer's work has read the views of the last batch served.
        self._consumed: torch.cuda.Event | None = None

    def __reduce__(self):
        raise UserError(
            f"{self.beton.name}: a ViewLoader can't be sent to another process; open one there"
        )

    @property
    def resolution(self) -> int | Sequence[int]:
        return self._settings.resolution

    @property
    def views(self) -> int | Sequence[int]:
        return self._settings.views

    @property
    def most_views(self) -> int | tuple[int, ...]:
        """Views of each image that the loader was made for; a number for each size."""
        most = self._settings.most_views
        return most if self._settings.several_sizes else most[0]

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all view buffers.

        They are taken when the first epoch starts and held until `close`.
        """
        pixels = sum(
            views * side**2 for views, side in zip(self._settings.most_views, self._max_sides)
        )
        needed = self.batches_ahead * self.batch_size * 3 * pixels
        # Torch pins memory by powers of two.
        return 1 << (needed - 1).bit_length() if self._pins else needed

    @property
    def memory_bytes(self) -> int:
        """Bytes that the loader holds at most.

        These are the view buffers and, in each thread, the largest image and one view's planes of
        floats.
        """
        images = self.beton.images
        largest = int((images["height"].astype(np.int64) * images["width"]).max())
        return self.buffer_bytes + self.workers * 3 * (largest + 4 * max(self._max_sides) ** 2)

    def describe_memory(self) -> str:
        """Say in one line how much memory the loader will hold."""
        batches = f"{self.batches_ahead} batches of {self.batch_size}"
        sizes = zip(self._settings.most_views, self._max_sides)
        views = " and ".join(f"{views} views at {side} px" for views, side in sizes)
        views = f"({views})" if self._settings.several_sizes else views
        scratch = f"{(self.memory_bytes - self.buffer_bytes) / 1e6:.0f} MB"
        return (
            f"the loader will hold {self.memory_bytes / 1e9:.2f} GB: {batches} x {views}, "
            f"and {scratch} for {self.workers} threads"
        )

    def __len__(self) -> int:
        """Batches in an epoch."""
        share = len(self.samples) // self.world_size
        return share // self.batch_size if self.drop_last else -(-share // self.batch_size)

    def set_epoch(
        self,
        epoch: int,
        resolution: int | Sequence[int] | None = None,
        magnitude: float = STANDARD_MAGNITUDE,
        *,
        views: int | Sequence[int] | None = None,
        first_batch: int = 0,
    ) -> None:
        """Choose what the next iteration serves, and end an iteration that is under way.

        An iteration that has served no batch yet is not under way: it serves the new epoch. Some
        frameworks, as Lightning, ask for the iterator before they announce the epoch.

        resolution: in pixels, one for each size; as before by default.
        magnitude: strength of the views, see `ViewPolicy`.
        views: how many of each image's views to serve, the first ones (of each size); as before by
            default, and at most as many as the loader was made for.
        first_batch: the batch of the epoch to begin with.
        """
        self._stop(begun_only=True)
        if not 0 <= first_batch <= len(self):
            raise UserError(
                f"{self.beton.name}: an epoch of {len(self)} batches can't begin at "
                f"batch {first_batch}"
            )
        resolution = self.resolution if resolution is None else resolution
        self._settings.set_epoch(
            epoch, resolution, self.views if views is None else views, magnitude
        )
        sides = (size.side for size in self._settings.sizes)
        self._max_sides = tuple(map(max, self._max_sides, sides))
        self.epoch, self.first_batch = epoch, first_batch

    def __iter__(self) -> Iterator[Batch]:
        self._stop()
        self.replaced = 0
        iteration = _Iteration(self._batches())
        self._running = weakref.ref(iteration)
        return iteration

    def close(self) -> None:
        """End the threads, free the buffers and close the file."""
        self._stop()  # in a forked process the threads are its own then, or none
        self._pool.shutdown()
        self._file.close()
        self._buffer = None

    def __enter__(self) -> "ViewLoader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _stop(self, begun_only: bool = False) -> None:
        if self._process != os.getpid():
            # Kept, since only CUDA can free pinned memory, and a fork can't call CUDA.
            self._of_parent = self._buffer
            self._start()
        running = self._running() if self._running is not None else None
        if running is not None and (running.begun or not begun_only):
            running.end()

    def _checked_indices(self, indices: Sequence[int]) -> np.ndarray:
        chosen, path, total = np.asarray(indices), self.beton.name, len(self.beton)
        if len(chosen) == 0:
            raise UserError(
                f"{path}: no indices given; leave them out to visit all {total} samples"
            )
        if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
            raise UserError(
                f"{path}: indices must be a list of integers, not of {chosen.dtype}; "
                "of a mask, take numpy.flatnonzero"
            )
        if not 0 <= chosen.min() <= chosen.max() < total:
            raise UserError(
                f"{path}: indices from {chosen.min()} to {chosen.max()}, "
                f"but it holds {total} samples"
            )
        return chosen.astype(np.int64)

    def _require_memory(self, loaders: int = 1) -> None:
        """Raise UserError unless there is memory for that many loaders like this one.

        None of them may have taken its buffers yet.
        """
        available = available_memory()
        if available is not None and loaders * self.memory_bytes > available:
            each = f" on each of {loaders} processes" if loaders > 1 else ""
            raise UserError(
                f"{self.beton.name}: {self.describe_memory()}{each}; "
                f"{available / 1e9:.2f} GB are available: "
                + self._what_saves_memory(available // loaders)
            )

    def _what_saves_memory(self, available: int) -> str:
        sizes = self.beton.images["height"].astype(np.int64) * self.beton.images["width"]
        index = int(sizes.argmax())
        if 2 * self.workers * 3 * int(sizes[index]) < self.memory_bytes:
            return "lower batch_size, views, batches_ahead or the largest resolution"
        width, height = (int(self.beton.images[side][index]) for side in ("width", "height"))
        path, place = self.beton.place(index)
        noted = description_or_empty(path).get("largest", {})
        is_it = (noted.get("width"), noted.get("height")) == (width, height)
        name = f" ({noted['name']})" if is_it else ""
        where = f"{place} of {path}" if len(self.beton.files) > 1 else place
        each = (self.memory_bytes - self.buffer_bytes) // self.workers
        threads = (available - self.buffer_bytes) // each
        fewer = f"lower workers to {threads}, or " if threads > 0 else ""
        return (
            f"image {where}{name} measures {width} x {height}, "
            f"which is {3 * width * height / 1e9:.2f} GB in each thread: "
            f"{fewer}write the file again with --max-side, or without this image"
        )

    def _batches(self) -> Iterator[Batch]:
        """Serve the epoch from a ring of buffers, rendered ahead of the consumer."""
        whole = self.samples[
            epoch_order(len(self.samples), seed=self.seed, epoch=self.epoch, shuffle=self.shuffle)
        ]
        order = rank_part(whole, self.rank, self.world_size)
        served = order.copy()  # the threads replace images that do not decode
        process = os.getpid()
        slots = self._take_slots()
        layout = self._settings.layout(self.batch_size)
        starts = iter(
            range(self.first_batch * self.batch_size, len(self) * self.batch_size, self.batch_size)
        )
        under_way: deque[_BatchUnderWay] = deque()

        def start_next(slot: torch.Tensor) -> None:
            start = next(starts, None)
            if start is not None:
                under_way.append(self._start_batch(slot, layout, whole, order, served, start))

        try:
            for slot in slots:
                start_next(slot)

            for slot in itertools.cycle(slots):
                if not under_way:
                    break
                batch = self._finished(under_way[0])
                under_way.popleft()
                try:
                    yield batch
                finally:
                    if torch.cuda.is_initialized():
                        self._consumed = mark_work()
                start_next(slot)
        finally:
            if process == os.getpid():  # tasks copied by a fork would never end
                _end_tasks([task for batch in under_way for task in batch.tasks])

    def _start_batch(
        self,
        slot: torch.Tensor,
        layout: np.ndarray,
        whole: np.ndarray,
        order: np.ndarray,
        served: np.ndarray,
        start: int,
    ) -> _BatchUnderWay:
        """Start rendering the batch that begins at order[start], into `slot`, uint8 (bytes,)."""
        planned = order[start : start + self.batch_size]
        indices = served[start : start + self.batch_size]
        views = tuple(views[: len(indices)] for views in self._by_size(slot))
        self._file.release()
        self._file.prefetch(self.beton.images["data_ptr"][indices], self.beton.image_sizes[indices])

        tasks = []
        for i in range(0, len(indices), SAMPLES_PER_TASK):
            part = slice(i, i + SAMPLES_PER_TASK)
            tasks.append(
                self._pool.submit(
                    self._render,
                    indices[part],
                    i,
                    slot,
                    layout,
                    self._consumed,
                    whole,
                    start + i,
                )
            )
        return _BatchUnderWay(views, planned, indices, tasks)

    def _finished(self, batch: _BatchUnderWay) -> Batch:
        """Wait for a batch; raise what went wrong in a thread."""
        for task in batch.tasks:
            task.result()
        indices = batch.indices
        self.replaced += int((indices != batch.planned).sum())
        if self.beton.labels is None:
            labels = np.full(len(indices), UNLABELLED)
        else:
            labels = self.beton.labels[indices]
        views = batch.views if self._settings.several_sizes else batch.views[0]
        return Batch(views, torch.from_numpy(labels), torch.from_numpy(indices))

    def _take_slots(self) -> torch.Tensor:
        if self._buffer is None or len(self._buffer) < self.buffer_bytes:
            self._buffer = None  # before a larger one is taken
            self._require_memory()
            self._buffer = torch.empty(self.buffer_bytes, dtype=torch.uint8, pin_memory=self._pins)
        bytes_of_batch = sum(map(math.prod, self._settings.shapes(self.batch_size)))
        return self._buffer[: self.batches_ahead * bytes_of_batch].view(-1, bytes_of_batch)

    def _by_size(self, slot: torch.Tensor) -> list[torch.Tensor]:
        """Return the windows on a batch's buffer, uint8 (batch, views, 3, R, R) of each size."""
        shapes = self._settings.shapes(self.batch_size)
        parts = slot.split([math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes)]

    def _render(
        self,
        indices: np.ndarray,
        position: int,
        slot: torch.Tensor,
        layout: np.ndarray,
        after: "torch.cuda.Event | None",
        whole: np.ndarray,
        start: int,
    ) -> None:
        """Render the views of the samples at `indices` into a batch's `slot`, in a thread.

        position: place of the first of them in the batch.
        layout: where the batch's views lie, see `ViewSettings.layout`.
        after: the event to wait for before `slot` may be written.
        whole: the order of all ranks, from which a broken image's substitute comes.
        start: position of the first of `indices` in this rank's part of that order.
        """
        if after is not None:
            wait_in_thread(after)
        done = attempts = 0
        while done < len(indices):
            try:
                render_samples(
                    self._file.data,
                    self.beton.pointers,
                    self.beton.sizes,
                    self.beton.images,
                    indices[done:],
                    self._settings.counters,
                    self._settings.policy_rows,
                    self._settings.scaled_decoding,
                    layout,
                    position + done,
                    slot.numpy(),
                )
                break
            except ValueError as error:
                broken = error.args[-1]
                at = done + int(np.flatnonzero(indices[done:] == broken)[0])
                attempts = attempts + 1 if at == done else 1
                if self.broken == "stop" or attempts > len(whole):
                    path, place = self.beton.place(int(broken))
                    raise UserError(
                        f"{path}: image {place} does not decode; to leave it out, "
                        "write the file again with --skip-broken and without --quick-check"
                    ) from error
                place = (start + at) * self.world_size + self.rank
                indices[at] = substitute(whole, place, attempts)
                done = at
        if self._kernel is not None:
            part = slice(position, position + len(indices))
            for size, views in zip(self._settings.sizes, self._by_size(slot)):
                self._kernel(self._settings.counters, indices, views.numpy()[part], size.first)


def substitute(order: np.ndarray, place: int, attempt: int) -> int:
    """Return the sample to serve instead of order[place], which does not decode.

    It is half an epoch away, so that no batch holds a sample twice.

    attempt: 1, 2, ... as long as the substitutes do not decode either. After len(order) attempts
    all samples have been tried.
    """
    return int(order[(place + len(order) // 2 + attempt - 1) % len(order)])


def _end_tasks(tasks: Sequence[Future]) -> None:
    """Cancel tasks and wait for those that run: nobody may write into the buffers any more."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        if not task.cancelled():
            task.exception()  # waits


class _Iteration:
    """An epoch under way.

    It raises UserError once the loader has ended it. Just stopping would look like the end of the
    epoch.
    """

    def __init__(self, batches: Generator[Batch]):
        self._batches = batches
        self._ended = False
        self._process = os.getpid()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._process != os.getpid():
            raise UserError(
                "this iteration of a ViewLoader belongs to the process that this one was forked "
                "from; begin another, by iter()"
            )
        if self._ended:
            raise UserError(
                "this iteration of a ViewLoader was ended by another one, by set_epoch or by "
                "close; a loader serves one loop at a time: open a second loader for a second loop"
            )
        return next(self._batches)

    @property
    def begun(self) -> bool:
        """Whether a batch has been asked for."""
        return inspect.getgeneratorstate(self._batches) != inspect.GEN_CREATED

    def close(self) -> None:
        """Leave the epoch early."""
        self._batches.close()

    def end(self) -> None:
        self._ended = self._ended or self._batches.gi_frame is not None
        self.close()
