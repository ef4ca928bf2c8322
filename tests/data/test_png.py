"""PNG chunks: what is taken out of a file must leave its pixels to Pillow, and what damages these
must be seen."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
from PIL.PngImagePlugin import PngInfo

from ffssl.data.convert import exif, png

EXIF = exif.PREFIX + b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"


def picture(mode="RGB"):
    return PIL.Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    ).convert(mode)


def save(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def chunk(kind, payload, checksum=None):
    return (
        struct.pack(">I", len(payload))
        + kind
        + payload
        + struct.pack(">I", zlib.crc32(kind + payload) if checksum is None else checksum)
    )


def insert(data, *chunks, before=b"IDAT"):
    place = data.index(before) - 4
    return data[:place] + b"".join(chunks) + data[place:]


@pytest.mark.parametrize(
    "mode, options",
    [("RGB", {}), ("P", {"transparency": 3}), ("RGBA", {}), ("I;16", {}), ("1", {})],
)
def test_without_metadata_the_pixels_are_the_same(mode, options):
    image = (
        PIL.Image.fromarray(np.asarray(picture("L")) * np.uint16(257))
        if mode == "I;16"
        else picture(mode)
    )
    plain = save(image, **options)
    assert png.without_metadata(plain) == (plain, [])
    info = PngInfo()
    info.add_text("a", "some text")
    info.add_text("b", "more", zip=True)
    info.add_itxt("c", "text of another kind")
    full = save(image, pnginfo=info, exif=EXIF, dpi=(72, 72), icc_profile=b"a profile", **options)
    assert png.without_metadata(full) == (plain, [EXIF.removeprefix(exif.PREFIX)])


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
def test_damaged_metadata_is_taken_out_like_sound_one(before):
    plain = save(picture())
    for rubbish in (
        chunk(b"eXIf", b"rubbish"),
        chunk(b"tEXt", b"a\0b", checksum=1),
        chunk(b"pHYs", b"short"),
        chunk(b"iCCP", b"a\0\0not compressed"),
        chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(5_000_000))),
        chunk(b"zTXt", b"no end of the keyword"),
    ):
        assert png.without_metadata(insert(plain, rubbish, before=before))[0] == plain


def profile(data, name="exif"):
    return f"\n{name}\n{len(data):8}\n{data.hex()[:72]}\n{data.hex()[72:]}\n".encode()


def test_exif_as_imagemagick_wrote_it():
    plain, title = save(picture()), b"Raw profile type exif\0"
    for kind, text in ((b"tEXt", profile(EXIF)), (b"zTXt", b"\0" + zlib.compress(profile(EXIF)))):
        data = insert(plain, chunk(kind, title + text))
        assert PIL.Image.open(io.BytesIO(data)).getexif()[0x0112] == 6
        assert png.without_metadata(data) == (plain, [EXIF])
        later = insert(data, chunk(b"eXIf", b"here"), before=b"IEND")
        assert png.without_metadata(later) == (plain, [b"here", EXIF])
    for text in (b"", b"\nexif\n 3\nno digits", b"\0rubbish"):
        kept, blocks = png.without_metadata(
            insert(plain, chunk(b"zTXt", title + text), chunk(b"tEXt", title + text))
        )
        assert kept == plain and not any(blocks)
    bomb = title + b"\0" + zlib.compress(profile(EXIF) + b"0" * 50_000_000)
    (block,) = png.without_metadata(insert(plain, chunk(b"zTXt", bomb)))[1] or [b""]
    assert len(block) < 1 << 20


def test_a_wrong_checksum_of_pixels_is_seen_and_unknown_chunks_stay():
    plain = save(picture())
    place = plain.index(b"IDAT") + 20
    with pytest.raises(png.PngError, match="checksum"):
        png.without_metadata(plain[:place] + bytes([plain[place] ^ 1]) + plain[place + 1 :])
    unknown = insert(plain, chunk(b"abCd", b"what is it", checksum=1))
    assert png.without_metadata(unknown) == (unknown, [])


def test_a_cut_file_keeps_what_is_left():
    data = insert(save(picture()), chunk(b"tEXt", b"a\0b"))
    for length in range(len(png.SIGNATURE), len(data)):
        kept, _ = png.without_metadata(data[:length])
        assert kept in (data[:length], data[:length].replace(chunk(b"tEXt", b"a\0b"), b""))
