"""PNG files at the level of their chunks: find and drop the metadata.

Chunk layouts: PNG specification, third edition, section 11.
"""

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PIXELS, _TEXT, _COMPRESSED_TEXT, _EXIF = b"IDAT", b"tEXt", b"zTXt", b"eXIf"
# Chunks that no pixel depends on. Unknown chunks stay: the name of one may be damaged, and its
# checksum shows that.
_METADATA = frozenset(
    b"tEXt zTXt iTXt eXIf iCCP gAMA cHRM sRGB cICP mDCV cLLI sBIT bKGD hIST pHYs sPLT tIME".split()
)
# Keywords under which ImageMagick stored Exif before there was eXIf.
_PROFILES = (b"Raw profile type exif", b"Raw profile type APP1")
_MOST_PROFILE = 1 << 20  # bytes of text; the digits of 64 kB of Exif take an eighth


class PngError(ValueError):
    """The pixels are damaged."""


def is_png(data: bytes) -> bool:
    return data.startswith(SIGNATURE)


def without_metadata(data: bytes) -> tuple[bytes, list[bytes]]:
    """Return the file without its metadata, and its Exif blocks, see `exif.orientation`.

    Pillow is strict with metadata: it refuses an image for a text of a megabyte or for a wrong
    checksum. It does not check the pixels, so their checksums are checked here. A file that is cut
    off keeps what is left of it.

    Raises PngError for pixels with a wrong checksum.
    """
    kept, exif, profiles, start, position = [], [], [], 0, len(SIGNATURE)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            break
        if kind == _PIXELS:
            checksum = int.from_bytes(data[end - 4 : end], "big")
            if zlib.crc32(memoryview(data)[position + 4 : end - 4]) != checksum:
                raise PngError("pixels whose checksum is wrong")
        elif kind in _METADATA:
            kept.append(data[start:position])
            start = end
            if kind == _EXIF:
                exif.append(data[position + 8 : end - 4])
            elif kind in (_TEXT, _COMPRESSED_TEXT):
                profiles += _exif_profile(kind, data[position + 8 : end - 4])
        position = end
    return b"".join([*kept, data[start:]]) if start else data, exif + profiles


def _exif_profile(kind: bytes, payload: bytes) -> list[bytes]:
    """Read Exif that a text chunk holds as hexadecimal digits, after three lines of other text."""
    keyword, _, text = payload.partition(b"\0")
    if keyword not in _PROFILES:
        return []
    try:
        if kind == _COMPRESSED_TEXT:
            # The first byte names the method.
            text = zlib.decompressobj().decompress(text[1:], _MOST_PROFILE)
        return [bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))]
    except (ValueError, zlib.error):
        return []
