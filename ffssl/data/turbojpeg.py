"""libjpeg-turbo, the one that ffcv links to: for the conversion and for the kernels."""

import ctypes
import functools
import importlib.util
from pathlib import Path

# Of Huffman-coded files: of some component each 8 x 8 pixels are a block, and a block takes a bit
# or more.
MOST_PIXELS_PER_BYTE = 512


def _ffcv_library() -> Path:
    """Ffcv's extension module, found without importing ffcv.

    Raises ImportError where there is none.

    Looking a name up in it also finds those of the libraries that it was linked to, libjpeg-turbo
    among them.
    """
    spec = importlib.util.find_spec("ffcv")
    folder = Path(spec.submodule_search_locations[0]) if spec else None
    paths = sorted([*folder.glob("_libffcv*"), *folder.parent.glob("_libffcv*")]) if folder else []
    if not paths:
        raise ImportError("ffcv's extension module _libffcv was not found; reinstall ffcv")
    return paths[0]


@functools.cache
def turbojpeg() -> ctypes.CDLL:
    """libjpeg-turbo by way of ffcv's library, which is linked to it, without importing the package,
    which takes seconds.
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
