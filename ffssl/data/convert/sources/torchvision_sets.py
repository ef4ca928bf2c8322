"""Imagenette, CIFAR-10 and STL-10, downloaded by torchvision if they are missing.

They are read without torchvision. Importing it would cost every worker seconds, and its STL-10
holds 2.7 GB in memory.
"""

import contextlib
import functools
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import numpy as np

from ffssl.data.convert.sources.base import UNLABELLED, Source
from ffssl.data.convert.sources.folder import ImageFolder
from ffssl.errors import UserError

_IMAGENETTE_FOLDERS = {
    "full": "imagenette2",
    "320px": "imagenette2-320",
    "160px": "imagenette2-160",
}


class Imagenette(ImageFolder):
    """Imagenette's `split` ("train", "val") in one `size` ("full", "320px", "160px").

    Class names are WordNet ids.
    """

    def __init__(self, root: str | os.PathLike, split: str, size: str = "full"):
        folder = Path(root) / _IMAGENETTE_FOLDERS[size]
        if not folder.is_dir():
            # torchvision extracts in place. After an interruption it would take the part that is
            # there for the whole.
            with (
                _downloading(root, "Imagenette", folder) as datasets,
                TemporaryDirectory(dir=root, prefix=f".{folder.name}-") as partial,
            ):
                url, md5 = datasets.Imagenette._ARCHIVES[size]
                datasets.utils.download_and_extract_archive(url, str(root), partial, md5=md5)
                os.replace(Path(partial, folder.name), folder)
        super().__init__(folder / split)


class Cifar10(Source):
    """CIFAR-10's `split` ("train", "test"), 32x32 pixels."""

    def __init__(self, root: str | os.PathLike, split: str):
        self.folder = Path(root) / "cifar-10-batches-py"
        if not self.folder.is_dir():
            with _downloading(root, "CIFAR10", self.folder) as datasets:
                datasets.CIFAR10(str(root), train=split == "train", download=True)
        self.origin = f"{self.folder}, {split}"
        self._batches = (
            [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
        )
        self.class_names = list(_unpickled(self.folder / "batches.meta")["label_names"])
        self._labels = np.concatenate(
            [np.array(_unpickled(self.folder / name)["labels"], np.int64) for name in self._batches]
        )

    def __len__(self) -> int:
        return len(self._labels)

    def name(self, index: int) -> str:
        return f"{self.folder}, sample {index}"

    def load(self, index: int) -> tuple[np.ndarray, int]:
        pixels = _cifar_pixels(self.folder, tuple(self._batches))[index]
        return pixels.transpose(1, 2, 0), int(self._labels[index])


@functools.lru_cache(maxsize=1)
def _cifar_pixels(folder: Path, batches: tuple[str, ...]) -> np.ndarray:
    """Read the pixels, once a process: uint8 (n, 3, 32, 32)."""
    pixels = np.concatenate([_unpickled(folder / name)["data"] for name in batches])
    return pixels.reshape(-1, 3, 32, 32)


def _unpickled(path: Path) -> dict:
    try:
        with open(path, "rb") as file:
            return pickle.load(file, encoding="latin1")
    except (OSError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(
            f"{path}: not a sound CIFAR-10 file ({error}); remove its folder to download it again"
        ) from error


class Stl10(Source):
    """STL-10's `split` ("train", "test", "unlabeled", "train+unlabeled"), 96x96 pixels."""

    _FILES = {
        "train": ["train"],
        "test": ["test"],
        "unlabeled": ["unlabeled"],
        "train+unlabeled": ["train", "unlabeled"],
    }
    _IMAGE_BYTES = 3 * 96 * 96

    def __init__(self, root: str | os.PathLike, split: str):
        self.folder = Path(root) / "stl10_binary"
        if not self.folder.is_dir():
            with _downloading(root, "STL10", self.folder) as datasets:
                datasets.STL10(str(root), split=split, download=True)
        self.origin = f"{self.folder}, {split}"
        try:
            self.class_names = (self.folder / "class_names.txt").read_text().split()
            parts = [self._read_part(name) for name in self._FILES[split]]
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.folder}: not a sound STL-10 folder ({error}); "
                "remove it to download it again"
            ) from error
        self._labels = np.concatenate([labels for _, labels in parts])
        self._places = [path for path, labels in parts for _ in labels]
        self._offsets = np.concatenate(
            [np.arange(len(labels)) * self._IMAGE_BYTES for _, labels in parts]
        )

    def _read_part(self, name: str) -> tuple[str, np.ndarray]:
        path = self.folder / f"{name}_X.bin"
        count, rest = divmod(path.stat().st_size, self._IMAGE_BYTES)
        if rest:
            raise ValueError(f"{path.name} is cut short")
        if name == "unlabeled":
            return str(path), np.full(count, UNLABELLED, np.int64)
        # The file counts from 1 to 10.
        labels = np.fromfile(self.folder / f"{name}_y.bin", np.uint8).astype(np.int64) - 1
        if len(labels) != count:
            raise ValueError(f"{len(labels)} labels for {count} images of {path.name}")
        return str(path), labels

    def __len__(self) -> int:
        return len(self._labels)

    def name(self, index: int) -> str:
        return f"{self._places[index]}, byte {self._offsets[index]}"

    def load(self, index: int) -> tuple[np.ndarray, int]:
        pixels = np.fromfile(
            self._places[index], np.uint8, self._IMAGE_BYTES, offset=int(self._offsets[index])
        )
        # Stored channel by channel, each column by column.
        return pixels.reshape(3, 96, 96).transpose(2, 1, 0), int(self._labels[index])


@contextlib.contextmanager
def _downloading(root: str | os.PathLike, dataset: str, folder: Path) -> Iterator[ModuleType]:
    """Yield torchvision.datasets, with which the block downloads what belongs in `folder`.

    Raises UserError if the download fails.
    """
    if not Path(root).is_dir():
        raise UserError(f"{root}: no such folder; create it, and {dataset} is downloaded into it")
    from torchvision import datasets

    try:
        yield datasets
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{folder}: not there, and downloading {dataset} failed ({error}); "
            "put it there yourself"
        ) from error
