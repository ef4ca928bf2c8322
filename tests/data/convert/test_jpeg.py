"""JPEG bytes, held against PIL."""

import io

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from support.damage import behind_start, frame_size_at, segment, segments, without_segments

from ffssl.data.convert import jpeg
from ffssl.data.convert.exif import PREFIX
from ffssl.data.convert.jpeg import JpegError

APP1 = 0xE1


def picture(width=67, height=45, mode="RGB"):
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 60, (height, width))
    array = (
        np.stack([x * 3 % 196 + noise, y * 4 % 196, 255 - y - x], -1).clip(0, 255).astype(np.uint8)
    )
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
    assert (header.width, header.height, header.components, header.precision) == (
        67,
        45,
        components,
        8,
    )
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


def exif_segments(*blocks):
    return behind_start(save(picture()), *(segment(APP1, block) for block in blocks))


SIX, ONE = exif(6).tobytes(), exif(1).tobytes()
WITH_EXIF = {
    "two that disagree": exif_segments(SIX, ONE),
    "an empty one behind": exif_segments(SIX, PREFIX),
    "an empty one before": exif_segments(PREFIX, SIX),
    "one in two segments": exif_segments(SIX + bytes(40_000), PREFIX + bytes(40_000)),
    "XMP before": exif_segments(b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='3'/>", SIX),
    "behind other metadata": behind_start(
        save(picture()),
        segment(0xED, b"Photoshop 3.0\0"),
        segment(APP1, SIX),
        segment(0xFE, b"text"),
    ),
}


@pytest.mark.parametrize("name", WITH_EXIF)
def test_orientation_in_several_segments_is_what_others_read(name):
    import cv2
    import torch
    import torchvision

    data = WITH_EXIF[name]
    assert jpeg.parse_header(data).orientation == 6
    file = torch.tensor(list(data), dtype=torch.uint8)
    pillows = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data)))
    torchvisions = torchvision.io.decode_jpeg(file, apply_exif_orientation=True)
    opencvs = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    upright = (67, 45)  # height, width
    others = {
        "Pillow": (pillows.height, pillows.width),
        "OpenCV": opencvs.shape[:2],
        "torchvision": tuple(torchvisions.shape[1:]),
    }
    if name in ("an empty one before", "XMP before"):
        others.pop("torchvision")  # which looks at the first segment alone
    assert set(others.values()) == {upright}, others


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


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 2}]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decodes_as_pil_does(mode, options):
    data = save(picture(mode=mode), **options)
    header = jpeg.parse_header(data)
    np.testing.assert_array_equal(jpeg.decode(data, header), rgb(data))
    half = jpeg.decode(data, header, 2)
    reference = np.asarray(
        picture(mode=mode).convert("RGB").resize((34, 23), PIL.Image.Resampling.BOX)
    ).astype(int)
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
    for damaged in (
        zeroed,
        data[:middle] + data[middle + 200 :],
        data[:middle] + b"\xff\xd9" + data[middle:],
    ):
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
    data = save(
        PIL.Image.new(mode, (4000, 3000)), quality=1, optimize=True, progressive=progressive
    )
    jpeg.verify(data, jpeg.parse_header(data))


@pytest.mark.parametrize("marker", [0xDB, 0xC4])
def test_a_file_without_its_tables_is_not_decoded_with_the_last_files(marker):
    whole = save(picture(), optimize=True)
    jpeg.verify(whole, jpeg.parse_header(whole))
    without = without_segments(whole, marker)
    with pytest.raises(JpegError):
        jpeg.verify(without, jpeg.parse_header(without))


# Faults of headers, as cameras and editors write them: libjpeg warns, and other programs read the
# picture


def version_of_jfif(data, version=b"\0\0"):
    place = data.index(b"JFIF\0") + 5
    return data[:place] + version + data[place + 2 :]


def scans_without_parameters(data):
    for _place, end in jpeg_scans(data):
        data = data[: end - 3] + bytes(3) + data[end:]
    return data


def jpeg_scans(data):
    return [(begin, end) for begin, marker, end in jpeg._segments(data) if marker == 0xDA]


def bytes_between(data, inserted=b"\1\2\3\4\xff\0\5", marker=0xDB):
    place = data.index(bytes([0xFF, marker]))
    return data[:place] + inserted + data[place:]


def unknown_transform(data, value=7):
    return behind_start(
        without_segments(data, 0xE0), segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([value]))
    )


def scan_by_scan():
    """A baseline file of one scan a component: the coded data of three greyscale files."""
    planes = [save(plane) for plane in picture().convert("YCbCr").split()]
    parts = {
        marker: b"".join(
            planes[0][a:b] for a, b in segments(planes[0]) if planes[0][a + 1] == marker
        )
        for marker in (0xDB, 0xC4)
    }
    frame = segment(0xC0, b"\x08\0\x2d\0\x43\x03" + b"\1\x11\0\2\x11\0\3\x11\0")
    scans = [
        segment(0xDA, bytes([1, i + 1, 0, 0, 63, 0])) + plane[jpeg_scans(plane)[0][1] : -2]
        for i, plane in enumerate(planes)
    ]
    return (
        b"\xff\xd8"
        + segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0")
        + parts[0xDB]
        + frame
        + parts[0xC4]
        + b"".join(scans)
        + b"\xff\xd9"
    )


