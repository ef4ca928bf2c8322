"""One image as it goes into a beton file: kept as it is where possible, otherwise decoded upright,
reduced and encoded.

- A JPEG that libjpeg-turbo decodes to RGB, stands upright and is not too large keeps its bytes;
greyscale ones too. Its data is decoded once to see that it is sound: ffcv ignores decoding errors
and would train on what is left. Where libjpeg warns of the markers alone, these are mended before.
- A progressive one is re-coded as baseline, which decodes faster, from the same coefficients: the
same pixels. - Everything else is decoded: orientation applied, transparency put on white, 16 bits
rounded to 8, the first frame of an animation taken. It is reduced, never enlarged, with a Lanczos
filter, and stored as raw pixels or as JPEG: at 4:2:0 when it came lossily compressed, for then its
chroma has been halved before, and at 4:4:4 otherwise.

Orientation is that of Exif (of TIFF and AVIF: the file's own). XMP's is not read in any format:
programs that turn an image leave it behind as it was, and OpenCV and torchvision pass over it.
Damaged metadata costs no image. Colour profiles are not applied, as nobody's training pipeline
does.
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
# The entry of AVIF's Exif in the list of items (ISO/IEC 14496-12, ItemInfoEntry). Pillow refuses a
# file whose Exif is damaged; its orientation doesn't count, that of the file itself does.
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
    """An image that cannot be used. The message says why, and reads on after the image's name."""


class How(StrEnum):
    """What was done to an image's bytes."""

    KEPT = "kept"
    MENDED = "mended"  # kept, but for bytes of its header
    BASELINE = "baseline"
    ENCODED = "encoded"
    RAW = "raw"


@dataclass(frozen=True)
class EncodedImage:
    """data: a JPEG file (MODE_JPEG), or pixels uint8 (height, width, 3) (MODE_RAW).

    peak: largest value of an image with 16 bits a channel whose white nothing states; None of any
    other.
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

    max_side: longest side in pixels, None for no limit. jpeg_quality: 0 to 100. quick_check: of a
    JPEG that keeps its bytes, check the markers only, not that all of its data decodes.
    white_level: the value that is white in images with 16 bits a channel, 4095 for data of 12 bits,
    say; those that state their own range go by that.
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
    """An image upright and RGB; peak: see EncodedImage."""

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
        # CMYK, arithmetic coding and the like: PIL's libjpeg knows more, but keeps quiet about
        # damaged data.
        if header.precision == 8 and header.components == 4:
            jpeg.verify(data, header)
        return _decode_with_pil(data, orientation=header.orientation).pixels
    denominator = 1
    # libjpeg averages 2x2 pixels and more for next to nothing; twice the final size is left to the
    # better filter.
    while (
        max_side
        and denominator < 8
        and max(header.width, header.height) >= 4 * denominator * max_side
    ):
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
    """The first frame. orientation: where it is known already."""
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
    """Whether an image, not yet loaded, holds 16-bit channels or 32-bit integers as in its file."""
    # A PGM of another range than 16 bits, and JPEG 2000, are scaled to 16 bits by Pillow: they
    # state their white.
    return image.format in _MAY_HAVE_16_BITS and any(
        bits in str(image.tile[:1]) for bits in (";16", ";32")
    )


def _to_rgb(
    image: PIL.Image.Image, deep: bool, white_level: int, data: bytes
) -> tuple[PIL.Image.Image, int | None]:
    """A loaded image, and its peak, see EncodedImage. deep: see _has_16_bits. data: its file."""
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
    """uint16 to uint8 of the same shape, rounded; what is beyond the white level is white, and so
    is what is transparent."""
    levels = np.minimum(
        (np.arange(FULL_WHITE + 1) * 255 + white_level // 2) // white_level, 255
    ).astype(np.uint8)
    if transparent is not None:
        levels[transparent] = 255
    return levels[values]


def _deep_colours(data: bytes, white_level: int) -> tuple[PIL.Image.Image, int]:
    """RGB or RGBA, and the largest value of a colour. Pillow keeps the upper 8 of 16 bits alone,
    too few for data of 12."""
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
    """What to tell of images with 16 bits a channel, from the largest value of each and the level
    that was taken for white."""
    notes = []
    beyond, dark = [p for p in peaks if p > white_level], [p for p in peaks if 0 < p < _DARK]
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
            f"is an array of {pixels.dtype} {pixels.shape} where uint8 (height, width, 3) "
            "is expected"
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
