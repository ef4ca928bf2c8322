"""The images' bytes, read at the disk's speed in any order, without holding more memory than is
being read.
"""

import contextlib
import mmap
from pathlib import Path

import numpy as np

from ffssl.errors import UserError


class ImageFile:
    """A file mapped for reading in random order. data: uint8, the whole file.

    Left alone, the kernel answers every miss in the page cache with its whole read-ahead, up to
    megabytes around an image of 50 kB. So it is told to read nothing beyond what is asked for, and,
    by `prefetch`, what will be asked for.
    """

    def __init__(self, path: Path):
        self._path = path
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._map.madvise(mmap.MADV_RANDOM)
        self.data = np.frombuffer(self._map, np.uint8)

    def prefetch(self, begins: np.ndarray, sizes: np.ndarray) -> None:
        """Start reading these ranges (uint64) into the page cache, without waiting for them.

        Raises UserError if the file has been cut short since: to read what is gone would end the
        process by SIGBUS, which this prevents but for reads that are under way.
        """
        if self._map.size() < len(self._map):
            raise UserError(
                f"{self._path}: was cut short or written over while in use; put it back, "
                "and write new files under new names"
            )
        in_page = begins % np.uint64(mmap.PAGESIZE)
        for page, length in zip((begins - in_page).tolist(), (sizes + in_page).tolist()):
            self._map.madvise(mmap.MADV_WILLNEED, page, length)

    def release(self) -> None:
        """Take what has been read out of this process's memory.

        It stays in the page cache, and comes back from there when read again.

        All at once: every such call interrupts the other cores, which for each image by itself cost
        5 % of the views.
        """
        self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        self.data = np.empty(0, np.uint8)
        # Somebody, a traceback say, still holds the data, and the file is closed with that.
        with contextlib.suppress(BufferError):
            self._map.close()
