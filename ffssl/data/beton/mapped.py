"""Read the images' bytes in any order, at the disk's speed.

No more memory is held than is being read.
"""

import contextlib
import mmap
from pathlib import Path

import numpy as np

from ffssl.errors import UserError


class ImageFile:
    """A file mapped for reading in random order.

    data: uint8, the whole file.

    By default Linux answers every miss in the page cache with its whole read-ahead, up to megabytes
    around an image of 50 kB. So we tell it to read only what is asked for, and `prefetch` tells it
    what will be asked for.
    """

    def __init__(self, path: Path):
        self._path = path
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._map.madvise(mmap.MADV_RANDOM)
        self.data = np.frombuffer(self._map, np.uint8)

    def prefetch(self, begins: np.ndarray, sizes: np.ndarray) -> None:
        """Start reading ranges of bytes into the page cache, without waiting for them.

        begins, sizes: uint64 (n,).

        Raises UserError if the file has been cut short since it was opened. Reading past its new
        end would kill the process by SIGBUS. Only reads that are under way can still do so.
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
        """Unmap from this process what has been read of the whole file.

        The bytes stay in the page cache, and come back from there when they are read again. One
        call serves the whole file, since every call interrupts the other cores: a call for each
        image cost 5 % of the views.
        """
        self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        self.data = np.empty(0, np.uint8)
        # BufferError: somebody, a traceback say, still holds the data. The file closes with it.
        with contextlib.suppress(BufferError):
            self._map.close()
