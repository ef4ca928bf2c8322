"""What the converter reads from: an indexed collection of labelled images that can be sent to worker processes."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np

UNLABELLED = -1
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .avif .gif .bmp .tif .tiff .jp2 .j2k .jpx .ppm .pgm .pbm .pnm".split()
)
Image = bytes | np.ndarray


class Source(ABC):
    """Indexed images. Picklable: index what is large once, open files lazily, drop what is open on pickling.

    class_names: name of each label, or None where they are unknown. origin: where the images come from, for the record.
    """

    origin: str
    class_names: list[str] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call sample `index` in a message: its path where it has one."""

    @abstractmethod
    def load(self, index: int) -> tuple[Image, int]:
        """The image, as a file's bytes or uint8 pixels (height, width, 3), and its label or UNLABELLED.

        Raises OSError when the storage fails.
        """


class PackedStrings(Sequence):
    """A list of strings in two arrays. A million file names pickle in milliseconds rather than seconds a worker."""

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
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", text)]
