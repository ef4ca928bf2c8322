"""JPEG files at the level of their bytes.

Read headers, check that the data decodes, re-code progressive files as baseline without loss.

libjpeg's warnings count as damage, since ffcv's decoder and ours stop at them. Some warnings are
about headers alone, as cameras and editors write them. `mended` corrects such headers byte for
byte, so that the strict check that follows still sees all of the data.

The decoder is the libjpeg-turbo that ffcv links to: a file that passes here decodes there. It is
called through ctypes, without importing ffcv.

Marker codes and layouts: ITU-T T.81, annex B; Exif 2.3, section 4.6.
"""

import contextlib
import ctypes
import functools
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ffssl.data.convert import exif
from ffssl.data.turbojpeg import MOST_PIXELS_PER_BYTE, turbojpeg

BASELINE, EXTENDED, PROGRESSIVE = 0xC0, 0xC1, 0xC2
_FRAME_MARKERS = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # without DHT, JPG, DAC
_WITHOUT_LENGTH = {0x00, 0x01, *range(0xD0, 0xDA)}  # 0x00 is no marker but a stuffed byte
# libjpeg ignores comments and applications' segments, except those of JFIF and Adobe.
_IGNORED = {0xFE, *range(0xE1, 0xF0)} - {0xEE}
_START_OF_SCAN, _END_OF_IMAGE, _APP0, _APP1, _APP14 = 0xDA, 0xD9, 0xE0, 0xE1, 0xEE
# Any marker but those that occur within a scan: stuffed zeros, restarts, fill bytes.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
_JFIF, _JFIF_LENGTH = b"JFIF\0", 14  # libjpeg ignores shorter segments
_ADOBE, _ADOBE_LENGTH = b"Adobe", 12
_ADOBE_YCBCR, _ADOBE_YCCK = 1, 2
_LAST_COEFFICIENT = 63
_DATA_MISSING = "premature end of data segment"  # in libjpeg's words


class JpegError(ValueError):
    """The bytes are not a whole, sound JPEG file. The message says why."""


class UnsupportedJpeg(JpegError):
    """The file is sound, but turbojpeg can't transform its kind."""


@dataclass(frozen=True)
class JpegHeader:
    """What the markers before the first scan say.

    width, height: in pixels, as stored.
    precision: bits a channel.
    process: the frame marker: BASELINE, EXTENDED, PROGRESSIVE...
    orientation: of Exif, 1 to 8.
    """

    width: int
    height: int
    components: int
    precision: int
    process: int
    orientation: int

    @property
    def decodes_to_rgb(self) -> bool:
        """Whether libjpeg-turbo by itself decodes the file to 8-bit RGB.

        It does so for YCbCr, RGB or grey, Huffman-coded.
        """
        return (
            self.precision == 8
            and self.components in (1, 3)
            and self.process in (BASELINE, EXTENDED, PROGRESSIVE)
        )


def is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def parse_header(data: bytes) -> JpegHeader:
    """Read the markers up to the first scan.

    Raises JpegError when they are cut short or make no sense, for example when they claim more
    pixels than the data can hold.
    """
    if not is_jpeg(data):
        raise JpegError("does not begin like a JPEG file")
    (process, precision, height, width, components), exif_blocks = _frame_and_exif(data)
    if width == 0 or height == 0:
        raise JpegError("has no width or no height")
    is_huffman_coded = process in (BASELINE, EXTENDED, PROGRESSIVE)
    if is_huffman_coded and width * height > MOST_PIXELS_PER_BYTE * len(data):
        raise JpegError(f"claims {width} x {height} pixels, more than {len(data)} bytes can hold")
    orientation = exif.orientation(exif_blocks) if exif_blocks else 1
    return JpegHeader(width, height, components, precision, process, orientation)


