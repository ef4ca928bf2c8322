"""Encode one image for a beton file, or keep its bytes where possible.

- A JPEG keeps its bytes if libjpeg-turbo decodes it to RGB (or from grey), it stands upright and it
  is not too large. Its data is decoded once to see that it is sound, since ffcv ignores decoding
  errors and would train on what is left. If libjpeg warns of the markers alone, these are mended
  first.
- A progressive JPEG is re-coded as baseline, which decodes faster. The coefficients stay the same,
  and so do the pixels.
- Everything else is decoded: the orientation is applied, transparency is put on white, 16 bits are
  rounded to 8, and of an animation the first frame is taken. The image is reduced (never enlarged)
  with a Lanczos filter, and stored as raw pixels or as JPEG. The JPEG's chroma is 4:2:0 if the
  image came lossily compressed, since it was halved before then, and 4:4:4 otherwise.

The orientation is that of Exif (for TIFF and AVIF the file's own). XMP's is not read in any format:
programs that turn an image leave it as it was, and OpenCV and torchvision ignore it. Damaged
metadata never makes an image broken. Colour profiles are not applied; no training pipeline applies
them.
"""

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps

from ffssl.data.beton.read import MODE_JPEG, MODE_RAW
from ffssl.data.beton.write import MAX_SIDE
from ffssl.data.convert import exif, jpeg, png
from ffssl.data.convert.sources.base import Image
from ffssl.errors import UserError

JPEG_MAX_SIDE = 65500  # libjpeg's own limit
RAW_MAX_BYTES = 1 << 30
MOST_PIXELS = RAW_MAX_BYTES // 3
PIL.Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # Pillow refuses more than twice as many
FULL_WHITE = 65535  # of 16 bits
_DARK = 1 << 14  # below a quarter of full brightness
_SUBSAMPLING_444, _SUBSAMPLING_420 = 0, 2
_LOSSY_FORMATS = {"JPEG", "MPO", "WEBP", "GIF", "AVIF"}
_MAY_HAVE_16_BITS = {"PNG", "TIFF", "PPM"}
# The entry of AVIF's Exif in the list of items (ISO/IEC 14496-12, ItemInfoEntry). It is blanked
# out, since Pillow refuses a file whose Exif is damaged. The file's own orientation counts anyway.
_AVIF_EXIF = re.compile(rb"(infe[\2\3].{7,9})Exif", re.DOTALL)
_UPRIGHT = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


class BrokenImage(ValueError):
    """An image can't be used. The message says why; it is to follow the image's name."""


class How(StrEnum):
    """What was done to an image's bytes."""

    KEPT = "kept"
    MENDED = "mended"  # kept, but for bytes of its header
    BASELINE = "baseline"
    ENCODED = "encoded"
    RAW = "raw"


@dataclass(frozen=True)
class EncodedImage:
    """An image as it is stored.

    data: a JPEG file (MODE_JPEG), or pixels, uint8 (height, width, 3) (MODE_RAW).
    peak: the largest value, if the image has 16 bits a channel and does not state its white; else
        None.
    """

    data: bytes
    mode: int
    width: int
    height: int
    how: How
    peak: int | None = None


@dataclass(frozen=True)
class Encoding:
    """How images are stored.

    max_side: longest side in pixels; None for no limit.
    jpeg_quality: 0 to 100.
    quick_check: check only the markers of a JPEG that keeps its bytes, not that all of its data
        decodes.
    white_level: the value of white in images with 16 bits a channel, for example 4095 for data of
        12 bits. Images that state their own range are not affected.

    Raises UserError for values out of range.
    """

    max_side: int | None = None
    jpeg_quality: int = 90
    quick_check: bool = False
    white_level: int = FULL_WHITE

    def __post_init__(self):
        if self.max_side is not None and not 1 <= self.max_side <= MAX_SIDE:
            raise UserError(
                f"max side {self.max_side}: must be 1 to {MAX_SIDE} pixels (--max-side)"
            )
        if not 0 <= self.jpeg_quality <= 100:
            raise UserError(
                f"jpeg quality {self.jpeg_quality}: must be 0 to 100, 90 is a good choice "
                "(--jpeg-quality)"
            )
        if not 1 <= self.white_level <= FULL_WHITE:
            raise UserError(
                f"white level {self.white_level}: must be 1 to {FULL_WHITE} (--white-level)"
            )


