"""FFSSL: self-supervised pre-training of image encoders at less than half the cost.

The levers for a training loop of one's own, and what goes with them: docs/levers.md.

    from ffssl import FixedOneCycleLR, ProgressiveResolution, hardest_views

These names are imported on first use, since torch takes seconds to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers
    from ffssl.data.normalise import to_input as to_input
    from ffssl.encoder import load_backbone as load_backbone
    from ffssl.levers.hardest_views import hardest_views as hardest_views
    from ffssl.levers.one_cycle import FixedOneCycleLR as FixedOneCycleLR
    from ffssl.levers.progressive import ProgressiveMagnitude as ProgressiveMagnitude
    from ffssl.levers.progressive import ProgressiveResolution as ProgressiveResolution
    from ffssl.methods.barlow_twins import redundancy_reduction as redundancy_reduction
    from ffssl.methods.simclr import nt_xent as nt_xent
    from ffssl.methods.vicreg import vicreg as vicreg

__version__ = "0.2.0"

_MODULES = {
    "FixedOneCycleLR": "levers.one_cycle",
    "ProgressiveMagnitude": "levers.progressive",
    "ProgressiveResolution": "levers.progressive",
    "hardest_views": "levers.hardest_views",
    "load_backbone": "encoder",
    "nt_xent": "methods.simclr",
    "redundancy_reduction": "methods.barlow_twins",
    "to_input": "data.normalise",
    "vicreg": "methods.vicreg",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
