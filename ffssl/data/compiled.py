"""How the kernels are compiled: by Numba, without the GIL, cached on disk."""

import hashlib
from pathlib import Path

from numba import njit

_MODULES = ("compiled.py", "lanes.py", "kernels.py", "rand_augment.py", "policy.py", "render.py", "decoder.py")

_OPTIONS = {"nogil": True, "fastmath": True, "error_model": "numpy"}

compiled = njit(cache=True, **_OPTIONS)
compiled_uncached = njit(**_OPTIONS)  # for functions of other modules that call kernels: _drop_stale_cache knows only these modules'


def _drop_stale_cache() -> None:
    """Delete the compiled files if any kernel module has changed.

    Numba looks only at the file of the function that it loads, so a kernel that another module has inlined would live on there
    in its old form. Caches that a concurrent process loses this way are compiled again.
    """
    folder = Path(__file__).parent
    cache = Path(compiled(lambda: None).stats.cache_path)  # beside the sources, in NUMBA_CACHE_DIR, or the user's if those can't be written
    digest = hashlib.sha256(b"".join((folder / name).read_bytes() for name in _MODULES)).hexdigest()
    stamp = cache / "kernels.sha256"
    try:
        if stamp.exists() and stamp.read_text() == digest:
            return
        for name in _MODULES:
            for file in cache.glob(f"{Path(name).stem}.*.nb[ci]"):
                file.unlink(missing_ok=True)
        cache.mkdir(parents=True, exist_ok=True)
        stamp.write_text(digest)
    except OSError:
        pass  # the caches are another user's, who drops them


_drop_stale_cache()
