"""Images to beton files. What a program needs is imported on first use.

from ffssl.data.convert import ConvertOptions, convert
from ffssl.data.convert.sources.folder import ImageFolder

convert(ImageFolder("photos"), "photos.beton", ConvertOptions(workers=4))
"""

import importlib

__all__ = ["ConversionError", "ConvertOptions", "convert"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.conversion"), name)
