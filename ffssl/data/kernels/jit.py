"""Compile the kernels: by Numba, without the GIL, cached on disk."""

import hashlib
import os
import stat
import sys
import tempfile
from pathlib import Path

import numba

_OPTIONS = {"nogil": True, "fastmath": True, "error_model": "numpy"}

# Even if NUMBA_DISABLE_JIT asks for plain Python: the kernels call C functions, and would take
# hours.
numba.config.DISABLE_JIT = 0


def _cache_folder() -> Path | None:
    """Return the folder in which Numba caches this package's code, or None if there is none.

    It is NUMBA_CACHE_DIR, a folder beside the sources, or one in the user's cache.
    """
    try:
        return Path(numba.njit(cache=True)(lambda: None).stats.cache_path)
    except RuntimeError:
        return None


def _choose_cache_folder() -> Path | None:
    """Return Numba's own cache folder, or a temporary one if that can't be written to.

    The temporary folder belongs to the user. A message on stderr names it when it is made.
    """
    if folder := _cache_folder():
        return folder
    can_not = (
        f"compiled code can be kept neither beside {Path(__file__).parent} nor in the user's cache"
    )
    try:
        own, made = _own_temporary_folder()
        # In the environment as well, for the processes that this one starts.
        numba.config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"] = str(own)
        folder, told = _cache_folder(), f"it is kept in {own}"
    except OSError as error:
        made = True
        told = (
            f"nor under a temporary folder ({error.strerror}); each process compiles anew, "
            "for a minute"
        )
    if made or not folder:
        message = f"{can_not}: {told}; NUMBA_CACHE_DIR chooses another folder"
        print(message, file=sys.stderr, flush=True)
    return folder


def _own_temporary_folder() -> tuple[Path, bool]:
    """Return the user's folder under the temporary one, and whether it had to be made.

    Raises OSError if it can't be made, or if somebody else owns it or may write to it: loading
    compiled code means running it.
    """
    folder = Path(tempfile.gettempdir()) / f"ffssl-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700)
        return folder, True
    except FileExistsError:
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise PermissionError(0, f"{folder} is not this user's alone") from None
        return folder, False


def _drop_stale_cache(cache: Path) -> None:
    """Delete the compiled files if any kernel module has changed.

    Numba looks only at the file of the function that it loads. So a kernel that another module has
    inlined would live on there in its old form. If a concurrent process loses its cache this way,
    it compiles again.
    """
    folder = Path(__file__).parent
    sources = sorted(folder.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    stamp = cache / "kernels.sha256"
    try:
        if stamp.exists() and stamp.read_text() == digest:
            return
        for path in sources:
            for file in cache.glob(f"{path.stem}.*.nb[ci]"):
                file.unlink(missing_ok=True)
        cache.mkdir(parents=True, exist_ok=True)
        stamp.write_text(digest)
    except OSError:
        pass  # the cache is another user's, whose own processes drop it


_cache = _choose_cache_folder()
if _cache:
    _drop_stale_cache(_cache)

compiled = numba.njit(cache=_cache is not None, **_OPTIONS)
# For functions of other modules that call kernels: _drop_stale_cache knows only this folder.
compiled_uncached = numba.njit(**_OPTIONS)
