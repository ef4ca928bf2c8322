"""JPEG files at the level of their bytes: headers, whether the data decodes, lossless progressive to baseline.

The decoder is the libjpeg-turbo that ffcv links to, so that what passes here decodes there; it is called through
ctypes, without importing ffcv. Marker codes and layouts: ITU-T T.81, annex B; Exif 2.3, section 4.6.
"""

import contextlib
import ctypes
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ffssl.data.turbojpeg import turbojpeg

BASELINE, EXTENDED, PROGRESSIVE = 0xC0, 0xC1, 0xC2
_FRAME_MARKERS = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # without DHT, JPG, DAC
_STANDALONE_MARKERS = {0x01, *range(0xD0, 0xD9)}
_START_OF_SCAN, _END_OF_IMAGE, _APP1 = 0xDA, 0xD9, 0xE1
# Any but those that occur within a scan: stuffed zeros, restarts, fill bytes.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
_ORIENTATION_TAG, _SHORT = 0x0112, 3
MOST_PIXELS_PER_BYTE = 512  # of Huffman-coded files: of some component each 8 x 8 pixels are a block, and a block takes a bit or more


class JpegError(ValueError):
    """The bytes are not a whole, sound JPEG file. The message says why."""


class UnsupportedJpeg(JpegError):
    """A sound file, of a kind that turbojpeg does not transform."""


@dataclass(frozen=True)
class JpegHeader:
    """What the markers before the first scan say. `process` is the frame marker: BASELINE, EXTENDED, PROGRESSIVE..."""

    width: int
    height: int
    components: int
    precision: int
    process: int
    orientation: int

    @property
    def decodes_to_rgb(self) -> bool:
        """Whether libjpeg-turbo decodes it to 8-bit RGB by itself: YCbCr, RGB or grey, Huffman-coded."""
        return self.precision == 8 and self.components in (1, 3) and self.process in (BASELINE, EXTENDED, PROGRESSIVE)


def is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def parse_header(data: bytes) -> JpegHeader:
    """Read the markers up to the first scan. Raises JpegError when they are cut short or make no sense, a size beyond the data's included."""
    if not is_jpeg(data):
        raise JpegError("does not begin like a JPEG file")
    frame, orientation = None, 1
    try:
        position = 2
        while True:
            position = data.index(b"\xff", position)
            while data[position] == 0xFF:  # a marker may be preceded by any number of fill bytes
                position += 1
            marker = data[position]
            position += 1
            if marker == _END_OF_IMAGE:
                raise JpegError("ends before its first scan")
            if marker == 0 or marker in _STANDALONE_MARKERS:
                continue
            (length,) = struct.unpack_from(">H", data, position)
            segment = data[position + 2 : position + length]
            if length < 2 or len(segment) != length - 2:
                raise JpegError("has a cut header")
            position += length
            if marker in _FRAME_MARKERS:
                frame = (marker, *struct.unpack_from(">BHHB", segment))
            elif marker == _APP1 and segment.startswith(b"Exif\0\0"):
                orientation = _exif_orientation(segment[6:])
            elif marker == _START_OF_SCAN:
                break
    except (ValueError, IndexError, struct.error) as error:
        raise error if isinstance(error, JpegError) else JpegError("has a cut header") from error
    if frame is None:
        raise JpegError("has a scan before its frame header")
    process, precision, height, width, components = frame
    if width == 0 or height == 0:
        raise JpegError("has no width or no height")
    if process in (BASELINE, EXTENDED, PROGRESSIVE) and width * height > MOST_PIXELS_PER_BYTE * len(data):
        raise JpegError(f"claims {width} x {height} pixels, more than {len(data)} bytes can hold")
    return JpegHeader(width, height, components, precision, process, orientation)


def _exif_orientation(tiff: bytes) -> int:
    """Exif orientation, 1 to 8. Damaged Exif is common in the wild and counts as upright."""
    try:
        order = {b"II": "<", b"MM": ">"}[tiff[:2]]
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for i in range(entries):
            tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * i)
            if tag == _ORIENTATION_TAG and kind == _SHORT and count == 1 and 1 <= value <= 8:
                return value
    except (KeyError, struct.error):
        pass
    return 1


