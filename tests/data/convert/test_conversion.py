"""The conversion: pixels against PIL's, kept bytes against the files, and runs that are cut
short.
"""

import hashlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import zlib
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageOps
import pytest
from PIL.PngImagePlugin import PngInfo
from support.damage import behind_start, frame_size_at, segment

from ffssl.data.beton.description import identity
from ffssl.data.beton.read import MODE_JPEG, MODE_RAW, read_beton
from ffssl.data.convert import workers
from ffssl.data.convert.conversion import (
    ConversionError,
    ConvertOptions,
    convert,
    is_compressed,
    select_subset,
)
from ffssl.data.convert.encode import BrokenImage, Encoding, How, depth_notes, encode_image
from ffssl.data.convert.sources import Source
from ffssl.data.convert.sources.base import IMAGE_SUFFIXES
from ffssl.data.convert.sources.folder import ImageFolder
from ffssl.errors import UserError

QUIET = {"progress": False}


def picture(width=90, height=60, mode="RGB"):
    y, x = np.mgrid[:height, :width] * (200 / max(width, height))
    array = np.stack([x, y, 230 - (x + y) / 2], -1).astype(np.uint8)
    array[: height // 4, : width // 4] = (250, 20, 20)  # a corner that gives the orientation away
    return PIL.Image.fromarray(array).convert(mode)


def save(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(encoded):
    if encoded.mode == MODE_RAW:
        return np.frombuffer(encoded.data, np.uint8).reshape(encoded.height, encoded.width, 3)
    return np.asarray(PIL.Image.open(io.BytesIO(encoded.data)).convert("RGB"))


def assert_close(encoded, reference, mean=5, largest=160):
    """Within what JPEG at quality 90 does; a flip, a clipped or a misread channel is several times
    as far off.
    """
    got, reference = (
        pixels_of(encoded).astype(int),
        np.asarray(reference.convert("RGB")).astype(int),
    )
    assert got.shape == reference.shape == (encoded.height, encoded.width, 3)
    difference = np.abs(got - reference)
    assert difference.mean() < mean and difference.max() < largest


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "options", [{}, {"quality": 30}, {"subsampling": 0}, {"restart_marker_blocks": 1}]
)
def test_jpeg_keeps_its_bytes(mode, options):
    data = save(picture(mode=mode), **options)
    for encoding in (Encoding(), Encoding(max_side=90), Encoding(quick_check=True)):
        encoded = encode_image(data, encoding)
        assert encoded.data == data and (encoded.how, encoded.mode) == (How.KEPT, MODE_JPEG)
        assert (encoded.width, encoded.height) == (90, 60)


def test_progressive_keeps_its_pixels():
    data = save(picture(), progressive=True)
    encoded = encode_image(data, Encoding())
    assert encoded.how == How.BASELINE
    assert not PIL.Image.open(io.BytesIO(encoded.data)).info.get("progressive")
    np.testing.assert_array_equal(pixels_of(encoded), np.asarray(PIL.Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("max_side", [None, 45])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_applied(orientation, max_side):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = save(picture(), exif=exif, quality=95)
    reference = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data)))
    if max_side:
        reference = reference.resize(
            (reference.width // 2, reference.height // 2), PIL.Image.Resampling.LANCZOS
        )
    assert_close(encode_image(data, Encoding(max_side)), reference)
    raw = encode_image(data, Encoding(max_side), compressed=False)
    if max_side:
        assert_close(raw, reference, mean=2)
    else:
        np.testing.assert_array_equal(pixels_of(raw), np.asarray(reference))
    png = encode_image(save(picture(), "PNG", exif=exif), Encoding(max_side))
    assert (png.width, png.height) == reference.size
    assert_close(png, reference)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000"])
def test_other_formats(kind):
    if kind == "AVIF" and not PIL.features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    assert_close(encode_image(save(picture(), kind), Encoding()), picture())


def test_cmyk_and_its_relatives():
    for image, kind in [
        (picture(mode="CMYK"), "JPEG"),
        (picture(mode="CMYK"), "TIFF"),
        (picture(mode="YCbCr"), "TIFF"),
    ]:
        data = save(image, kind)
        reference = PIL.Image.open(io.BytesIO(data)).convert("RGB")
        assert_close(encode_image(data, Encoding()), reference)
        np.testing.assert_array_equal(
            pixels_of(encode_image(data, Encoding(), compressed=False)), np.asarray(reference)
        )


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(kind):
    values = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    encoded = encode_image(save(PIL.Image.fromarray(values), kind), Encoding(), compressed=False)
    np.testing.assert_array_equal(
        pixels_of(encoded), np.repeat(np.round(values / 257).astype(np.uint8)[..., None], 3, 2)
    )


def test_transparency_is_put_on_white():
    image = picture().convert("RGBA")
    image.putalpha(PIL.Image.new("L", image.size, 51))
    expected = np.round(255 * 0.8 + np.asarray(picture()) * 0.2)
    raw = encode_image(save(image, "PNG"), Encoding(), compressed=False)
    assert np.abs(pixels_of(raw) - expected).max() <= 1
    for data in (
        save(PIL.Image.new("LA", (4, 4), (0, 0)), "PNG"),
        save(PIL.Image.new("P", (4, 4), 0), "PNG", transparency=0),
        save(PIL.Image.new("RGB", (4, 4), (9, 9, 9)), "PNG", transparency=(9, 9, 9)),
        save(PIL.Image.new("L", (4, 4), 7), "PNG", transparency=7),
        save(PIL.Image.new("P", (4, 4), 3), "GIF", transparency=3),
    ):
        assert (pixels_of(encode_image(data, Encoding(), compressed=False)) == 255).all()


RUBBISH = b"Exif\0\0rubbish rubbish"
EXIF_OF_SIX = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\1\x04\0\1\0\0\0\6\0\0\0\0\0\0\0"  # a LONG


def with_exif(kind, block):
    if kind == "JPEG":
        return behind_start(save(picture()), segment(0xE1, block))
    if kind == "CMYK":
        return behind_start(save(picture(mode="CMYK")), segment(0xE1, block))
    options = {"lossless": True} if kind == "WEBP" else {}
    return save(picture(), kind, exif=block, **options)


@pytest.mark.parametrize("kind", ["JPEG", "CMYK", "PNG", "WEBP", "AVIF"])
def test_damaged_exif_costs_no_image(kind):
    if kind == "AVIF":  # Pillow writes no damaged one
        exif = PIL.Image.Exif()
        exif[0x0112], exif[0x010F] = 6, "a maker"
        data = with_exif(kind, exif.tobytes())
        place = data.index(b"II*\0") if b"II*\0" in data else data.index(b"MM\0*")
        data = data[:place] + b"what" + data[place + 4 :]
        with pytest.raises(ValueError):
            PIL.Image.open(io.BytesIO(data))
        sound = save(picture(), kind)
    else:
        data, sound = with_exif(kind, RUBBISH), with_exif(kind, b"Exif\0\0")
    encoded = encode_image(data, Encoding(), compressed=False)
    reference = np.asarray(PIL.Image.open(io.BytesIO(sound)).convert("RGB"))
    if kind == "AVIF":  # with the orientation that stands in the file itself
        reference = np.rot90(reference, -1)
    np.testing.assert_array_equal(pixels_of(encoded), reference)


@pytest.mark.parametrize("kind", ["JPEG", "CMYK", "PNG", "WEBP", "AVIF", "TIFF"])
def test_orientation_stored_as_a_long_in_every_format(kind):
    data = with_exif(kind, EXIF_OF_SIX)
    reference = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))).convert("RGB")
    assert reference.size == (60, 90)
    np.testing.assert_array_equal(
        pixels_of(encode_image(data, Encoding(), compressed=False)), np.asarray(reference)
    )


