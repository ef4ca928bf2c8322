"""What the converter reads from: an indexed collection of labelled images that can be sent to
worker processes.
"""

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
    """What a source leaves out, by kind: how many files, and the first of each kind by name.

    Its text is for a message: "2 .avif, 1 .heic, 3 without suffix".
    """

    def __init__(self):
        self._kinds: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, name: str, count: int = 1) -> None:
        """Count files of a kind; `name` is the first of them, or any of which there is but one."""
        before, first = self._kinds.get(kind, (0, name))
        self._kinds[kind] = before + count, min(first, name)

    def update(self, other: "PassedOver") -> None:
        for kind, count, first in other:
            self.add(kind, first, count)

    def __iter__(self) -> Iterator[tuple[str, int, str]]:
        """(kind, count, first name), by kind."""
        return ((kind, *self._kinds[kind]) for kind in sorted(self._kinds))

    @property
    def total(self) -> int:
        return sum(count for _, count, _ in self)

    def __str__(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count, _ in self)

    def only(self) -> str:
        """For a message about what is not there: what is."""
        return f", only {self}" if self._kinds else ""


def kind_of_name(name: str) -> str:
    """What a file left out is counted as: its suffix, where it has one that can be meant."""
    if name.startswith("."):
        return "hidden"
    suffix = os.path.splitext(name)[1].lower()
    if not suffix:
        return "without suffix"
    # Addresses and version numbers would make a kind of nearly every file.
    return (
        suffix if re.fullmatch(r"\.(?=.*[a-z])\w{1,8}", suffix, re.ASCII) else "with other suffixes"
    )


class Source(ABC):
    """Indexed images.

    Picklable: index what is large once, open files lazily, drop what is open on pickling.

    class_names: name of each label, or None where they are unknown. origin: where the images come
    from, for the record. passed_over: the files that were found, and are not among the images.
    """

    origin: str
    class_names: list[str] | None = None
    passed_over: PassedOver = PassedOver()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call sample `index` in a message: its path where it has one."""

    @abstractmethod
    def load(self, index: int) -> tuple[Image, int]:
        """The image, as a file's bytes or uint8 pixels (height, width, 3), and its label.

        A label is any int64, or UNLABELLED. Raises OSError when the storage fails.
        """


class PackedStrings(Sequence):
    """A list of strings in two arrays.

    A million file names pickle in milliseconds rather than seconds a worker.
    """

    def __init__(self, strings: Iterable[str]):
        encoded = [os.fsencode(string) for string in strings]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([len(item) for item in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]])


def natural_order(text: str) -> list[tuple[bool, int, str]]:
    """Sort key by which shard-9 comes before shard-10."""
    return [
        (part.isdecimal(), int(part) if part.isdecimal() else 0, part)
        for part in re.split(r"(\d+)", text)
    ]


def number_classes(names: Iterable[str | None]) -> tuple[list[str], np.ndarray]:
    """The different names, sorted, and the rank of each: int64, UNLABELLED for None."""
    names = list(names)
    class_names = sorted({name for name in names if name is not None})
    rank = {name: label for label, name in enumerate(class_names)} | {None: UNLABELLED}
    return class_names, np.array([rank[name] for name in names], np.int64)


def as_label(text: str) -> int | None:
    """The whole number of at most 64 bits that a text is, or None."""
    if not re.fullmatch(r"[+-]?[0-9]{1,19}", text.strip()) or not -(2**63) <= int(text) < 2**63:
        return None
    return int(text)
