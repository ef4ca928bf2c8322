"""JPEG bytes, held against PIL."""

import io

import numpy as np
import PIL.Image
import pytest

from ffssl.data.convert import jpeg
from ffssl.data.convert.jpeg import JpegError
from damage import frame_size_at, without_segments


def picture(width=67, height=45, mode="RGB"):
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 60, (height, width))
    array = np.stack([x * 3 % 196 + noise, y * 4 % 196, 255 - y - x], -1).clip(0, 255).astype(np.uint8)
    return PIL.Image.fromarray(array).convert(mode)


def save(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def rgb(data):
    return np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB"))


def exif(orientation, endian="<"):
    data = PIL.Image.Exif()
    data.endian = endian
    data[0x0112] = orientation
    data[0x010F] = "a maker, before the orientation and too long to fit its entry"
    return data


@pytest.mark.parametrize("mode, components", [("RGB", 3), ("L", 1), ("CMYK", 4)])
@pytest.mark.parametrize("progressive", [False, True])
def test_header_agrees_with_pil(mode, components, progressive):
    header = jpeg.parse_header(save(picture(mode=mode), progressive=progressive))
    assert (header.width, header.height, header.components, header.precision) == (67, 45, components, 8)
    assert header.process == (jpeg.PROGRESSIVE if progressive else jpeg.BASELINE)
    assert header.decodes_to_rgb == (mode != "CMYK")


@pytest.mark.parametrize("endian", "<>")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation, endian):
    data = save(picture(), exif=exif(orientation, endian))
    assert PIL.Image.open(io.BytesIO(data)).getexif()[0x0112] == orientation
    assert jpeg.parse_header(data).orientation == orientation


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_senseless_orientation_counts_as_upright(value):
    assert jpeg.parse_header(save(picture(), exif=exif(value))).orientation == 1


def test_broken_exif_counts_as_upright():
    block = exif(6).tobytes()
    for damaged in (
        block[:9],
        block[:16],
        block[:6] + b"XX" + block[8:],
        block[:10] + b"\xff\xff\xff\x7f" + block[14:],
    ):
        assert jpeg.parse_header(save(picture(), exif=damaged)).orientation == 1


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size", [(1, 1), (16, 16), (67, 45)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_progressive_becomes_baseline_with_the_same_pixels(mode, size, subsampling):
    data = save(picture(*size, mode), progressive=True, subsampling=subsampling)
    baseline = jpeg.to_baseline(data)
    header = jpeg.parse_header(baseline)
    assert header.process == jpeg.BASELINE and (header.width, header.height) == size
    np.testing.assert_array_equal(rgb(baseline), rgb(data))
    jpeg.verify(baseline, header)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 2}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decodes_as_pil_does(mode, options):
    data = save(picture(mode=mode), **options)
    header = jpeg.parse_header(data)
    np.testing.assert_array_equal(jpeg.decode(data, header), rgb(data))
    half = jpeg.decode(data, header, 2)
    reference = np.asarray(picture(mode=mode).convert("RGB").resize((34, 23), PIL.Image.Resampling.BOX)).astype(int)
    assert half.shape == (23, 34, 3) and np.abs(half - reference).mean() < 8
    jpeg.verify(data, header)
    jpeg.verify_markers(data)


def test_every_truncation_is_found():
    data = save(picture(), restart_marker_blocks=3)
    header = jpeg.parse_header(data)
    for length in range(len(data) - 1):
        with pytest.raises(JpegError):
            jpeg.parse_header(data[:length])
            jpeg.verify(data[:length], header)
        with pytest.raises(JpegError):
            jpeg.verify_markers(data[:length])


def test_damage_inside_the_data_is_found():
    data = save(picture(300, 200), subsampling=0)
    header = jpeg.parse_header(data)
    middle = len(data) // 2
    zeroed = data[:middle] + bytes(300) + data[middle + 300 :]
    for damaged in (zeroed, data[:middle] + data[middle + 200 :], data[:middle] + b"\xff\xd9" + data[middle:]):
        with pytest.raises(JpegError):
            jpeg.verify(damaged, header)


def test_what_follows_the_image_does_no_harm():
    data = save(picture()) + b"\0" * 5000
    jpeg.verify(data, jpeg.parse_header(data))
    jpeg.verify_markers(data)


def test_a_size_beyond_what_the_data_can_hold_is_refused():
    data = bytearray(save(picture()))
    place = frame_size_at(data)
    for size in (b"\xff\xff\xff\xff", b"\x40\x00\x40\x00"):
        data[place : place + 4] = size
        with pytest.raises(JpegError, match=r"claims \d+ x \d+ pixels, more than"):
            jpeg.parse_header(bytes(data))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_even_a_blank_image_has_data_for_its_size(mode, progressive):
    data = save(PIL.Image.new(mode, (4000, 3000)), quality=1, optimize=True, progressive=progressive)
    jpeg.verify(data, jpeg.parse_header(data))


@pytest.mark.parametrize("marker", [0xDB, 0xC4])
def test_a_file_that_has_lost_its_tables_is_not_decoded_with_those_of_the_file_before(marker):
    whole = save(picture(), optimize=True)
    jpeg.verify(whole, jpeg.parse_header(whole))
    without = without_segments(whole, marker)
    with pytest.raises(JpegError):
        jpeg.verify(without, jpeg.parse_header(without))


def test_random_damage_never_crashes():
    whole = np.frombuffer(save(picture(), progressive=True, exif=exif(3)), np.uint8)
    random = np.random.default_rng(2)
    for _ in range(300):
        damaged = whole.copy()
        damaged[random.integers(0, len(whole), 3)] = random.integers(0, 256, 3)
        data = damaged[: random.integers(len(whole) // 2, len(whole) + 1)].tobytes()
        try:
            header = jpeg.parse_header(data)
            if header.width * header.height < 1 << 24 and header.decodes_to_rgb:
                jpeg.verify(data, header)
                jpeg.to_baseline(data)
        except JpegError:
            pass


def test_ffcv_is_not_imported():
    import subprocess
    import sys

    program = "import sys; from ffssl.data.convert import jpeg; jpeg.turbojpeg(); sys.exit('ffcv' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