XMP = "<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:Description tiff:Orientation=\"6\"/></x:xmpmeta>"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_orientation_in_xmp_is_read_in_no_format(kind):
    if kind == "PNG":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", XMP)
        options = {"pnginfo": info}
    else:
        options = {"tiffinfo": {700: XMP.encode()}} if kind == "TIFF" else {"xmp": XMP.encode()}
    data = save(picture(), kind, **options)
    assert PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))).size == (60, 90)
    assert_close(encode_image(data, Encoding()), picture())


def test_megabytes_of_text_cost_no_image():
    info = PngInfo()
    info.add_itxt("a comment", "A" * 3_000_000, zip=True)
    info.add_text("another", "B" * 3_000_000, zip=True)
    data = save(picture(), "PNG", pnginfo=info)
    with pytest.raises(ValueError, match="too large"):
        PIL.Image.open(io.BytesIO(data)).load()
    np.testing.assert_array_equal(
        pixels_of(encode_image(data, Encoding(), compressed=False)), np.asarray(picture())
    )


@pytest.mark.parametrize("quick_check", [False, True])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": EXIF_OF_SIX}])
def test_a_header_that_libjpeg_warns_of_is_mended(options, quick_check):
    sound = save(picture(), **options)
    place = sound.index(b"JFIF\0") + 5
    faulty = (
        sound[:place] + b"\0\0" + sound[place + 2 : place + 9] + b"between" + sound[place + 9 :]
    )
    reference, encoded = (
        encode_image(data, Encoding(quick_check=quick_check)) for data in (sound, faulty)
    )
    assert reference.how != How.MENDED
    assert encoded.how == (How.MENDED if reference.how == How.KEPT else reference.how)
    assert (encoded.width, encoded.height) == (reference.width, reference.height)
    np.testing.assert_array_equal(pixels_of(encoded), pixels_of(reference))
    if reference.how == How.KEPT:
        assert encoded.data == sound[:place] + b"\1\1" + sound[place + 2 :]


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deep_colours(values, *chunks):
    """A PNG of 16 bits a channel, which Pillow does not write.

    values: uint16 (height, width, 1 to 4).
    """
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    end = png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + end


