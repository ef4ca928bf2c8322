"""The interface of a source: indexed, labelled images that can be sent to worker processes."""

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ffssl.data.beton.read import UNLABELLED

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .avif .gif .bmp .tif .tiff .jp2 .j2k .jpx "
    ".ppm .pgm .pbm .pnm".split()
)
Image = bytes | np.ndarray


class PassedOver:
    """Count the files that a source leaves out, by kind, and keep the first name of each kind.

    str() gives text for a message: "2 .avif, 1 .heic, 3 without suffix".
    """

    def __init__(self):
        self._kinds: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, name: str, count: int = 1) -> None:
        """Count files of a kind. name: of the file, or of the first of several."""
        before, first = self._kinds.get(kind, (0, name))
        self._kinds[kind] = before + count, min(first, name)

    def update(self, other: "PassedOver") -> None:
        for kind, count, first in other:
            self.add(kind, first, count)

    def __iter__(self) -> Iterator[tuple[str, int, str]]:
        """Yield (kind, count, first name), sorted by kind."""
        return ((kind, *self._kinds[kind]) for kind in sorted(self._kinds))

    @property
    def total(self) -> int:
        return sum(count for _, count, _ in self)

    def __str__(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count, _ in self)

    def only(self) -> str:
        """Return text for a message on missing files, that only these files are there."""
        return f", only {self}" if self._kinds else ""


def kind_of_name(name: str) -> str:
    """Return the kind that a file left out is counted as: its suffix, if it has a real one."""
    if name.startswith("."):
        return "hidden"
    suffix = os.path.splitext(name)[1].lower()
    if not suffix:
        return "without suffix"
    # Addresses and version numbers would otherwise make nearly every file a kind of its own.
    is_real = re.fullmatch(r"\.(?=.*[a-z])\w{1,8}", suffix, re.ASCII)
    return suffix if is_real else "with other suffixes"


class Source(ABC):
    """Indexed images.

    A source must be picklable: index what is large once, open files lazily, drop open files on
    pickling.

    origin: where the images come from, for the record.
    class_names: name of each label, or None if the names are unknown.
    passed_over: the files that were found but are not among the images.
    """

    origin: str
    class_names: list[str] | None = None
    passed_over: PassedOver = PassedOver()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the name of sample `index` in messages: its path if it has one."""

    @abstractmethod
    def load(self, index: int) -> tuple[Image, int]:
        """Return the image, as a file's bytes or uint8 pixels (height, width, 3), and its label.

        A label is any int64, or UNLABELLED (-1). Raises OSError when the storage fails.
        """


class PackedStrings(Sequence):
    """A list of strings in two arrays.

    A million file names are pickled in milliseconds a worker, rather than seconds.
    """

    def __init__(self, strings: Iterable[str]):
        encoded = [os.fsencode(string) for string in strings]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([len(item) for item in encoded], dtype=np.int64)

    def digest(self) -> str:
        """Return 16 hexadecimal digits that tell these strings from others."""
        digest = hashlib.sha256(self._bytes)
        digest.update(self._ends.tobytes())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]])


def number_classes(names: Iterable[str | None]) -> tuple[list[str], np.ndarray]:
    """Return the different names, sorted, and each name's rank: int64, UNLABELLED for None."""
    names = list(names)
    class_names = sorted({name for name in names if name is not None})
    rank = {name: label for label, name in enumerate(class_names)} | {None: UNLABELLED}
    return class_names, np.array([rank[name] for name in names], np.int64)


def as_label(text: str) -> int | None:
    """Return the text as a whole number of at most 64 bits, or None if it is none."""
    if not re.fullmatch(r"[+-]?[0-9]{1,19}", text.strip()) or not -(2**63) <= int(text) < 2**63:
        return None
    return int(text)