def encode_image(image: Image, encoding: Encoding, compressed: bool = True) -> EncodedImage:
    """Encode one image from a source, as JPEG or, with compressed=False, as raw pixels.

    Raises BrokenImage when it is damaged, of an unknown kind or too large for the format.
    """
    if not isinstance(image, bytes):
        decoded = _Decoded(PIL.Image.fromarray(_checked_pixels(image)), lossless=True)
    elif jpeg.is_jpeg(image):
        try:
            return _encode_jpeg(image, encoding, compressed)
        except jpeg.JpegError as error:
            raise BrokenImage(str(error)) from error
    else:
        decoded = _decode_with_pil(image, encoding.white_level)
    return _encode_pixels(decoded, encoding, compressed)


class _Decoded(NamedTuple):
    """An image, upright and RGB. peak: see EncodedImage."""

    pixels: PIL.Image.Image
    lossless: bool
    peak: int | None = None


def _encode_jpeg(data: bytes, encoding: Encoding, compressed: bool) -> EncodedImage:
    try:
        return _encode_sound_jpeg(data, encoding, compressed)
    except jpeg.JpegError:
        mended = jpeg.mended(data)
        if mended is data:
            raise
    encoded = _encode_sound_jpeg(mended, encoding, compressed)
    return replace(encoded, how=How.MENDED) if encoded.how == How.KEPT else encoded


def _encode_sound_jpeg(data: bytes, encoding: Encoding, compressed: bool) -> EncodedImage:
    header = jpeg.parse_header(data)
    if compressed and (done := _without_decoding(data, header, encoding)):
        return done
    pixels = _decode_jpeg(data, header, encoding.max_side)
    return _encode_pixels(_Decoded(pixels, lossless=False), encoding, compressed)


def _without_decoding(
    data: bytes, header: jpeg.JpegHeader, encoding: Encoding
) -> EncodedImage | None:
    fits = (
        max(header.width, header.height) <= (encoding.max_side or JPEG_MAX_SIDE)
        and header.width * header.height <= MOST_PIXELS
    )
    if not (header.decodes_to_rgb and header.orientation == 1 and fits):
        return None
    how = How.KEPT
    if header.process == jpeg.PROGRESSIVE:
        try:
            data, how = jpeg.to_baseline(data), How.BASELINE
        except jpeg.UnsupportedJpeg:
            return None
    elif encoding.quick_check:
        jpeg.verify_markers(data)
    else:
        jpeg.verify(data, header)
    return EncodedImage(data, MODE_JPEG, header.width, header.height, how)


def _decode_jpeg(data: bytes, header: jpeg.JpegHeader, max_side: int | None) -> PIL.Image.Image:
    if header.process == jpeg.PROGRESSIVE and header.width * header.height > MOST_PIXELS:
        # All of its coefficients are in memory at once, whatever the scale.
        raise BrokenImage(
            f"is progressive and measures {header.width} x {header.height}, {_too_many()}; "
            "reduce it first"
        )
    if not header.decodes_to_rgb:
        # CMYK, arithmetic coding and the like. PIL's libjpeg can decode more kinds, but says
        # nothing of damaged data.
        if header.precision == 8 and header.components == 4:
            jpeg.verify(data, header)
        return _decode_with_pil(data, orientation=header.orientation).pixels
    denominator = 1
    longest = max(header.width, header.height)
    # libjpeg averages 2x2 pixels and more for next to nothing. It stops at twice the final size;
    # the better filter does the rest.
    while max_side and denominator < 8 and longest >= 4 * denominator * max_side:
        denominator *= 2
    if header.width * header.height > MOST_PIXELS * denominator**2:
        smaller = "a smaller --max-side" if max_side else "--max-side"
        raise BrokenImage(
            f"measures {header.width} x {header.height}, {_too_many()}; pass {smaller} to reduce it"
        )
    return _turned(PIL.Image.fromarray(jpeg.decode(data, header, denominator)), header.orientation)


