"""How the kernels are compiled: by Numba, without the GIL, cached on disk."""

import hashlib
import os
import stat
import sys
import tempfile
from pathlib import Path

import numba

_OPTIONS = {"nogil": True, "fastmath": True, "error_model": "numpy"}

# Also where NUMBA_DISABLE_JIT asks for Python instead: the kernels call functions of C, and would
# take hours.
numba.config.DISABLE_JIT = 0


def _cache_folder() -> Path | None:
    """Where Numba keeps what it compiles of this package: in NUMBA_CACHE_DIR, beside the sources,
    or in the user's cache. None if it can't.
    """
    try:
        return Path(numba.njit(cache=True)(lambda: None).stats.cache_path)
    except RuntimeError:
        return None


def _choose_cache_folder() -> Path | None:
    """The same, or where that can't be written to, a folder of the user's own under the temporary
    one, which is told when it is made.
    """
    if folder := _cache_folder():
        return folder
    can_not = (
        f"compiled code can be kept neither beside {Path(__file__).parent} nor in the user's cache"
    )
    try:
        own, made = _own_temporary_folder()
        # For the processes that this one starts, too.
        numba.config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"] = str(own)
        folder, told = _cache_folder(), f"it is kept in {own}"
    except OSError as error:
        made, told = (
            True,
            (
                f"nor under a temporary folder ({error.strerror}); each process compiles anew, "
                "for a minute"
            ),
        )
    if made or not folder:
        print(
            f"{can_not}: {told}; NUMBA_CACHE_DIR chooses another folder",
            file=sys.stderr,
            flush=True,
        )
    return folder


def _own_temporary_folder() -> tuple[Path, bool]:
    """The folder, and whether it had to be made.

    Raises OSError where it can't be, and where it is or may be changed by somebody else: to load
    compiled code is to run it.
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

    Numba looks only at the file of the function that it loads, so a kernel that another module has
    inlined would live on there in its old form. Caches that a concurrent process loses this way are
    compiled again.
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
        pass  # the caches are another user's, who drops them


_cache = _choose_cache_folder()
if _cache:
    _drop_stale_cache(_cache)

compiled = numba.njit(cache=_cache is not None, **_OPTIONS)
# For functions of other modules that call kernels: _drop_stale_cache knows only these modules'.
compiled_uncached = numba.njit(**_OPTIONS)