def deep_tiff(values, orientation=1):
    """A TIFF of 16 bits a channel, uncompressed. values: uint16 (height, width, 3)."""
    height, width, _ = values.shape
    pixels, bits = values.astype("<u2").tobytes(), struct.pack("<HHH", 16, 16, 16)
    directory_at = 8 + len(bits) + len(pixels)
    short, long = 3, 4
    entries = (
        (256, long, 1, width),
        (257, long, 1, height),
        (258, short, 3, 8),
        (259, short, 1, 1),
        (262, short, 1, 2),
        (273, long, 1, 8 + len(bits)),
        (274, short, 1, orientation),
        (277, short, 1, 3),
        (278, long, 1, height),
        (279, long, 1, len(pixels)),
    )
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    header = b"II*\0" + struct.pack("<I", directory_at)
    return header + bits + pixels + struct.pack("<H", len(entries)) + table + bytes(4)


TWELVE_BITS = np.random.default_rng(0).integers(0, 4096, (30, 40, 3), np.uint16)
TWELVE_BITS[0, 0] = 4095


@pytest.mark.parametrize("write", [deep_colours, deep_tiff])
def test_the_white_level_of_16_bit_colours(write):
    expected = np.round(TWELVE_BITS * 255.0 / 4095)
    encoded = encode_image(write(TWELVE_BITS), Encoding(white_level=4095), compressed=False)
    np.testing.assert_array_equal(pixels_of(encoded), expected)
    assert encoded.peak == 4095
    dark = encode_image(write(TWELVE_BITS), Encoding(), compressed=False)
    np.testing.assert_array_equal(pixels_of(dark), TWELVE_BITS // 256)
    assert dark.peak == 4095
    beyond = encode_image(write(TWELVE_BITS), Encoding(white_level=1000), compressed=False)
    clipped = np.minimum(TWELVE_BITS, 1000)
    expected = np.floor(clipped * 255.0 / 1000 + 0.5)  # halves go up
    np.testing.assert_array_equal(pixels_of(beyond), expected)


@pytest.mark.parametrize("white_level", [65535, 4095])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_16_bit_colours_are_turned_once(orientation, white_level):
    values = np.clip(TWELVE_BITS // 16 * 16, 0, 4095) * np.uint16(white_level // 4095)
    reference = encode_image(deep_tiff(values), Encoding(white_level=white_level), compressed=False)
    image = PIL.Image.fromarray(pixels_of(reference))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    upright = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(save(image, "PNG", exif=exif))))
    block = png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    for data in (deep_tiff(values, orientation), deep_colours(values, block)):
        turned = encode_image(data, Encoding(white_level=white_level), compressed=False)
        np.testing.assert_array_equal(pixels_of(turned), np.asarray(upright))


def test_the_white_level_of_16_bit_grey_and_transparent_images():
    grey = TWELVE_BITS[..., :1]
    expected = np.repeat(np.round(grey * 255.0 / 4095), 3, 2)
    for data in (
        deep_colours(grey),
        save(PIL.Image.fromarray(grey[..., 0]), "TIFF"),
        save(PIL.Image.fromarray(grey[..., 0].astype(np.int32)), "TIFF"),
    ):
        encoded = encode_image(data, Encoding(white_level=4095), compressed=False)
        np.testing.assert_array_equal(pixels_of(encoded), expected)
        assert encoded.peak == encode_image(data, Encoding()).peak == 4095
    opaque = np.full_like(grey, 65535)
    for channels in ((grey, opaque), (TWELVE_BITS, opaque)):
        encoded = encode_image(
            deep_colours(np.dstack(channels)), Encoding(white_level=4095), compressed=False
        )
        np.testing.assert_array_equal(
            pixels_of(encoded), np.round(channels[0] * 255.0 / 4095) * np.ones(3)
        )
        clear = encode_image(
            deep_colours(np.dstack((channels[0], 0 * opaque))),
            Encoding(white_level=4095),
            compressed=False,
        )
        assert (pixels_of(clear) == 255).all()
    key = encode_image(
        deep_colours(grey, png_chunk(b"tRNS", struct.pack(">H", 4095))),
        Encoding(),
        compressed=False,
    )
    np.testing.assert_array_equal(pixels_of(key)[..., 0] == 255, grey[..., 0] == 4095)