def verify(data: bytes, header: JpegHeader) -> None:
    """Decode all of the entropy-coded data, at 1/8 scale and in grey, which costs little more than the Huffman codes.

    Raises JpegError for any error or warning: cut off, corrupt, or with data left over.
    """
    _decompress(data, header, _TJPF_CMYK if header.components == 4 else _TJPF_GRAY, 8)


def verify_markers(data: bytes) -> None:
    """Follow the markers from the first scan to the end of the image, at a tenth of the cost of `verify`.

    Raises JpegError for a file that is cut off or overwritten with something else; flipped bits go unnoticed.
    """
    position = 2
    while True:
        found = _MARKER.search(data, position)
        if found is None:
            raise JpegError("ends before its end-of-image marker")
        position = found.end()
        if found[0][-1] == _END_OF_IMAGE:
            return
        if len(data) < position + 2:
            raise JpegError("has a cut header")
        position += struct.unpack_from(">H", data, position)[0]


def decode(data: bytes, header: JpegHeader, denominator: int = 1) -> np.ndarray:
    """Decode at scale 1/denominator (1, 2, 4 or 8) to uint8 (ceil(height / denominator), ceil(width / ...), 3), RGB.

    The Exif orientation is not applied. Raises JpegError as `verify` does; `header.decodes_to_rgb` must hold.
    """
    return _decompress(data, header, _TJPF_RGB, denominator)


def to_baseline(data: bytes) -> bytes:
    """Re-code a progressive JPEG as baseline with the same coefficients, hence the same pixels; metadata is dropped.

    Raises UnsupportedJpeg when its subsampling is one that turbojpeg has no name for, JpegError when it is damaged.
    """
    library = turbojpeg()
    output, output_size = ctypes.c_void_p(), ctypes.c_ulong()
    transform = _Transform(options=_TJXOPT_COPYNONE)
    with _instance(library.tjInitTransform) as handle:
        try:
            if library.tjTransform(handle, data, len(data), 1, ctypes.byref(output), ctypes.byref(output_size), ctypes.byref(transform), 0):
                reason = _error_text(handle)
                raise UnsupportedJpeg(reason) if "subsampling type" in reason else JpegError(reason)
            return ctypes.string_at(output, output_size.value)
        finally:
            library.tjFree(output)


# From turbojpeg.h, API 1.2 to 3.x.
_TJPF_RGB, _TJPF_GRAY, _TJPF_CMYK = 0, 6, 11
_TJXOPT_COPYNONE = 64


class _Transform(ctypes.Structure):
    _fields_ = [
        ("region", ctypes.c_int * 4),
        ("operation", ctypes.c_int),
        ("options", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("custom_filter", ctypes.c_void_p),
    ]


@contextlib.contextmanager
def _instance(create: Callable[[], int]) -> Iterator[int]:
    """A new instance of turbojpeg for each file: an old one would lend a file that has lost its tables those of the file before."""
    handle = create()
    try:
        yield handle
    finally:
        turbojpeg().tjDestroy(handle)


def _decompress(data: bytes, header: JpegHeader, pixel_format: int, denominator: int) -> np.ndarray:
    width, height = -(-header.width // denominator), -(-header.height // denominator)
    channels = {_TJPF_RGB: (3,), _TJPF_GRAY: (), _TJPF_CMYK: (4,)}[pixel_format]
    pixels = np.empty((height, width, *channels), np.uint8)
    with _instance(turbojpeg().tjInitDecompress) as handle:
        if turbojpeg().tjDecompress2(handle, data, len(data), pixels.ctypes.data, width, 0, height, pixel_format, 0):
            raise JpegError(_error_text(handle))
    return pixels


def _error_text(handle: int) -> str:
    return turbojpeg().tjGetErrorStr2(handle).decode("ascii", "replace")
