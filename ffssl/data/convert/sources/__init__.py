"""Where images come from: one module a kind of source, each imported when used, so that starting
stays quick.
"""

from ffssl.data.convert.sources.base import UNLABELLED, Source

__all__ = ["UNLABELLED", "Source"]
