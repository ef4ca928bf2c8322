"""FFCV's `.beton` files: reading, writing, mapping into memory."""

from ffssl.data.beton.read import Beton, read_beton

__all__ = ["Beton", "read_beton"]
