"""Sources of images, one module a kind.

Each module is imported when it is used, so that starting stays quick.
"""

from ffssl.data.convert.sources.base import UNLABELLED, Source

__all__ = ["UNLABELLED", "Source"]
