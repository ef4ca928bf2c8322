"""JPEG files at the level of their bytes: headers, whether the data decodes, lossless progressive
to baseline.

libjpeg's warnings count as damage: ffcv's decoder and ours stop at them. Some are of headers alone,
which cameras and editors write: `mended` sets these right, byte for byte, so that the strict check
that follows still sees all of the data.

The decoder is the libjpeg-turbo that ffcv links to, so that what passes here decodes there; it is
called through ctypes, without importing ffcv. Marker codes and layouts: ITU-T T.81, annex B; Exif
2.3, section 4.6.
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
_WITHOUT_LENGTH = {0x00, 0x01, *range(0xD0, 0xDA)}  # the first is none: a stuffed byte
# By libjpeg: comments, and the segments of applications without those of JFIF and Adobe.
_IGNORED = {0xFE, *range(0xE1, 0xF0)} - {0xEE}
_START_OF_SCAN, _END_OF_IMAGE, _APP0, _APP1, _APP14 = 0xDA, 0xD9, 0xE0, 0xE1, 0xEE
# Any but those that occur within a scan: stuffed zeros, restarts, fill bytes.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
_JFIF, _JFIF_LENGTH = b"JFIF\0", 14  # libjpeg looks at no shorter ones
_ADOBE, _ADOBE_LENGTH = b"Adobe", 12
_ADOBE_YCBCR, _ADOBE_YCCK = 1, 2
_LAST_COEFFICIENT = 63
_DATA_MISSING = "premature end of data segment"  # in libjpeg's words


class JpegError(ValueError):
    """The bytes are not a whole, sound JPEG file. The message says why."""


class UnsupportedJpeg(JpegError):
    """A sound file, of a kind that turbojpeg does not transform."""


@dataclass(frozen=True)
class JpegHeader:
    """What the markers before the first scan say.

    `process` is the frame marker: BASELINE, EXTENDED, PROGRESSIVE...
    """

    width: int
    height: int
    components: int
    precision: int
    process: int
    orientation: int

    @property
    def decodes_to_rgb(self) -> bool:
        """Whether libjpeg-turbo decodes it to 8-bit RGB by itself: YCbCr, RGB or grey,
        Huffman-coded.
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

    Raises JpegError when they are cut short or make no sense, a size beyond the data's included.
    """
    if not is_jpeg(data):
        raise JpegError("does not begin like a JPEG file")
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
    process, precision, height, width, components = frame
    if width == 0 or height == 0:
        raise JpegError("has no width or no height")
    if process in (BASELINE, EXTENDED, PROGRESSIVE) and width * height > MOST_PIXELS_PER_BYTE * len(
        data
    ):
        raise JpegError(f"claims {width} x {height} pixels, more than {len(data)} bytes can hold")
    orientation = exif.orientation(exif_blocks) if exif_blocks else 1
    return JpegHeader(width, height, components, precision, process, orientation)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, marker, end) of each marker segment, up to the end of the image.

    What lies between them is passed over. data[begin] is 0xff, data[begin + 4 : end] what the
    segment says. Raises JpegError where the next one can't be found.
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
    """The file without what libjpeg warns of in its markers, though the picture is whole.

    It is `data` itself where there is none of that. Bytes between segments are taken out. An
    unknown version of JFIF becomes 1.01; an unknown colour transform of Adobe's the one that
    decoders assume; the last coefficient of a sequential scan, which decoders ignore, the only one
    it can be. Coded data stay as they are, and so does what may be damage: a segment whose marker
    or length is lost, colours that the components' names contradict, other parameters of a scan,
    and all that follows where a marker can't be found.
    """
    file, gaps = bytearray(data), []
    process, names, jfif, adobe, scanned, last = None, b"", False, None, 0, 2
    for begin, marker, end in _readable_segments(data):
        gap, said = data[last:begin], data[begin + 4 : end]
        # Behind a scan it would be data left over, or a scan that has lost its marker.
        if scanned == 0 and gap.strip(b"\xff"):
            if _is_a_lost_segment(gap):
                return data
            gaps.append((last, begin))
        last = end
        if marker in _FRAME_MARKERS and len(said) > 5:
            process, names = marker, said[6::3][: said[5]]
        elif marker == _APP0 and said.startswith(_JFIF) and len(said) >= _JFIF_LENGTH:
            jfif = True
            if said[5] != 1:
                file[begin + 9 : begin + 11] = b"\1\1"
        elif marker == _APP14 and said.startswith(_ADOBE) and len(said) >= _ADOBE_LENGTH:
            adobe = begin + 15
        elif marker == _START_OF_SCAN and len(said) > 3:
            scanned += said[0]
            first, _, approximation = said[-3:]
            if process in (BASELINE, EXTENDED) and first == approximation == 0:
                file[end - 2] = _LAST_COEFFICIENT
    if gaps and scanned < len(names):  # the first scan may lie in a gap
        return data
    if adobe is not None:
        if len(names) == 3 and not jfif and data[adobe] > _ADOBE_YCBCR and names != b"RGB":
            file[adobe] = _ADOBE_YCBCR
        elif len(names) == 4 and data[adobe] not in (0, _ADOBE_YCCK) and names != b"CMYK":
            file[adobe] = _ADOBE_YCCK
    for begin, end in reversed(gaps):
        del file[begin:end]
    return data if file == data else bytes(file)


def _is_a_lost_segment(gap: bytes) -> bool:
    named = any(name in gap for name in (_JFIF, _ADOBE, exif.PREFIX))
    return named or len(gap) == 2 + int.from_bytes(gap[2:4], "big") > 3


def verify(data: bytes, header: JpegHeader) -> None:
    """Decode all of the entropy-coded data, at 1/8 scale and in grey, which costs little more than
    the Huffman codes.

    Raises JpegError for any error or warning: cut off, corrupt, or with data left over.
    """
    _decompress(data, header, _TJPF_CMYK if header.components == 4 else _TJPF_GRAY, 8)


def verify_markers(data: bytes) -> None:
    """Follow the markers to the end of the image, and see what libjpeg makes of them.

    It costs a fraction of `verify`. Raises JpegError for a file that is cut off or overwritten with
    something else, and for markers that no decoder takes; flipped bits in the coded data go
    unnoticed.
    """
    # The markers alone are a file whose data is missing, which libjpeg says unless something about
    # them comes first. Of one pixel, and without metadata, it is the same file for many images.
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
    """Decode at scale 1/denominator (1, 2, 4 or 8) to uint8 (ceil(height / denominator), ceil(width
    / ...), 3), RGB.

    The Exif orientation is not applied. Raises JpegError as `verify` does; `header.decodes_to_rgb`
    must hold.
    """
    return _decompress(data, header, _TJPF_RGB, denominator)


def to_baseline(data: bytes) -> bytes:
    """Re-code a progressive JPEG as baseline with the same coefficients, hence the same pixels;
    metadata is dropped.

    Raises UnsupportedJpeg when its subsampling is one that turbojpeg has no name for, JpegError
    when it is damaged.
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
    """A new instance of turbojpeg for each file: an old one would lend a file that has lost its
    tables those of the file before.
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