def _too_many() -> str:
    return f"more than {MOST_PIXELS // 10**6} million pixels"


def _turned(image: PIL.Image.Image, orientation: int) -> PIL.Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation != 1 else image


def _decode_with_pil(
    data: bytes, white_level: int = FULL_WHITE, orientation: int | None = None
) -> _Decoded:
    """Decode the first frame. orientation: if it is known already."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on odd metadata; what matters is raised
            pixels_only, exif_blocks = data, []
            if png.is_png(data):
                pixels_only, exif_blocks = png.without_metadata(data)
            elif data[4:8] == b"ftyp":
                pixels_only = _AVIF_EXIF.sub(rb"\1none", data)
            image = PIL.Image.open(io.BytesIO(pixels_only))
            lossless = image.format not in _LOSSY_FORMATS
            deep = _has_16_bits(image)
            image.info.pop("xmp", None)  # TIFF files are turned as they are loaded
            image.load()
            if orientation is None:
                orientation = exif.orientation(exif_blocks or [image.info.get("exif", b"")])
            rgb, peak = _to_rgb(image, deep, white_level, data)
            return _Decoded(_turned(rgb, orientation), lossless, peak)
    except PIL.UnidentifiedImageError:
        what = "is empty" if not data else "is not an image of a known format"
        raise BrokenImage(what) from None
    except PIL.Image.DecompressionBombError:
        raise BrokenImage(f"has {_too_many()}, too many to convert; reduce it first") from None
    except (BrokenImage, MemoryError):
        raise
    # PIL's decoders raise nearly anything on damaged data: SyntaxError, struct.error, ...
    except Exception as error:
        raise BrokenImage(f"does not decode: {' '.join(str(error).split())}") from error


def _has_16_bits(image: PIL.Image.Image) -> bool:
    """Return whether an image, not yet loaded, has 16-bit channels or 32-bit integers as stored."""
    # Pillow scales JPEG 2000, and PGM of a range below 16 bits, to 16 bits: they state their white.
    return image.format in _MAY_HAVE_16_BITS and any(
        bits in str(image.tile[:1]) for bits in (";16", ";32")
    )


def _to_rgb(
    image: PIL.Image.Image, deep: bool, white_level: int, data: bytes
) -> tuple[PIL.Image.Image, int | None]:
    """Convert a loaded image to RGB; return it and its peak, see EncodedImage.

    deep: see _has_16_bits.
    data: the image's file.
    """
    if image.mode.startswith("I"):
        values = _16_bit_values(image)
        grey = PIL.Image.fromarray(
            _to_8_bits(values, white_level if deep else FULL_WHITE, image.info.get("transparency"))
        )
        return grey.convert("RGB"), int(values.max()) if deep else None
    if image.mode == "F":
        raise BrokenImage("has floating-point pixels, whose range is unknown; store it with 8 bits")
    peak = None
    if deep and white_level != FULL_WHITE:
        image, peak = _deep_colours(data, white_level)
    elif deep:
        largest = max(largest for _, largest in image.getextrema()[:3])
        peak = 256 * largest + 255  # Pillow has kept the upper 8 bits
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        return PIL.Image.alpha_composite(white, image).convert("RGB"), peak
    return image if image.mode == "RGB" else image.convert("RGB"), peak


def _16_bit_values(image: PIL.Image.Image) -> np.ndarray:
    # PIL would clip these at 255.
    values = np.asarray(image)
    if values.min() < 0 or values.max() > FULL_WHITE:
        raise BrokenImage("has 32-bit pixels, whose range is unknown; store it with 8 or 16 bits")
    return values.astype(np.uint16, copy=False)


def _to_8_bits(values: np.ndarray, white_level: int, transparent: int | None = None) -> np.ndarray:
    """Round uint16 to uint8 of the same shape.

    Values beyond the white level become white, and so does the value `transparent`.
    """
    levels = np.minimum(
        (np.arange(FULL_WHITE + 1) * 255 + white_level // 2) // white_level, 255
    ).astype(np.uint8)
    if transparent is not None:
        levels[transparent] = 255
    return levels[values]


def _deep_colours(data: bytes, white_level: int) -> tuple[PIL.Image.Image, int]:
    """Decode an image of 16-bit colours; return it as RGB or RGBA, and its largest colour value.

    Pillow keeps only the upper 8 of 16 bits, which is too few for data of 12 bits.
    """
    import cv2  # ffcv needs it too

    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if (
        decoded is None
        or decoded.dtype != np.uint16
        or decoded.ndim != 3
        or decoded.shape[2] not in (3, 4)
    ):
        raise BrokenImage("has 16 bits a channel, of a kind that takes no white level; use 8 bits")
    colours = decoded[..., 2::-1]
    scaled = _to_8_bits(colours, white_level)
    if decoded.shape[2] == 4:
        scaled = np.dstack([scaled, _to_8_bits(decoded[..., 3], FULL_WHITE)])
    return PIL.Image.fromarray(scaled), int(colours.max())


def depth_notes(peaks: Sequence[int], white_level: int) -> list[str]:
    """Return sentences on the images with 16 bits a channel.

    peaks: the largest value of each such image.
    white_level: the value that was taken for white.
    """
    notes = []
    beyond = [peak for peak in peaks if peak > white_level]
    dark = [peak for peak in peaks if 0 < peak < _DARK]
    if beyond:
        notes.append(
            f"{len(beyond)} images of 16 bits hold values beyond --white-level {white_level}, "
            f"up to {max(beyond)}: they were made white"
        )
    if dark and white_level == FULL_WHITE:
        white = (1 << max(dark).bit_length()) - 1
        notes.append(
            f"{len(dark)} images of 16 bits hold no value above {max(dark)} and have become dark: "
            f"where {white} is meant for white, pass --white-level {white}"
        )
    return notes


def _checked_pixels(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise BrokenImage(
            f"is an array of {pixels.dtype} {pixels.shape} "
            "where uint8 (height, width, 3) is expected"
        )
    return np.ascontiguousarray(pixels)


def _reduce(image: PIL.Image.Image, max_side: int | None) -> PIL.Image.Image:
    longest = max(image.size)
    if max_side is None or longest <= max_side:
        return image
    size = tuple(max(1, round(side * max_side / longest)) for side in image.size)
    return image.resize(size, PIL.Image.Resampling.LANCZOS, reducing_gap=3.0)


def _encode_pixels(decoded: _Decoded, encoding: Encoding, compressed: bool) -> EncodedImage:
    image = _reduce(decoded.pixels, encoding.max_side)
    width, height = image.size
    limit = JPEG_MAX_SIDE if compressed else MAX_SIDE
    if max(width, height) > limit:
        raise BrokenImage(
            f"measures {width} x {height}, and a side may have {limit} pixels; pass --max-side"
        )
    if not compressed:
        if 3 * width * height > RAW_MAX_BYTES:
            raise BrokenImage(
                f"takes {3 * width * height / 1e9:.1f} GB as raw pixels; pass --max-side"
            )
        return EncodedImage(image.tobytes(), MODE_RAW, width, height, How.RAW, decoded.peak)
    buffer = io.BytesIO()
    subsampling = _SUBSAMPLING_444 if decoded.lossless else _SUBSAMPLING_420
    image.save(buffer, "JPEG", quality=encoding.jpeg_quality, subsampling=subsampling)
    return EncodedImage(buffer.getvalue(), MODE_JPEG, width, height, How.ENCODED, decoded.peak)
