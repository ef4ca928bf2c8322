"""Images to beton files, beton files to views.

What a training loop needs, imported on first use: the loader brings torch and Numba, which take
seconds.

    from ffssl.data import ViewLoader, ViewPolicy

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