def test_files_that_state_their_white_go_by_that():
    pgm = b"P5 40 30 4095\n" + TWELVE_BITS[..., 0].astype(">u2").tobytes()
    jpeg_2000 = save(PIL.Image.fromarray(TWELVE_BITS[..., 0] * np.uint16(16)), "JPEG2000")
    for data in (pgm, jpeg_2000):
        one, other = (
            encode_image(data, Encoding(white_level=level), compressed=False)
            for level in (65535, 4095)
        )
        assert one == other and one.peak is None
        assert np.abs(pixels_of(one)[..., 0] - TWELVE_BITS[..., 0] * 255.0 / 4095).max() <= 1
    raw = encode_image(
        b"P5 40 30 65535\n" + TWELVE_BITS[..., 0].astype(">u2").tobytes(),
        Encoding(white_level=4095),
        compressed=False,
    )
    np.testing.assert_array_equal(
        pixels_of(raw)[..., 0], np.round(TWELVE_BITS[..., 0] * 255.0 / 4095)
    )
    eight = encode_image(save(picture(), "PNG"), Encoding(white_level=4095), compressed=False)
    np.testing.assert_array_equal(pixels_of(eight), np.asarray(picture()))
    assert eight.peak is None


def test_what_is_said_of_16_bits():
    assert (
        depth_notes([], 65535)
        == depth_notes([65535, 20_000, 0], 65535)
        == depth_notes([4095, 12], 4095)
        == []
    )
    (note,) = depth_notes([65535, 3900, 1000], 65535)
    assert note.startswith("2 images of 16 bits hold no value above 3900") and note.endswith(
        "pass --white-level 4095"
    )
    assert "--white-level 16383" in depth_notes([16383, 5], 65535)[0]
    (note,) = depth_notes([4095, 5000, 4096], 4095)
    assert note.startswith("2 images of 16 bits hold values beyond --white-level 4095, up to 5000")


def blank(width, height):
    """A grey JPEG of that size, its coded data laid out by hand: each block takes 6 bits."""
    data = save(PIL.Image.new("L", (16, 16), 128), quality=75)
    place, scan = frame_size_at(data), data.index(b"\xff\xda")
    header = data[:place] + struct.pack(">HH", height, width) + data[place + 4 : scan + 10]
    blocks = -(-width // 8) * -(-height // 8)
    assert blocks % 4 == 0
    # In each block: no difference (00), no coefficients (1010).
    return header + b"\x28\xa2\x8a" * (blocks // 4) + b"\xff\xd9"


def test_a_jpeg_larger_than_other_formats_may_be_is_named_with_what_helps():
    data = blank(16_000, 22_400)
    with pytest.raises(
        BrokenImage, match="16000 x 22400, more than 357 million pixels; pass --max-side"
    ):
        encode_image(data, Encoding())
    with pytest.raises(BrokenImage, match="pass a smaller --max-side"):
        encode_image(data, Encoding(max_side=20_000))
    encoded = encode_image(data, Encoding(max_side=500))
    assert (encoded.width, encoded.height) == (357, 500) and (pixels_of(encoded) == 128).all()
    progressive = data.replace(b"\xff\xc0", b"\xff\xc2", 1)
    for encoding in (Encoding(), Encoding(max_side=500)):
        with pytest.raises(
            BrokenImage, match="is progressive and measures 16000 x 22400, .*; reduce it first"
        ):
            encode_image(progressive, encoding)


def test_palette_bilevel_and_first_frame():
    palette = picture().convert("P")
    assert_close(encode_image(save(palette, "PNG"), Encoding()), palette, mean=8)
    bilevel = picture().convert("1")
    raw = encode_image(save(bilevel, "PNG"), Encoding(), compressed=False)
    np.testing.assert_array_equal(pixels_of(raw), np.asarray(bilevel.convert("RGB")))
    frames = save(
        PIL.Image.new("RGB", (8, 8), "red"),
        "GIF",
        save_all=True,
        append_images=[PIL.Image.new("RGB", (8, 8), "blue")],
    )
    assert (pixels_of(encode_image(frames, Encoding(), compressed=False)) == (255, 0, 0)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (401, 3), (333, 250), (1600, 1200)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_reduction_keeps_shape_and_content(size, kind):
    data = save(picture(*size), kind)
    encoded = encode_image(data, Encoding(max_side=100), compressed=False)
    scale = min(1, 100 / max(size))
    assert (encoded.width, encoded.height) == tuple(max(1, round(s * scale)) for s in size)
    reference = PIL.Image.open(io.BytesIO(data)).resize(
        (encoded.width, encoded.height), PIL.Image.Resampling.LANCZOS
    )
    assert_close(encoded, reference, mean=1.5)


def test_lossless_sources_keep_full_chroma():
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))

    def layers(data):
        return PIL.Image.open(io.BytesIO(data)).layer[0][1:3]

    assert layers(encode_image(save(image, "PNG"), Encoding()).data) == (1, 1)
    assert layers(encode_image(np.asarray(image), Encoding()).data) == (1, 1)
    assert layers(encode_image(save(image, "WEBP"), Encoding()).data) == (2, 2)
    low, high = (
        len(encode_image(np.asarray(image), Encoding(jpeg_quality=q)).data) for q in (10, 95)
    )
    assert low < high / 2


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "is empty"),
        (b"not an image", "not an image of a known format"),
        (save(picture())[:-40], "[Pp]remature end"),
        (save(picture())[:20], "cut header"),
        (save(picture(), progressive=True)[:-40], "[Pp]remature end|Huffman"),
        (save(picture(mode="CMYK"))[:-200], "[Pp]remature end"),
        (save(picture(), "PNG")[:-200], "does not decode"),
        (save(picture(), "GIF")[:-200], "does not decode"),
        (save(picture(mode="F"), "TIFF"), "floating-point"),
        (save(PIL.Image.new("RGB", (65501, 1)), "PNG"), "65501 x 1.*--max-side"),
        (np.zeros((4, 4), np.uint8), r"uint8 \(4, 4\) where"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
    ],
)
def test_broken_images_say_why(data, reason):
    with pytest.raises(BrokenImage, match=reason):
        encode_image(data, Encoding())


