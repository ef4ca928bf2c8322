"""One image as it goes into a beton file: kept as it is where possible, otherwise decoded upright, reduced and encoded.

- A JPEG that libjpeg-turbo decodes to RGB, stands upright and is not too large keeps its bytes; greyscale ones too.
  Its data is decoded once to see that it is sound: ffcv ignores decoding errors and would train on what is left.
- A progressive one is re-coded as baseline, which decodes faster, from the same coefficients: the same pixels.
- Everything else is decoded: Exif orientation applied, transparency put on white, 16 bits rounded to 8, the first frame
  of an animation taken. It is reduced, never enlarged, with a Lanczos filter, and stored as raw pixels or as JPEG: at
  4:2:0 when it came lossily compressed, for then its chroma has been halved before, and at 4:4:4 otherwise.

Colour profiles are not applied, as nobody's training pipeline does.
"""

import io
import warnings
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import PIL.Image
import PIL.ImageOps

from ffssl.data.convert import jpeg
from ffssl.data.beton.read import MODE_JPEG, MODE_RAW
from ffssl.data.beton.write import MAX_SIDE
from ffssl.data.convert.sources.base import Image
from ffssl.errors import UserError

JPEG_MAX_SIDE = 65500  # libjpeg's own limit
RAW_MAX_BYTES = 1 << 30
PIL.Image.MAX_IMAGE_PIXELS = RAW_MAX_BYTES // 3 // 2  # Pillow warns of more, and refuses more than twice as many
_SUBSAMPLING_444, _SUBSAMPLING_420 = 0, 2
_LOSSY_FORMATS = {"JPEG", "MPO", "WEBP", "GIF"}
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
    BASELINE = "baseline"
    ENCODED = "encoded"
    RAW = "raw"


@dataclass(frozen=True)
class EncodedImage:
    """data: a JPEG file (MODE_JPEG), or pixels uint8 (height, width, 3) (MODE_RAW)."""

    data: bytes
    mode: int
    width: int
    height: int
    how: How


@dataclass(frozen=True)
class Encoding:
    """How images are stored.

    max_side: longest side in pixels, None for no limit. jpeg_quality: 0 to 100. quick_check: of a JPEG that keeps its
    bytes, check the markers only, not that all of its data decodes.
    """

    max_side: int | None = None
    jpeg_quality: int = 90
    quick_check: bool = False

    def __post_init__(self):
        if self.max_side is not None and not 1 <= self.max_side <= MAX_SIDE:
            raise UserError(f"max side {self.max_side}: must be 1 to {MAX_SIDE} pixels (--max-side)")
        if not 0 <= self.jpeg_quality <= 100:
            raise UserError(f"jpeg quality {self.jpeg_quality}: must be 0 to 100, 90 is a good choice (--jpeg-quality)")


def encode_image(image: Image, encoding: Encoding, compressed: bool = True) -> EncodedImage:
    """Encode one image from a source, as JPEG or, with compressed=False, as raw pixels.

    Raises BrokenImage when it is damaged, of an unknown kind or too large for the format.
    """
    lossless = True
    if isinstance(image, bytes):
        if jpeg.is_jpeg(image):
            try:
                header = jpeg.parse_header(image)
                if compressed and (done := _without_decoding(image, header, encoding)):
                    return done
                pixels, lossless = _decode_jpeg(image, header, encoding.max_side), False
            except jpeg.JpegError as error:
                raise BrokenImage(str(error)) from error
        else:
            pixels, lossless = _decode_with_pil(image)
    else:
        pixels = PIL.Image.fromarray(_checked_pixels(image))
    return _encode_pixels(_reduce(pixels, encoding.max_side), encoding.jpeg_quality, compressed, lossless)


def _without_decoding(data: bytes, header: jpeg.JpegHeader, encoding: Encoding) -> EncodedImage | None:
    fits = max(header.width, header.height) <= (encoding.max_side or JPEG_MAX_SIDE)
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
    if not header.decodes_to_rgb:
        # CMYK, arithmetic coding and the like: PIL's libjpeg knows more, but keeps quiet about damaged data.
        if header.precision == 8 and header.components == 4:
            jpeg.verify(data, header)
        return _decode_with_pil(data)[0]
    denominator = 1
    # libjpeg averages 2x2 pixels and more for next to nothing; twice the final size is left to the better filter.
    while max_side and denominator < 8 and max(header.width, header.height) >= 4 * denominator * max_side:
        denominator *= 2
    pixels = PIL.Image.fromarray(jpeg.decode(data, header, denominator))
    return pixels.transpose(_UPRIGHT[header.orientation]) if header.orientation != 1 else pixels


def _decode_with_pil(data: bytes) -> tuple[PIL.Image.Image, bool]:
    """The first frame, upright and RGB, and whether it was stored losslessly."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on odd metadata; what matters is raised
            image = PIL.Image.open(io.BytesIO(data))
            lossless = image.format not in _LOSSY_FORMATS
            image.load()
            return _to_rgb(PIL.ImageOps.exif_transpose(image)), lossless
    except PIL.UnidentifiedImageError:
        what = "is empty" if not data else "is not an image of a known format"
        raise BrokenImage(what) from None
    except PIL.Image.DecompressionBombError:
        raise BrokenImage(f"has more than {RAW_MAX_BYTES // 3 // 10**6} million pixels, too many to convert; reduce it first") from None
    except (BrokenImage, MemoryError):
        raise
    except Exception as error:  # PIL's decoders raise nearly anything on damaged data: SyntaxError, struct.error, ...
        raise BrokenImage(f"does not decode: {' '.join(str(error).split())}") from error


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.mode == "F":
        raise BrokenImage("has floating-point pixels, whose range is unknown; store it with 8 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        return PIL.Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    # PIL would clip these at 255.
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BrokenImage("has 32-bit pixels, whose range is unknown; store it with 8 or 16 bits")
    return PIL.Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


def _checked_pixels(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise BrokenImage(f"is an array of {pixels.dtype} {pixels.shape} where uint8 (height, width, 3) is expected")
    return np.ascontiguousarray(pixels)


def _reduce(image: PIL.Image.Image, max_side: int | None) -> PIL.Image.Image:
    longest = max(image.size)
    if max_side is None or longest <= max_side:
        return image
    size = tuple(max(1, round(side * max_side / longest)) for side in image.size)
    return image.resize(size, PIL.Image.Resampling.LANCZOS, reducing_gap=3.0)


def _encode_pixels(image: PIL.Image.Image, quality: int, compressed: bool, lossless: bool) -> EncodedImage:
    width, height = image.size
    limit = JPEG_MAX_SIDE if compressed else MAX_SIDE
    if max(width, height) > limit:
        raise BrokenImage(f"measures {width} x {height}, and a side may have {limit} pixels; pass --max-side")
    if not compressed:
        if 3 * width * height > RAW_MAX_BYTES:
            raise BrokenImage(f"takes {3 * width * height / 1e9:.1f} GB as raw pixels; pass --max-side")
        return EncodedImage(image.tobytes(), MODE_RAW, width, height, How.RAW)
    buffer = io.BytesIO()
    subsampling = _SUBSAMPLING_444 if lossless else _SUBSAMPLING_420
    image.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return EncodedImage(buffer.getvalue(), MODE_JPEG, width, height, How.ENCODED)
