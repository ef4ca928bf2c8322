"""Read the orientation from Exif, as JPEG, PNG, WebP and AVIF hold it. XMP's is not read.

An Exif block is a small TIFF file (Exif 2.3, section 4.5; TIFF 6.0, section 2). Some writers spread
it over several segments, repeat its prefix, or store the orientation as another kind of integer.
Other readers accept that, and so do we.
"""

import struct
from collections.abc import Sequence

PREFIX = b"Exif\0\0"
_ORIENTATION = 0x0112
# TIFF's types BYTE, SHORT, LONG and their signed forms, as struct formats.
_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}


def orientation(blocks: Sequence[bytes]) -> int:
    """Return the orientation, 1 to 8, that the first block with one states.

    Return 1, upright, if none states any or all are damaged.

    blocks: as they stand in the file, with PREFIX or without. A block may go on in the blocks that
        follow it.
    """
    blocks = [_without_prefix(block) for block in blocks]
    whole, begin = memoryview(b"".join(blocks)), 0
    for block in blocks:
        found = _read(whole[begin:])
        if found is not None:
            return found
        begin += len(block)
    return 1


def _without_prefix(block: bytes) -> bytes:
    while block.startswith(PREFIX):
        block = block[len(PREFIX) :]
    return block


def _read(tiff: memoryview) -> int | None:
    try:
        order = {b"II": "<", b"MM": ">"}[bytes(tiff[:2])]
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(order + "HHI", tiff, entry)
            if tag == _ORIENTATION and kind in _INTEGERS and count == 1:
                (value,) = struct.unpack_from(order + _INTEGERS[kind], tiff, entry + 8)
                if 1 <= value <= 8:
                    return value
    except (KeyError, struct.error):
        pass
    return None
