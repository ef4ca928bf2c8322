"""Centre crops of the images of a beton file or of a folder, rendered in threads.

Crops of a folder are those of its beton file, bit for bit: the same code encodes and renders them.
"""

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ffssl.data.beton.description import description_or_empty, identity
from ffssl.data.beton.mapped import ImageFiles
from ffssl.data.beton.read import IMAGE_TYPE, UNLABELLED, read_beton
from ffssl.data.convert.encode import BrokenImage, EncodedImage, Encoding, encode_image
from ffssl.data.convert.sources.folder import ImageFolder
from ffssl.data.kernels.decode import render_samples
from ffssl.data.loader import SAMPLES_PER_TASK
from ffssl.data.policy import EVALUATION, ViewSettings
from ffssl.errors import UserError

# Batches that are rendered while one is being consumed.
AHEAD = 2
QUICK = Encoding(quick_check=True)


class Unreadable(ValueError):
    """An image can't be read. The message says why; it is to follow the image's name."""


class Images(ABC):
    """Indexed images.

    source: the file or the folder.
    labels: int64 (n,), UNLABELLED for an image without one; None if no image has one.
    class_names: of the labels, or None if they have no names.
    """

    source: Path
    labels: np.ndarray | None
    class_names: list[str] | None

    def __init__(self, resolution: int, scaled_decoding: bool):
        self.settings = ViewSettings(1, resolution, EVALUATION, 0, scaled_decoding)
        self._layout = self.settings.layout(1)  # each image is a batch of its own

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str | int:
        """Return what tells an image from others: its path in the folder, or its index."""

    @abstractmethod
    def described(self, index: int) -> str:
        """Return the image's name for a message."""

    @abstractmethod
    def identity(self) -> dict[str, object]:
        """Return what tells these images from others."""

    @abstractmethod
    def render(self, index: int, view: np.ndarray) -> None:
        """Write an image's centre crop into `view`, uint8 (1, 1, 3, R, R). Raise Unreadable."""

    @abstractmethod
    def prefetch(self, indices: range) -> None:
        """Start reading these images, where that helps."""

    @abstractmethod
    def close(self) -> None:
        """Release the files."""

    def _render(self, file, pointers, sizes, images, index: int, view: np.ndarray) -> bool:
        """Render one image; return whether it decodes. For the arguments see `render_samples`."""
        settings = self.settings
        try:
            render_samples(
                file,
                pointers,
                sizes,
                images,
                np.array([index]),
                settings.counters,
                settings.policy_rows,
                settings.scaled_decoding,
                self._layout,
                0,
                view.reshape(-1),
            )
        except ValueError:
            return False
        return True


class BetonImages(Images):
    """The images of a beton file. Raise UserError if the file can't be read."""

    def __init__(
        self, path: Path, resolution: int, scaled_decoding: bool, label_field: str | None = None
    ):
        super().__init__(resolution, scaled_decoding)
        self.source = path
        self._beton = read_beton(path, label_field)
        self._file = ImageFiles(self._beton.files)
        self.labels = self._beton.labels
        self.class_names = description_or_empty(path).get("class_names")

    def __len__(self) -> int:
        return len(self._beton)

    def name(self, index: int) -> int:
        return index

    def described(self, index: int) -> str:
        return f"{self.source}: image {index}"

    def identity(self) -> dict[str, object]:
        return identity(self._beton)

    def render(self, index: int, view: np.ndarray) -> None:
        beton = self._beton
        tables = beton.pointers, beton.sizes, beton.images
        if not self._render(self._file.data, *tables, index, view):
            raise Unreadable("does not decode")

    def prefetch(self, indices: range) -> None:
        part = slice(indices.start, indices.stop)
        self._file.release()
        self._file.prefetch(self._beton.images["data_ptr"][part], self._beton.image_sizes[part])

    def close(self) -> None:
        self._file.close()