def _frame_and_exif(data: bytes) -> tuple[tuple[int, int, int, int, int], list[bytes]]:
    """Return (process, precision, height, width, components) and the Exif blocks."""
    frame, exif_blocks = None, []
    for begin, marker, end in _segments(data):
        if marker in _FRAME_MARKERS:
            if end - begin < 10:
                raise JpegError("has a cut header")
            frame = (marker, *struct.unpack_from(">BHHB", data, begin + 4))
        elif marker == _APP1 and data.startswith(exif.PREFIX, begin + 4):
            exif_blocks.append(data[begin + 4 : end])
        elif marker == _END_OF_IMAGE:
            raise JpegError("ends before its first scan")
        elif marker == _START_OF_SCAN:
            break
    if frame is None:
        raise JpegError("has a scan before its frame header")
    return frame, exif_blocks


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, marker, end) of each marker segment, up to the end of the image.

    data[begin] is 0xff, data[begin + 4 : end] the segment's content. Bytes between segments are
    passed over. Raises JpegError if the next segment can't be found.
    """
    position, size = 2, len(data)
    while True:
        try:
            begin = data.index(b"\xff", position)
            marker = data[begin + 1]
            while marker == 0xFF:  # a marker may be preceded by any number of fill bytes
                begin += 1
                marker = data[begin + 1]
            position = begin + 2
            if marker in _WITHOUT_LENGTH:
                if marker != 0:
                    yield begin, marker, position
                if marker == _END_OF_IMAGE:
                    return
                continue
            position += data[position] << 8 | data[position + 1]
        except (ValueError, IndexError):
            raise JpegError("has a cut header") from None
        if position < begin + 4 or position > size:
            raise JpegError("has a cut header")
        yield begin, marker, position
        if marker == _START_OF_SCAN:
            found = _MARKER.search(data, position)
            if found is None:
                raise JpegError("ends before its end-of-image marker")
            position = found.start()


def _readable_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    with contextlib.suppress(JpegError):
        yield from _segments(data)


def mended(data: bytes) -> bytes:
    """Correct the markers of a whole picture that libjpeg warns of.

    Return `data` itself if there is nothing to correct.

    - Bytes between segments are taken out.
    - An unknown version of JFIF becomes 1.01.
    - An unknown colour transform of Adobe's becomes the one that decoders assume.
    - The last coefficient of a sequential scan, which decoders ignore, becomes the only one that is
      possible.

    Coded data stay as they are. So does all that may be damage: a segment whose marker or length is
    lost, colours that the components' names contradict, other parameters of a scan, and everything
    behind a place where no marker can be found.
    """
    segments = list(_readable_segments(data))
    file = bytearray(data)
    process, names, jfif, adobe = None, b"", False, None
    for begin, marker, end in segments:
        content = data[begin + 4 : end]
        if marker in _FRAME_MARKERS and len(content) > 5:
            process, names = marker, content[6::3][: content[5]]
        elif marker == _APP0 and content.startswith(_JFIF) and len(content) >= _JFIF_LENGTH:
            jfif = True
            if content[5] != 1:
                file[begin + 9 : begin + 11] = b"\1\1"
        elif marker == _APP14 and content.startswith(_ADOBE) and len(content) >= _ADOBE_LENGTH:
            adobe = begin + 15
        elif marker == _START_OF_SCAN and len(content) > 3:
            file[end - 2] = _last_coefficient(process, content)
    if adobe is not None:
        file[adobe] = _known_transform(data[adobe], names, jfif)

    gaps = _removable_gaps(data, segments, len(names))
    if gaps is None:
        return data
    for begin, end in reversed(gaps):
        del file[begin:end]
    return data if file == data else bytes(file)


def _last_coefficient(process: int | None, scan_header: bytes) -> int:
    first, last, approximation = scan_header[-3:]
    is_sequential = process in (BASELINE, EXTENDED) and first == approximation == 0
    return _LAST_COEFFICIENT if is_sequential else last


def _known_transform(transform: int, names: bytes, jfif: bool) -> int:
    """Return Adobe's colour transform, or what decoders assume for an unknown one.

    names: of the components, a byte each.
    """
    if len(names) == 3 and not jfif and transform > _ADOBE_YCBCR and names != b"RGB":
        return _ADOBE_YCBCR
    if len(names) == 4 and transform not in (0, _ADOBE_YCCK) and names != b"CMYK":
        return _ADOBE_YCCK
    return transform


def _removable_gaps(
    data: bytes, segments: list[tuple[int, int, int]], components: int
) -> list[tuple[int, int]] | None:
    """Return (begin, end) of the bytes between segments, or None if a segment may be among them."""
    gaps, scanned, last = [], 0, 2
    for begin, marker, end in segments:
        gap, content = data[last:begin], data[begin + 4 : end]
        # Behind a scan they may be the scan's own data, or a scan that has lost its marker.
        if scanned == 0 and gap.strip(b"\xff"):
            if _is_a_lost_segment(gap):
                return None
            gaps.append((last, begin))
        last = end
        if marker == _START_OF_SCAN and len(content) > 3:
            scanned += content[0]
    # With components that no scan holds, the first scan may lie in a gap.
    return None if gaps and scanned < components else gaps


def _is_a_lost_segment(gap: bytes) -> bool:
    named = any(name in gap for name in (_JFIF, _ADOBE, exif.PREFIX))
    return named or len(gap) == 2 + int.from_bytes(gap[2:4], "big") > 3


def verify(data: bytes, header: JpegHeader) -> None:
    """Decode all of the entropy-coded data.

    At 1/8 scale and in grey this costs little more than the Huffman codes. Raises JpegError for any
    error or warning: a file that is cut off or corrupt, or has data left over.
    """
    _decompress(data, header, _TJPF_CMYK if header.components == 4 else _TJPF_GRAY, 8)


def verify_markers(data: bytes) -> None:
    """Follow the markers to the end of the image, and let libjpeg check them.

    It costs a fraction of `verify`. Flipped bits in the coded data go unnoticed. Raises JpegError
    for a file that is cut off or overwritten with something else, and for markers that no decoder
    takes.
    """
    # The markers alone are a file whose data is missing. libjpeg complains of that, unless it finds
    # fault with the markers first. With one pixel and no metadata many images give the same file,
    # whose result is cached.
    markers, last = bytearray(data[:2]), 2
    for begin, marker, end in _segments(data):
        if last is not None:
            markers += data[last:begin]
        if marker not in _IGNORED:
            markers += data[begin:end]
        if marker in _FRAME_MARKERS:
            markers[begin - end + 5 : begin - end + 9] = b"\0\1\0\1"
        last = end if marker != _START_OF_SCAN else None
    _verify_without_data(bytes(markers))


@functools.lru_cache(maxsize=64)
def _verify_without_data(markers: bytes) -> None:
    try:
        verify(markers, parse_header(markers))
    except JpegError as error:
        if _DATA_MISSING not in str(error):
            raise


def decode(data: bytes, header: JpegHeader, denominator: int = 1) -> np.ndarray:
    """Decode a file to RGB at the scale 1/denominator (1, 2, 4 or 8).

    Return uint8 (ceil(height / denominator), ceil(width / denominator), 3). The Exif orientation is
    not applied. `header.decodes_to_rgb` must hold. Raises JpegError as `verify` does.
    """
    return _decompress(data, header, _TJPF_RGB, denominator)


def to_baseline(data: bytes) -> bytes:
    """Re-code a progressive JPEG as baseline, with the same coefficients, hence the same pixels.

    Metadata is dropped. Raises UnsupportedJpeg if turbojpeg has no name for its subsampling, and
    JpegError if it is damaged.
    """
    library = turbojpeg()
    output, output_size = ctypes.c_void_p(), ctypes.c_ulong()
    transform = _Transform(options=_TJXOPT_COPYNONE)
    with _instance(library.tjInitTransform) as handle:
        try:
            if library.tjTransform(
                handle,
                data,
                len(data),
                1,
                ctypes.byref(output),
                ctypes.byref(output_size),
                ctypes.byref(transform),
                0,
            ):
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
    """Create an instance of turbojpeg for one file, and destroy it after the block.

    An instance used before would lend a file without tables those of the file before.
    """
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
        if turbojpeg().tjDecompress2(
            handle, data, len(data), pixels.ctypes.data, width, 0, height, pixel_format, 0
        ):
            raise JpegError(_error_text(handle))
    return pixels


def _error_text(handle: int) -> str:
    return turbojpeg().tjGetErrorStr2(handle).decode("ascii", "replace")
