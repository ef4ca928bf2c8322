"""libjpeg-turbo, the library that ffcv links to, for the conversion and the kernels."""

import ctypes
import functools
import importlib.util
from pathlib import Path

# In Huffman-coded files: a block of 8 x 8 pixels of at least one component takes a bit or more.
MOST_PIXELS_PER_BYTE = 512


def _ffcv_library() -> Path:
    """Find ffcv's extension module without importing ffcv.

    A symbol looked up in it is also found in the libraries that it is linked to, libjpeg-turbo
    among them. Raises ImportError if there is no such module.
    """
    spec = importlib.util.find_spec("ffcv")
    folder = Path(spec.submodule_search_locations[0]) if spec else None
    paths = sorted([*folder.glob("_libffcv*"), *folder.parent.glob("_libffcv*")]) if folder else []
    if not paths:
        raise ImportError("ffcv's extension module _libffcv was not found; reinstall ffcv")
    return paths[0]


@functools.cache
def turbojpeg() -> ctypes.CDLL:
    """Load libjpeg-turbo through ffcv's library, which is linked to it.

    The package itself is not imported, since that takes seconds.
    """
    library = ctypes.CDLL(str(_ffcv_library()))
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