class FolderImages(Images):
    """The images below a folder, see `ImageFolder`. Raise UserError as that does."""

    def __init__(self, folder: Path, resolution: int, scaled_decoding: bool, labels: bool = True):
        super().__init__(resolution, scaled_decoding)
        self.source = folder
        self._folder = ImageFolder(folder, labels)
        self.class_names = self._folder.class_names
        self.labels = self._folder.labels if self.class_names else None

    def __len__(self) -> int:
        return len(self._folder)

    def name(self, index: int) -> str:
        return self._folder.path(index)

    def described(self, index: int) -> str:
        return self._folder.name(index)

    def identity(self) -> dict[str, object]:
        return {"samples": len(self), "digest": self._folder.digest()}

    def render(self, index: int, view: np.ndarray) -> None:
        try:
            data, _ = self._folder.load(index)
        except OSError as error:
            raise Unreadable(f"can't be read: {error.strerror}") from error
        try:
            # Whether a JPEG that is kept decodes, the rendering finds.
            with_few_checks = encode_image(data, QUICK)
        except BrokenImage:
            with_few_checks = None
        if with_few_checks and self._render_encoded(with_few_checks, view):
            return
        try:
            encoded = encode_image(data, Encoding())  # mends it, or says what is wrong with it
        except BrokenImage as error:
            raise Unreadable(str(error)) from error
        if not self._render_encoded(encoded, view):
            raise Unreadable("does not decode")

    def prefetch(self, indices: range) -> None:
        pass  # the threads read whole files

    def close(self) -> None:
        pass

    def _render_encoded(self, image: EncodedImage, view: np.ndarray) -> bool:
        """Render an image as from a beton file that holds it alone."""
        # Of the types of such a file's tables, for which the kernels are compiled already.
        data = np.frombuffer(image.data, np.uint8)
        row = np.array([(image.mode, image.width, image.height, 0)], IMAGE_TYPE)
        pointers, sizes = np.array([0], np.uint64), np.array([len(data)], np.uint64)
        for table in (row, pointers, sizes):
            table.setflags(write=False)
        return self._render(data, pointers, sizes, row, 0, view)


def open_images(
    path: Path,
    resolution: int,
    scaled_decoding: bool,
    *,
    label_field: str | None = None,
    labels: bool = True,
) -> Images:
    """Return the images of a beton file or of a folder, without labels if so asked.

    Raise UserError if there are none, and for a label_field of a folder.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; name a beton file or a folder of images")
    if not path.is_dir():
        images = BetonImages(path, resolution, scaled_decoding, label_field)
        if not labels:
            images.labels = images.class_names = None
        return images
    if label_field:
        raise UserError(f"--label-field: {path} is a folder, whose class folders give the labels")
    return FolderImages(path, resolution, scaled_decoding, labels)


class CropBatch(NamedTuple):
    """The centre crops of some images.

    views: uint8 (b, 1, 3, R, R); that of an unreadable image holds anything.
    indices: of the images.
    unreadable: why, by index, of those that can't be read.
    """

    views: Tensor
    indices: range
    unreadable: dict[int, str]


class CropLoader:
    """Iterates over images in order, in batches, and renders the next batches meanwhile.

    first_batch: the batch to begin with. workers: threads; 0 for one per core. pin: whether views
    are in pinned memory, from which a GPU copies.
    """

    def __init__(
        self, images: Images, batch_size: int, *, first_batch: int, workers: int, pin: bool
    ):
        self._images, self._batch_size, self._pin = images, batch_size, pin
        self._starts = range(first_batch * batch_size, len(images), batch_size)
        self._workers = workers or len(os.sched_getaffinity(0))

    def __iter__(self) -> Iterator[tuple[Tensor, CropBatch, None]]:
        """Yield the views, and the batch they belong to, as `labelled_images` takes them."""
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="ffssl-crops")
        starts, under_way = iter(self._starts), deque()

        def start_next() -> None:
            start = next(starts, None)
            if start is not None:
                under_way.append(self._start(pool, start))

        try:
            for _ in range(1 + AHEAD):
                start_next()
            while under_way:
                batch, tasks = under_way.popleft()
                for task in tasks:
                    batch.unreadable.update(task.result())
                yield batch.views, batch, None
                start_next()
        finally:
            pool.shutdown(cancel_futures=True)

    def _start(self, pool: ThreadPoolExecutor, start: int) -> tuple[CropBatch, list]:
        indices = range(start, min(start + self._batch_size, len(self._images)))
        side = self._images.settings.resolution
        # Pinned memory is reused by torch, once the GPU has read it.
        shape = (len(indices), 1, 3, side, side)
        views = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin)
        self._images.prefetch(indices)
        tasks = [
            pool.submit(
                self._render, indices[i : i + SAMPLES_PER_TASK], views[i : i + SAMPLES_PER_TASK]
            )
            for i in range(0, len(indices), SAMPLES_PER_TASK)
        ]
        return CropBatch(views, indices, {}), tasks

    def _render(self, indices: range, views: Tensor) -> dict[int, str]:
        """Render some images in a thread; return why those can't be read that can't."""
        unreadable = {}
        for place, index in enumerate(indices):
            try:
                self._images.render(index, views[place : place + 1].numpy())
            except Unreadable as error:
                unreadable[index] = str(error)
        return unreadable


def labels_of(images: Images, indices: np.ndarray) -> np.ndarray:
    """Return the labels of images: int64 (n,), UNLABELLED where there is none."""
    if images.labels is None:
        return np.full(len(indices), UNLABELLED)
    return images.labels[indices]