def without_height(data):
    place = frame_size_at(data)
    return data[:place] + b"\0\0" + data[place + 2 :]


@pytest.mark.parametrize("quick_check", [False, True])
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_jpeg_without_height_is_broken(options, quick_check):
    with pytest.raises(BrokenImage, match="no width or no height"):
        encode_image(without_height(save(picture(), **options)), Encoding(quick_check=quick_check))


def claims(width, height):
    """A bilevel PNG of that size by its header, cut off as its data begin."""
    data = save(PIL.Image.new("1", (1, 1)), "PNG")
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:43]


def test_what_pillow_refuses_for_its_size_is_what_the_format_cannot_hold():
    with pytest.raises(BrokenImage, match="more than 357 million pixels"):
        encode_image(claims(20_000, 17_900), Encoding())
    with pytest.raises(BrokenImage, match="does not decode: .*truncated"):
        encode_image(claims(20_000, 17_800), Encoding())


def test_options_are_checked():
    for make in (
        lambda: Encoding(jpeg_quality=101),
        lambda: Encoding(jpeg_quality=-1),
        lambda: Encoding(max_side=0),
        lambda: Encoding(max_side=1 << 16),
        lambda: Encoding(white_level=0),
        lambda: Encoding(white_level=1 << 16),
        lambda: ConvertOptions(workers=0),
        lambda: ConvertOptions(subset=0),
        lambda: ConvertOptions(part=(0, 2)),
        lambda: ConvertOptions(part=(3, 2)),
        lambda: ConvertOptions(part=(1, 0)),
        lambda: ConvertOptions(compressed_share=1.1),
        lambda: ConvertOptions(compressed_share=float("nan")),
    ):
        with pytest.raises(UserError, match=r"\(--"):
            make()


def test_share_and_subset():
    indices = np.arange(20_000)
    assert is_compressed(indices, 1.0).all() and not is_compressed(indices, 0.0).any()
    assert abs(is_compressed(indices, 0.3).mean() - 0.3) < 0.015
    assert (is_compressed(indices, 0.3) <= is_compressed(indices, 0.4)).all()
    small, large = select_subset(20_000, 500, 7), select_subset(20_000, 2000, 7)
    assert (
        len(set(small.tolist())) == 500 and set(small) <= set(large) and (np.diff(small) > 0).all()
    )
    assert set(small) != set(select_subset(20_000, 500, 8))
    assert abs(large.mean() - 10_000) < 500
    with pytest.raises(UserError, match="only 10 images"):
        select_subset(10, 11, 0)


@pytest.fixture
def folder(tmp_path):
    """24 images of many kinds in two classes."""
    root = tmp_path / "images"
    for label in "ab":
        (root / label).mkdir(parents=True)
    for i in range(24):
        image = picture(40 + 5 * i, 90 - 2 * i)
        kind, options = [
            ("JPEG", {}),
            ("PNG", {}),
            ("JPEG", {"progressive": True}),
            ("JPEG", {"quality": 50}),
        ][i % 4]
        (root / "ab"[i % 2] / f"{i:02d}.{kind.lower()}").write_bytes(save(image, kind, **options))
    return root


def convert_folder(folder, name="out.beton", encoding=Encoding(), **options):
    path = folder.parent / name
    return path, convert(
        ImageFolder(folder), path, ConvertOptions(encoding=encoding, **{**QUIET, **options})
    )