FAULTS = {
    "JFIF 0.00": version_of_jfif,
    "JFIF 2.01": lambda data: version_of_jfif(data, b"\2\1"),
    "scans without parameters": scans_without_parameters,
    "bytes between segments": bytes_between,
    "zeros before the frame": lambda data: bytes_between(
        data, bytes(40), marker=data[frame_size_at(data) - 4]
    ),
    "a line end before the first table": lambda data: bytes_between(data, b"\r\n", marker=0xC4),
    "an unknown transform": unknown_transform,
    "several": lambda data: scans_without_parameters(
        bytes_between(bytes_between(version_of_jfif(data)), b"\0", marker=0xDA)
    ),
}
FILES = {
    "RGB": save(picture()),
    "grey": save(picture(mode="L")),
    "optimized": save(picture(), optimize=True, subsampling=0),
    "restarts": save(picture(), restart_marker_blocks=2),
    "scan by scan": scan_by_scan(),
    "progressive": save(picture(), progressive=True),
}
NO_FAULTS = {
    ("grey", "an unknown transform"),
    ("progressive", "scans without parameters"),
    ("progressive", "several"),
}
CASES = [(file, fault) for file in FILES for fault in FAULTS if (file, fault) not in NO_FAULTS]


def strictly(data):
    """The pixels, RGB, if no decoder has anything to say against them."""
    header = jpeg.parse_header(data)
    jpeg.verify(data, header)
    jpeg.verify_markers(data)
    pixels = jpeg.decode(data, header)
    np.testing.assert_array_equal(rgb(data), pixels)
    return pixels


@pytest.mark.parametrize("file, fault", CASES)
def test_faults_of_headers_are_mended(file, fault, capfd):
    import cv2
    import torch
    import torchvision

    sound = FILES[file]
    faulty = FAULTS[fault](sound)
    header = jpeg.parse_header(faulty)
    assert (header.width, header.height) == (67, 45)
    with pytest.raises(JpegError):
        jpeg.verify(faulty, header)
    with pytest.raises(JpegError):
        jpeg.verify_markers(faulty)
    mended = jpeg.mended(faulty)
    np.testing.assert_array_equal(strictly(mended), strictly(sound))
    # Nothing but the bytes between segments is missing.
    assert len(faulty) - len(mended) in (0, 2, 7, 8, 40)
    capfd.readouterr()
    decoded = cv2.imdecode(np.frombuffer(mended, np.uint8), cv2.IMREAD_COLOR)
    assert np.abs(decoded[..., ::-1].astype(int) - rgb(sound)).max() <= 3
    assert capfd.readouterr().err == ""  # where OpenCV shows libjpeg's warnings
    other = torchvision.io.decode_jpeg(
        torch.tensor(list(mended), dtype=torch.uint8), torchvision.io.ImageReadMode.RGB
    )
    assert np.abs(other.permute(1, 2, 0).numpy().astype(int) - rgb(sound)).max() <= 3
    assert jpeg.mended(mended) is mended


@pytest.mark.parametrize("file", FILES)
def test_sound_files_are_left_alone(file):
    assert jpeg.mended(FILES[file]) is FILES[file]
    unusual = behind_start(FILES[file], b"\xff\xff\xff", segment(0xE0, b"JFXX\0"))
    strictly(unusual)
    assert jpeg.mended(unusual) is unusual


def is_found(data):
    try:
        jpeg.verify(data, jpeg.parse_header(data))
    except JpegError:
        return True
    return False


@pytest.mark.parametrize(
    "fault",
    ["JFIF 0.00", "scans without parameters", "bytes between segments", "an unknown transform"],
)
@pytest.mark.parametrize("file", ["RGB", "optimized", "restarts"])
def test_damage_is_found_behind_a_mended_header_as_behind_a_sound_one(file, fault):
    (_, begin), faulty = jpeg_scans(FILES[file])[0], FAULTS[fault](FILES[file])
    header, coded = FILES[file][:begin], FILES[file][begin:]
    faulty_header = faulty[: -len(coded)]
    middle, random = len(coded) // 2, np.random.default_rng(0)
    damages = [
        coded[:middle],
        coded[:-2],
        coded[:middle] + coded[middle + 200 :],
        coded[:middle] + b"\xff\xd9" + coded[middle:],
        coded[:-2] + b"left over" * 9 + coded[-2:],
    ]
    for damaged in damages:
        assert is_found(jpeg.mended(faulty_header + damaged))
    found = 0
    for _ in range(60):
        damaged, place = bytearray(coded), random.integers(len(coded))
        damaged[place : place + 3] = random.bytes(3)
        expected = is_found(header + damaged)
        assert is_found(jpeg.mended(bytes(faulty_header + damaged))) == expected
        found += expected
    assert 5 < found < 60


