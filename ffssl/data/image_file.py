"""The images' bytes, read at the disk's speed in any order, without holding more memory than is being read."""

import mmap
from pathlib import Path

import numpy as np


class ImageFile:
    """A file mapped for reading in random order. data: uint8, the whole file.

    Left alone, the kernel answers every miss in the page cache with its whole read-ahead, up to megabytes around an image of 50 kB.
    So it is told to read nothing beyond what is asked for, and, by `prefetch`, what will be asked for.
    """

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._map.madvise(mmap.MADV_RANDOM)
        self.data = np.frombuffer(self._map, np.uint8)

    def prefetch(self, begins: np.ndarray, sizes: np.ndarray) -> None:
        """Start reading these ranges into the page cache, without waiting for them."""
        pages = begins & ~np.uint64(mmap.PAGESIZE - 1)
        for page, length in zip(pages.tolist(), (begins - pages + sizes).tolist()):
            self._map.madvise(mmap.MADV_WILLNEED, page, length)

    def release(self) -> None:
        """Take the pages read so far out of this process's memory. They stay in the page cache, from where they come back at once."""
        self._map.madvise(mmap.MADV_DONTNEED)