def test_a_whole_run(folder):
    path, summary = convert_folder(folder, workers=2)
    beton, data, source = read_beton(path), path.read_bytes(), ImageFolder(folder)
    assert (
        summary.counts == {"kept": 12, "mended": 0, "baseline": 6, "encoded": 6, "raw": 0}
        and summary.samples == 24
    )
    assert beton.labels.tolist() == [0] * 12 + [1] * 12
    for i, (row, size) in enumerate(zip(beton.images, beton.image_sizes)):
        (original, label), name = source.load(i), source.name(i)
        stored = data[int(row["data_ptr"]) :][: int(size)]
        assert label == beton.labels[i]
        reference = PIL.Image.open(name)
        assert reference.size == (row["width"], row["height"])
        if name.endswith("jpeg") and not reference.info.get("progressive"):
            assert stored == original
        assert (
            np.abs(
                np.asarray(PIL.Image.open(io.BytesIO(stored))).astype(int) - np.asarray(reference)
            ).mean()
            < 3
        )
    description = json.loads((folder.parent / "out.beton.json").read_text())
    assert description["sha256"] == summary.sha256 == hashlib.sha256(data).hexdigest()
    assert (
        description["class_names"] == ["a", "b"]
        and description["samples"] == 24
        and description["skipped"] == []
    )


def test_no_changed_bit_of_a_files_tables_goes_unnoticed(folder):
    path, _ = convert_folder(folder)
    beton, data = read_beton(path), path.read_bytes()
    expected, table = identity(beton), 24 * len(beton)
    assert expected["samples"] == 24
    rows = 24 + 2 * 1041  # where they begin, after the header and the fields
    places = [
        *range(24),
        *np.random.default_rng(0).integers(24, rows + 24 * 24, 200),
        *range(len(data) - table, len(data)),
    ]
    refused = 0

    def write(place, value):
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(bytes([value]))

    for place in places:
        write(place, data[place] ^ 1 << place % 8)
        try:
            assert identity(read_beton(path)) == expected  # a byte of no meaning
        except UserError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ")
        write(place, data[place])
    # Whose pointers and sizes decide; the samples' numbers in it do not.
    assert refused > 2 * table // 3
    path.write_bytes(data[:-100])
    with pytest.raises(UserError, match="cut short"):
        read_beton(path)


def test_another_file_beside_the_description_is_refused(folder):
    path, _ = convert_folder(folder)
    other, _ = convert_folder(folder, "other.beton", subset=20)
    path.write_bytes(other.read_bytes())
    with pytest.raises(
        UserError, match="out.beton: damaged, or not the file that out.beton.json describes"
    ):
        identity(read_beton(path))
    Path(f"{path}.json").unlink()
    assert identity(read_beton(path)) | {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest()
    } == identity(read_beton(other))


@pytest.mark.parametrize("parts, options", [(3, {}), (5, {"subset": 17, "compressed_share": 0.5})])
def test_the_parts_of_a_source_hold_each_of_its_samples_once_as_the_whole_file_does(
    folder, parts, options
):
    whole, summary = convert_folder(folder, **options)
    stored, labels = [], []
    for k in range(1, parts + 1):  # of 24 samples in the order of their classes
        path, part = convert_folder(folder, f"{k}.beton", part=(k, parts), **options)
        assert part.class_names == summary.class_names == ["a", "b"]
        assert abs(part.samples - summary.samples / parts) < 1
        stored += stored_images(path)
        labels += read_beton(path).labels.tolist()
    assert stored == stored_images(whole)
    assert labels == read_beton(whole).labels.tolist()


def stored_images(path):
    beton, data = read_beton(path), path.read_bytes()
    begins = beton.images["data_ptr"].tolist()
    return [data[begin:][:size] for begin, size in zip(begins, beton.image_sizes.tolist())]


def test_a_part_without_an_image_is_refused(folder):
    with pytest.raises(UserError, match=r"part 25/25: there are only 24 images \(--part\)"):
        convert_folder(folder, part=(25, 25))


def test_bytes_do_not_depend_on_workers(folder):
    options = {"compressed_share": 0.5, "subset": 20, "encoding": Encoding(max_side=70)}
    runs = [
        convert_folder(folder, workers=workers, overwrite=True, **options)
        for workers in (1, 2, 4, 1)
    ]
    assert len({summary.sha256 for _, summary in runs}) == 1
    assert 0 < runs[0][1].counts["raw"] < 20
    path = runs[0][0]
    first = (path.read_bytes(), (folder.parent / "out.beton.json").read_bytes())
    convert_folder(folder, workers=3, overwrite=True, **options)
    assert (path.read_bytes(), (folder.parent / "out.beton.json").read_bytes()) == first


def test_the_largest_image_and_dark_ones_are_told_of(folder, monkeypatch):
    for i in range(3):
        (folder / "a" / f"deep{i}.png").write_bytes(deep_colours(TWELVE_BITS))
    path, summary = convert_folder(folder, workers=2)
    largest = str(folder / "a" / "18.jpeg")
    assert summary.largest == (largest, 130, 54)
    (note,) = summary.notes
    assert note.startswith("3 images of 16 bits hold no value above 4095")
    description = json.loads(Path(f"{path}.json").read_text())
    assert description["notes"] == [note] and description["largest"] == {
        "name": largest,
        "width": 130,
        "height": 54,
    }
    monkeypatch.setattr("ffssl.data.convert.conversion._LARGE", 130 * 54)
    _, summary = convert_folder(folder, encoding=Encoding(white_level=4095), overwrite=True)
    assert summary.notes == [
        f"the largest image, {largest}, measures 130 x 54: "
        "each thread of the loader takes 0.0 GB for it; --max-side reduces it"
    ]