def test_a_segment_that_has_lost_its_marker_is_no_mere_rubbish():
    data = behind_start(save(picture(), exif=exif(6), keep_rgb=True), segment(0xFE, b"text"))
    assert jpeg.parse_header(data).orientation == 6
    for begin, _end in segments(data)[:-1]:
        lost = data[:begin] + b"\0" + data[begin + 1 :]
        assert jpeg.mended(lost) is lost
        shorter = data[: begin + 2] + b"\0\2" + data[begin + 4 :]
        if data[begin + 1] in (0xE0, 0xE1, 0xEE):
            assert jpeg.mended(shorter) is shorter


def test_a_scan_that_has_lost_its_marker_is_no_mere_rubbish():
    for data in (scan_by_scan(), save(picture(), progressive=True)):
        for begin, _ in jpeg_scans(data):
            lost = jpeg.mended(data[:begin] + b"\0" + data[begin + 1 :])
            with pytest.raises(JpegError):
                jpeg.verify(lost, jpeg.parse_header(lost))


def test_what_may_be_damage_is_not_mended():
    named_rgb = save(picture(), keep_rgb=True)  # the components' names are R, G, B
    place = named_rgb.index(b"Adobe") + 11
    for damaged in (
        named_rgb[:place] + b"\4" + named_rgb[place + 1 :],
        *(
            save(picture()).replace(b"\x11\0\x3f\0", b"\x11" + values)
            for values in (b"\1\x3f\0", b"\0\x3f\1", b"\0\x3f\x10")
        ),
    ):
        assert jpeg.mended(damaged) == damaged
        with pytest.raises(JpegError):
            jpeg.verify(damaged, jpeg.parse_header(damaged))


@pytest.mark.parametrize("value", [3, 7, 255])
def test_an_unknown_transform_of_four_components(value):
    data = save(picture(mode="CMYK"))
    place = data.index(b"Adobe") + 11
    data = data[:place] + bytes([value]) + data[place + 1 :]
    assert jpeg.mended(data) is data  # they are named C, M, Y, K
    for first, step in ((frame_size_at(data) + 5, 3), (segments(data)[-1][0] + 5, 2)):
        for i in range(4):
            data = data[: first + i * step] + bytes([i + 1]) + data[first + i * step + 1 :]
    mended = jpeg.mended(data)
    jpeg.verify(mended, jpeg.parse_header(mended))
    np.testing.assert_array_equal(rgb(mended), rgb(data))


@pytest.mark.parametrize("file", ["RGB", "grey", "restarts", "scan by scan"])
def test_markers_that_no_decoder_takes_are_found_without_the_data(file):
    sound = FILES[file]
    jpeg.verify_markers(sound)
    frame, scan = frame_size_at(sound), jpeg_scans(sound)[-1]
    for damaged in (
        without_segments(sound, 0xDB),  # no quantisation table
        sound[: frame + 6] + b"\x55" + sound[frame + 7 :],  # sampling factors
        sound[: frame + 7] + b"\3" + sound[frame + 8 :],  # a table that is not there
        sound[: scan[0] + 6] + b"\x33" + sound[scan[0] + 7 :],
        sound[: scan[0] + 5] + b"\x77" + sound[scan[0] + 6 :],  # a component that is not there
        sound.replace(
            b"\xff\xc4\0\x1f\0\0\1", b"\xff\xc4\0\x1f\0\xff\1"
        ),  # more codes than there can be
        behind_start(sound, b"\xff\xd8"),
        behind_start(sound, segment(0x7F, b"unknown")),
    ):
        assert damaged != sound
        with pytest.raises(JpegError):
            jpeg.verify_markers(damaged)


def test_what_damaged_headers_leave_unseen_is_about_the_coded_data():
    whole, random = FILES["RGB"], np.random.default_rng(0)
    header_ends, let_in = jpeg_scans(whole)[0][1], 0
    for _ in range(400):
        damaged, place = bytearray(whole), int(random.integers(2, header_ends - 2))
        damaged[place : place + 2] = random.bytes(2)
        data = jpeg.mended(bytes(damaged))
        try:
            header = jpeg.parse_header(data)
            jpeg.verify_markers(data)
        except JpegError:
            continue
        let_in += 1
        try:
            jpeg.verify(data, header)
        except JpegError as error:
            assert str(error).startswith("Corrupt JPEG data")
    assert let_in > 200


def test_random_damage_never_crashes():
    whole = np.frombuffer(save(picture(), progressive=True, exif=exif(3)), np.uint8)
    random = np.random.default_rng(2)
    for _ in range(300):
        damaged = whole.copy()
        damaged[random.integers(0, len(whole), 3)] = random.integers(0, 256, 3)
        data = damaged[: random.integers(len(whole) // 2, len(whole) + 1)].tobytes()
        jpeg.mended(data)
        try:
            header = jpeg.parse_header(data)
            if header.width * header.height < 1 << 24 and header.decodes_to_rgb:
                jpeg.verify(data, header)
                jpeg.verify_markers(data)
                jpeg.to_baseline(data)
        except JpegError:
            pass


def test_ffcv_is_not_imported():
    import subprocess
    import sys

    program = (
        "import sys; from ffssl.data.convert import jpeg; jpeg.turbojpeg(); sys.exit('ffcv' in "
        "sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
