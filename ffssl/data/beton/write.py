"""Write beton files with the fields `image` and `label`.

A file is written in one pass, whole or not at all. The same samples give the same bytes.
"""

import errno
import hashlib
import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from ffssl.data.beton.read import (
    ALLOCATION_TYPE,
    FIELD_TYPE,
    HEADER_TYPE,
    IMAGE_FIELD,
    INT_FIELD,
    MAX_PAGE_SIZE,
    MIN_PAGE_SIZE,
    MODE_JPEG,
    MODE_RAW,
    VERSION,
    metadata_type,
)
from ffssl.errors import UserError
from ffssl.files import sync_folder

FIELDS = (("image", IMAGE_FIELD), ("label", INT_FIELD))
DEFAULT_PAGE_SIZE = 4 * MIN_PAGE_SIZE
MAX_SIDE = 65535  # width and height are stored in 16 bits


class BetonWriteError(UserError):
    """The file could not be written: a full disk, a size limit, a failing device."""


class BetonWriter:
    """Writes samples, in the order of `add`, to a beton file.

        with BetonWriter("train.beton", max_samples=1000) as writer:
            writer.add(jpeg_bytes, MODE_JPEG, width, height, label)

    path: the file to write. A hidden file beside it takes this name on a clean exit. If the block
        raises anything, KeyboardInterrupt included, the hidden file is removed and `path` stays as
        it was. The hidden file of a killed writer is removed by the next writer of that path.
    max_samples: room for the metadata of so many samples is reserved before the data. Fewer may be
        added.
    page_size: bytes, a power of two. Pages grow to hold a larger sample.

    Raises UserError for a path that cannot be written and BetonWriteError when writing fails.
    """

    def __init__(
        self, path: str | os.PathLike, max_samples: int, page_size: int = DEFAULT_PAGE_SIZE
    ):
        if not (MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE) or page_size & (page_size - 1):
            raise ValueError(
                f"page_size must be a power of two from {MIN_PAGE_SIZE} to "
                f"{MAX_PAGE_SIZE}: {page_size}"
            )
        self.path = Path(path)
        self.page_size = page_size
        self._rows = np.zeros(max_samples, metadata_type([type_id for _, type_id in FIELDS]))
        self._table = np.zeros(max_samples, ALLOCATION_TYPE)
        self._count = 0
        self._sha256: str | None = None
        metadata_end = HEADER_TYPE.itemsize + len(FIELDS) * FIELD_TYPE.itemsize + self._rows.nbytes
        self._position = _round_up(metadata_end, page_size)

    def __enter__(self) -> "BetonWriter":
        check_writable(self.path)
        _remove_stale_partials(self.path)
        self._partial = self.path.with_name(f"{_partial_prefix(self.path)}{os.getpid()}")
        with self._reporting_failures():
            self._file = open(self._partial, "wb")
            self._file.seek(self._position)
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        try:
            if exception_type is None:
                self.finish()
                with self._reporting_failures():
                    os.replace(self._partial, self.path)
                    sync_folder(self.path.parent)
        finally:
            with suppress(OSError):
                self._file.close()
            with suppress(FileNotFoundError):
                self._partial.unlink()

    def __len__(self) -> int:
        return self._count

    def add(self, image: bytes, mode: int, width: int, height: int, label: int) -> None:
        """Append one sample: the bytes of a JPEG file, or of uint8 pixels (height, width, 3)."""
        if (
            mode not in (MODE_JPEG, MODE_RAW)
            or not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE)
            or not image
        ):
            raise ValueError(
                f"sample {self._count}: mode {mode}, {width} x {height}, {len(image)} bytes"
            )
        if mode == MODE_RAW and len(image) != 3 * width * height:
            raise ValueError(
                f"sample {self._count}: {len(image)} bytes for {width} x {height} raw pixels"
            )
        if self._sha256 is not None:
            raise ValueError("the file is finished")
        if self._count == len(self._rows):
            raise ValueError(f"more samples than the {len(self._rows)} announced")
        pointer = self._allocate(len(image))
        with self._reporting_failures():
            if pointer != self._position:
                self._file.seek(pointer)  # skipped bytes read as zeros
            self._file.write(image)
        self._position = pointer + len(image)
        self._rows[self._count] = ((mode, width, height, pointer), label)
        self._table[self._count] = (self._count, pointer, len(image))
        self._count += 1

    def _allocate(self, size: int) -> int:
        """Return the next address at which `size` bytes lie within one page."""
        if size > MAX_PAGE_SIZE:
            raise ValueError(
                f"sample {self._count}: {size} bytes do not fit the largest page, {MAX_PAGE_SIZE}"
            )
        # Pages may grow midway: a sample within one page also lies within one page of any larger
        # power of two.
        while size > self.page_size:
            self.page_size *= 2
        room = self.page_size - self._position % self.page_size
        return self._position if size <= room else self._position + room

    def finish(self) -> str:
        """Complete the hidden file and return its sha256, in hexadecimal.

        Nothing can be added after that. Leaving the block calls this too. If it was called before,
        only the renaming is left.
        """
        if self._sha256 is None:
            self._write_tables()
            # The disk writes while the hash is computed.
            with (
                self._reporting_failures(),
                open(self._partial, "rb") as file,
                ThreadPoolExecutor(1) as pool,
            ):
                synced = pool.submit(os.fsync, self._file.fileno())
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                synced.result()
            self._sha256 = sha256
        return self._sha256

    def _write_tables(self) -> None:
        if self._count == 0:
            raise UserError(f"{self.path}: not written: there is no sample to put in it")
        header = np.zeros(1, HEADER_TYPE)
        header[0] = (VERSION, len(FIELDS), self.page_size, self._count, self._position)
        descriptors = np.zeros(len(FIELDS), FIELD_TYPE)
        for descriptor, (name, type_id) in zip(descriptors, FIELDS):
            descriptor["type_id"] = type_id
            descriptor["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
        with self._reporting_failures():
            self._file.write(self._table[: self._count].tobytes())
            self._file.seek(0)
            for part in (header, descriptors, self._rows[: self._count]):
                self._file.write(part.tobytes())
            self._file.flush()

    @contextmanager
    def _reporting_failures(self):
        try:
            yield
        except OSError as error:
            reason = error.strerror
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                free = shutil.disk_usage(self.path.parent).free
                reason = (
                    f"no space left ({free / 1e6:.0f} MB free); make room or choose another disk"
                )
            elif error.errno == errno.EFBIG:
                reason = "larger than the file system or `ulimit -f` allows"
            written = f"after {self._count} samples, {self._position / 1e6:.0f} MB"
            raise BetonWriteError(
                f"{self.path}: could not be written {written}: {reason}"
            ) from error


def check_writable(path: Path) -> None:
    """Raise UserError unless a file could be put at `path`."""
    if path.is_dir():
        raise UserError(
            f"{path}: is a folder; name the file to write, for example {path / 'train.beton'}"
        )
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is a device or the like, not a file; choose another name")
    if path.parent.exists() and not path.parent.is_dir():
        raise UserError(f"{path}: {path.parent} is a file, not a folder; choose another place")
    if not path.parent.is_dir():
        raise UserError(f"{path}: the folder {path.parent} does not exist; create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path}: the folder {path.parent} is not writable; choose another place")


def _round_up(position: int, page_size: int) -> int:
    return -(-position // page_size) * page_size


def _partial_prefix(path: Path) -> str:
    # A process id means something only on its host, and folders are shared between hosts.
    return f".{path.name}.partial-{socket.gethostname()}-"


def _remove_stale_partials(path: Path) -> None:
    prefix = _partial_prefix(path)
    for name in os.listdir(path.parent):
        pid = name.removeprefix(prefix)
        if name.startswith(prefix) and pid.isdecimal() and not _is_alive(int(pid)):
            with suppress(OSError):
                (path.parent / name).unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