def test_suffixes_of_images():
    assert {
        ".jpg",
        ".jpeg",
        ".png",
        ".webp",
        ".avif",
        ".jp2",
        ".tif",
        ".tiff",
        ".bmp",
        ".gif",
    } <= IMAGE_SUFFIXES
    known = PIL.Image.registered_extensions()
    assert {suffix for suffix in IMAGE_SUFFIXES if suffix not in known} <= {".jpx"}


def break_image(folder):
    broken = folder / "a" / "08.jpeg"
    broken.write_bytes(broken.read_bytes()[:-300])
    return broken


@pytest.mark.parametrize("workers", [1, 2])
def test_a_broken_image_ends_the_run_by_name(folder, workers):
    broken = break_image(folder)
    with pytest.raises(ConversionError, match=rf"{broken}: .*remature end.*--skip-broken"):
        convert_folder(folder, workers=workers)
    assert os.listdir(folder.parent) == ["images"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_broken_image_is_skipped_and_listed(folder, workers):
    broken = break_image(folder)
    path, summary = convert_folder(folder, workers=workers, skip_broken=True)
    assert len(read_beton(path)) == summary.samples == 23
    ((name, reason),) = summary.skipped
    assert name == str(broken) and "remature end" in reason
    assert json.loads(Path(f"{path}.json").read_text())["skipped"] == [
        {"name": name, "reason": reason}
    ]


def test_what_is_left_out_is_in_the_summary_and_the_description(folder):
    for name in ("b/notes.txt", "a/y.heic", "a/x.heic", "a/z"):
        (folder / name).write_bytes(b"")
    path, summary = convert_folder(folder)
    assert summary.passed_over == [
        (".heic", 2, "a/x.heic"),
        (".txt", 1, "b/notes.txt"),
        ("without suffix", 1, "a/z"),
    ]
    description = json.loads(Path(f"{path}.json").read_text())
    assert description["passed_over"] == [
        {"kind": kind, "files": count, "first": first} for kind, count, first in summary.passed_over
    ]
    assert (summary.labels, summary.unlabelled, description["unlabelled"]) == (2, 0, 0)


def test_class_names_that_are_no_utf8_become_text(folder):
    os.rename(folder / "b", os.fsencode(folder) + b"/caf\xe9\n")
    os.rename(folder / "a", folder / "caf\u00e9")
    path, summary = convert_folder(folder)
    assert summary.class_names == ["caf\u00e9", r"caf\xe9\x0a"]
    description = Path(f"{path}.json").read_bytes()
    assert (
        b"\\ud" not in description and json.loads(description)["class_names"] == summary.class_names
    )
    assert read_beton(path).labels.tolist() == [0] * 12 + [1] * 12


class Numbered(Source):
    """One grey image for each label that is given."""

    origin = "here"

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return f"sample {index}"

    def load(self, index):
        return np.zeros((8, 8, 3), np.uint8), self.labels[index]


def test_labels_are_stored_as_they_are(tmp_path):
    labels = [2**63 - 1, 0, -(2**63), 1_400_000_000, -1, 0]
    summary = convert(Numbered(labels), tmp_path / "out.beton", ConvertOptions(**QUIET))
    assert read_beton(tmp_path / "out.beton").labels.tolist() == labels
    assert (summary.labels, summary.unlabelled, summary.class_names) == (4, 1, None)


def test_nothing_but_broken_images(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ConversionError, match="all 1 images are broken"):
        convert(
            ImageFolder(tmp_path), tmp_path / "out.beton", ConvertOptions(skip_broken=True, **QUIET)
        )


def test_an_unreadable_file_is_never_skipped(folder):
    source = ImageFolder(folder)
    (folder / "a" / "04.jpeg").unlink()
    with pytest.raises(ConversionError, match="04.jpeg: cannot be read: No such file"):
        convert(source, folder.parent / "out.beton", ConvertOptions(skip_broken=True, **QUIET))


def test_existing_output_is_kept_unless_told(folder):
    path, _ = convert_folder(folder)
    before = path.read_bytes()
    with pytest.raises(UserError, match="exists already; pass --overwrite"):
        convert_folder(folder)
    break_image(folder)
    with pytest.raises(ConversionError):
        convert_folder(folder, overwrite=True)
    assert path.read_bytes() == before
    assert (
        json.loads(Path(f"{path}.json").read_text())["sha256"] == hashlib.sha256(before).hexdigest()
    )


def test_a_description_that_cannot_be_put_beside_the_file_is_refused_first(folder):
    (folder.parent / "out.beton.json").mkdir()
    with pytest.raises(UserError, match="out.beton.json: is not a file"):
        convert_folder(folder)
    assert sorted(os.listdir(folder.parent)) == ["images", "out.beton.json"]


def test_a_description_that_cannot_be_removed_ends_the_run_by_name(folder, monkeypatch):
    path, _ = convert_folder(folder)
    before = path.read_bytes()
    unlink = Path.unlink

    def refuse(self, *arguments, **options):
        if self.suffix == ".json":
            raise PermissionError(1, "Operation not permitted", str(self))
        unlink(self, *arguments, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(
        ConversionError, match="out.beton.json: cannot be replaced: Operation not permitted"
    ):
        convert_folder(folder, overwrite=True, subset=3)
    assert path.read_bytes() == before


class Unpooled:
    """A pool whose workers finish at once; `ahead`: results that wait for their consumer, after
    each submission.
    """

    def __init__(self):
        self.waiting, self.ahead = 0, []

    def submit(self, _, items):
        self.waiting += len(items)
        self.ahead.append(self.waiting)
        future = Future()
        future.set_result((list(items), None))
        return future


@pytest.mark.parametrize("size, most", [(10, 10), (40, 2), (1000, 2)])
def test_results_ahead_of_their_consumer_are_held_to_a_number_of_bytes(monkeypatch, size, most):
    monkeypatch.setattr(workers, "IN_FLIGHT_BYTES", 100)
    pool = Unpooled()
    for result in workers._in_chunks(pool, [size] * 50, 10, size_of=lambda result: result):
        assert result == size
        pool.waiting -= 1
    assert max(pool.ahead[10:]) == most  # the first ten are handed out before any size is known


class Deadly(Source):
    """Kills the worker that reads sample 30, as the kernel does when memory runs out."""

    origin = "here"

    def __len__(self):
        return 60

    def name(self, index):
        return f"sample {index}"

    def load(self, index):
        if index == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.zeros((8, 8, 3), np.uint8), 0


def test_a_killed_worker_is_reported(tmp_path):
    signal.alarm(60)
    with pytest.raises(
        ConversionError, match="a worker process was killed near sample [123]?[0-9],"
    ):
        convert(Deadly(), tmp_path / "out.beton", ConvertOptions(workers=2, **QUIET))
    signal.alarm(0)
    assert os.listdir(tmp_path) == []


CONVERT = """
from ffssl.data.convert.conversion import ConvertOptions, convert
from ffssl.data.convert.sources.folder import ImageFolder
{}convert(ImageFolder("images"), "out.beton", ConvertOptions(workers=2, progress=False))
"""


def run_program(folder: Path, program: str) -> subprocess.CompletedProcess:
    (folder / "program.py").write_text(program)
    root = Path(__file__).resolve().parents[3]
    return subprocess.run(
        [sys.executable, "program.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize(
    "program",
    [CONVERT.format(""), CONVERT.format("if __name__ != '__main__': raise SystemExit('no')\n")],
    ids=["calls again", "fails"],
)
def test_a_program_that_workers_cannot_import_is_told(folder, program):
    result = run_program(folder.parent, program)
    assert result.returncode == 1 and result.stderr.count("Traceback") == 1, result.stderr
    last = result.stderr.splitlines()[-1]
    assert (
        last.startswith("ffssl.errors.UserError: the worker processes did not start")
        and '`if __name__ == "__main__":`' in last
    )
    assert sorted(os.listdir(folder.parent)) == ["images", "program.py"]


def test_programs_own_processes_hear_of_ctrl_c_after_a_conversion(folder):
    """All that are forked by one server, which conversion may have started."""
    result = run_program(
        folder.parent,
        """
import multiprocessing, signal

def check():
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

if __name__ == "__main__":"""
        + CONVERT.format("").replace("\n", "\n    ")
        + """
    process = multiprocessing.get_context("forkserver").Process(target=check)
    process.start()
    process.join()
    raise SystemExit(process.exitcode)
""",
    )
    assert result.returncode == 0, result.stderr


def test_photographs_keep_their_bytes(shared_data, tmp_path):
    import tarfile

    with tarfile.open(shared_data / "flowers-small.tar") as archive:
        archive.extractall(
            tmp_path, [m for m in archive.getmembers() if "/val/" in m.name], filter="data"
        )
    path, summary = convert_folder(tmp_path / "flowers-small" / "val", workers=2)
    source, beton, data = (
        ImageFolder(tmp_path / "flowers-small" / "val"),
        read_beton(path),
        path.read_bytes(),
    )
    assert summary.counts["kept"] == len(beton) == 100
    for i, (row, size) in enumerate(zip(beton.images, beton.image_sizes)):
        assert data[int(row["data_ptr"]) :][: int(size)] == source.load(i)[0]
