"""Images to beton files, beton files to views.

    from ffssl.data import ViewLoader, ViewPolicy

These names are imported on first use, since the loader imports torch and Numba, which takes
seconds.

docs/loader.md shows how to use it.
"""

import importlib

_MODULES = {
    "ViewLoader": "loader",
    "Batch": "loader",
    "ViewPolicy": "policy",
    "POLICIES": "policy",
    "EVALUATION": "policy",
    "choose_policies": "policy",
    "uniform": "kernels.draw",
    "read_beton": "beton.read",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
