"""Read the images' bytes in any order, at the disk's speed.

No more memory is held than is being read.
"""

import contextlib
import ctypes
import mmap
import os
from collections.abc import Sequence

import numpy as np

from ffssl.data.beton.read import BetonFile
from ffssl.errors import UserError

# mmap(2) itself, since Python's module can't map a file at a given address.
_mmap = ctypes.CDLL(None, use_errno=True).mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]
_MAP_FIXED = 0x10


class ImageFiles:
    """Beton files mapped for reading in random order, each at its place in one array.

    The kernels thus read several files as they read one.

    files: in ascending order of `start`, a multiple of the memory page.
    data: uint8. The bytes of a file begin at its `start`.

    By default Linux answers every miss in the page cache with its whole read-ahead, up to megabytes
    around an image of 50 kB. So we tell it to read only what is asked for, and `prefetch` tells it
    what will be asked for.

    Raises UserError for a file that can't be mapped.
    """

    def __init__(self, files: Sequence[BetonFile]):
        # Addresses for all of them. What no file takes stays without memory behind it.
        self._map = mmap.mmap(
            -1,
            files[-1].start + files[-1].size,
            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
            prot=mmap.PROT_READ,
        )
        self.data = np.frombuffer(self._map, np.uint8)
        self.data.setflags(write=False)
        self._files = [(os.path.abspath(file.path), file, self._place(file)) for file in files]
        self._starts = np.array([file.start for file in files], np.uint64)
        self._map.madvise(mmap.MADV_RANDOM)

    def _place(self, file: BetonFile) -> tuple[int, int]:
        """Map a file to its place. Return its device and its number there."""
        address, flags = self.data.ctypes.data + file.start, mmap.MAP_SHARED | _MAP_FIXED
        try:
            with open(file.path, "rb") as opened:
                number = opened.fileno()
                if _mmap(address, file.size, mmap.PROT_READ, flags, number, 0) != address:
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
                status = os.fstat(number)
        except OSError as error:
            raise UserError(
                f"{file.path}: cannot be read: {error.strerror}; check the file and its permissions"
            ) from error
        return status.st_dev, status.st_ino

    def prefetch(self, begins: np.ndarray, sizes: np.ndarray) -> None:
        """Start reading ranges of bytes into the page cache, without waiting for them.

        begins, sizes: uint64 (n,).

        Raises UserError if a file that is read has been cut short since it was opened. Reading past
        its new end would kill the process by SIGBUS. Only reads that are under way can still do so.
        """
        for place in np.unique(np.searchsorted(self._starts, begins, side="right") - 1).tolist():
            self._require_whole(*self._files[place])
        in_page = begins % np.uint64(mmap.PAGESIZE)
        for page, length in zip((begins - in_page).tolist(), (sizes + in_page).tolist()):
            self._map.madvise(mmap.MADV_WILLNEED, page, length)

    @staticmethod
    def _require_whole(path: str, file: BetonFile, identity: tuple[int, int]) -> None:
        try:
            status = os.stat(path)
        except OSError:
            return  # deleted: what is mapped stays
        if (status.st_dev, status.st_ino) == identity and status.st_size < file.size:
            raise UserError(
                f"{file.path}: was cut short or written over while in use; put it back, "
                "and write new files under new names"
            )

    def release(self) -> None:
        """Unmap from this process what has been read of the files.

        The bytes stay in the page cache, and come back from there when they are read again. One
        call serves all files, since every call interrupts the other cores: a call for each image
        cost 5 % of the views.
        """
        self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        self.data = np.empty(0, np.uint8)
        # BufferError: somebody, a traceback say, still holds the data. The files close with it.
        with contextlib.suppress(BufferError):
            self._map.close()
