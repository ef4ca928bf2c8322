"""libjpeg-turbo, which the conversion and the kernels decode JPEG files with."""

import contextlib
import ctypes
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from ffssl.errors import UserError

SONAME = "libturbojpeg.so.0"
# In Huffman-coded files: a block of 8 x 8 pixels of at least one component takes a bit or more.
MOST_PIXELS_PER_BYTE = 512


def _libraries() -> Iterator[str]:
    """Yield where libjpeg-turbo may be: bundled with ffcv, in the system, behind ffcv.

    ffcv is not imported, which takes seconds. Nor is its extension module loaded where another will
    do: that needs OpenCV. A symbol looked up in it is also found in the libraries that it is linked
    to, in places that only its builder knows.
    """
    spec = importlib.util.find_spec("ffcv")
    folders = [Path(folder) for folder in spec.submodule_search_locations] if spec else []
    for folder in folders:
        yield from map(str, sorted(folder.parent.glob("ffcv.libs/libturbojpeg-*.so*")))
    yield SONAME
    for folder in folders:
        yield from map(str, sorted([*folder.glob("_libffcv*"), *folder.parent.glob("_libffcv*")]))


@functools.cache
def turbojpeg() -> ctypes.CDLL:
    """Load libjpeg-turbo. Raise UserError, with what to install, if there is none."""
    for path in _libraries():
        with contextlib.suppress(OSError):
            return _declared(ctypes.CDLL(path))
    raise UserError(
        f"{SONAME} was not found; install libjpeg-turbo (Debian, Ubuntu: apt-get install "
        "libturbojpeg0-dev; conda: libjpeg-turbo of conda-forge)"
    )


def check_turbojpeg() -> None:
    """Raise UserError if the library is missing."""
    turbojpeg()


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Return the library with the types of the functions that are called by ctypes."""
    size, integer, handle = ctypes.c_ulong, ctypes.c_int, ctypes.c_void_p
    library.tjInitDecompress.restype = library.tjInitTransform.restype = handle
    library.tjDecompress2.argtypes = [handle, ctypes.c_char_p, size, handle] + [integer] * 5
    library.tjTransform.argtypes = (
        [handle, ctypes.c_char_p, size, integer] + [handle] * 3 + [integer]
    )
    library.tjFree.argtypes = library.tjDestroy.argtypes = library.tjGetErrorStr2.argtypes = [
        handle
    ]
    library.tjGetErrorStr2.restype = ctypes.c_char_p
    return library
