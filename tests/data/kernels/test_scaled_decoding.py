"""JPEGs decoded at 1/2, 1/4 or 1/8 of their size: which, and that the views are those of the full
decode.
"""

import io
import tarfile

import numpy as np
import PIL.Image
import pytest
from support.sample_images import jpeg_bytes, smooth_image, write_beton

from ffssl.data.kernels import operations
from ffssl.data.kernels.decode import SCALED_PIXELS, choose_denominator, decode
from ffssl.data.kernels.draw import P_HEIGHT, P_WIDTH, PARAMETER_COLUMNS
from ffssl.data.loader import ViewLoader
from ffssl.data.policy import POLICIES, ViewPolicy

WHOLE = ViewPolicy(crop_scale=(1, 1), crop_ratio=(4 / 3, 4 / 3), flip=0, jitter=0, grey=0, blur=0)
CROPPED = ViewPolicy(crop_scale=(0.2, 0.5), flip=0, jitter=0, grey=0, blur=0)


def natural_image(height, width, seed):
    """Noise with the 1/f amplitude spectrum of photographs: uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    spectrum = np.fft.rfft2(rng.standard_normal((3, height, width))) / np.maximum(
        frequency, 1 / max(height, width)
    )
    pixels = np.fft.irfft2(spectrum, (height, width))
    grey, colour = pixels[0], pixels - pixels.mean(0)
    pixels = 128 + 45 * (grey / grey.std() + 0.4 * colour / colour.std())
    return np.ascontiguousarray(pixels.clip(0, 255).round().astype(np.uint8).transpose(1, 2, 0))


def views_of(path, scaled, **options):
    options = {
        "batch_size": 1,
        "views": 2,
        "resolution": 32,
        "workers": 1,
        "shuffle": False,
        "drop_last": False,
    } | options
    with ViewLoader(path, scaled_decoding=scaled, **options) as loader:
        return np.concatenate([batch.views.numpy().copy() for batch in loader])


def view_differences(path, **options):
    """Mean absolute difference, in levels, of each view from that of the full decode."""
    full, scaled = views_of(path, False, **options), views_of(path, True, **options)
    return np.abs(full.astype(int) - scaled).mean((2, 3, 4))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Four 1500 x 2000 JPEGs and one that no scale divides."""
    sizes = [(1500, 2000)] * 4 + [(1003, 1501)]
    images = [natural_image(*size, seed=i) for i, size in enumerate(sizes)]
    return write_beton(tmp_path_factory.mktemp("scaled") / "photographs.beton", images)


# Which scale


def crops(*sides):
    drawn = np.zeros((len(sides), PARAMETER_COLUMNS))
    drawn[:, [P_HEIGHT, P_WIDTH]] = sides
    return drawn


def chosen(drawn, side):
    return choose_denominator(drawn, np.full(len(drawn), side))


@pytest.mark.parametrize("denominator", [2, 4, 8])
def test_the_smallest_side_of_all_crops_decides(denominator):
    enough = int(SCALED_PIXELS * 100 * denominator)
    large = (10 * enough, 10 * enough)
    assert chosen(crops((enough, enough)), 100) == denominator
    assert chosen(crops(large, (enough, 2 * enough)), 100) == denominator
    assert chosen(crops(large, (2 * enough, enough - 1), large), 100) == denominator // 2
    assert chosen(crops(large), 100) == 8


def test_of_views_of_several_sizes_the_largest_need_decides():
    rng = np.random.default_rng(0)
    decided = []
    for _ in range(500):
        drawn, sides = crops(*rng.integers(1, 1500, (5, 2))), rng.choice([4, 16, 64, 224], 5)
        if rng.random() < 0.8:
            drawn *= rng.integers(4, 16)
        alone = [chosen(one[None], side) for one, side in zip(drawn, sides)]
        assert choose_denominator(drawn, sides) == min(alone)
        decided.append((min(alone), int(np.argmin(alone))))
    denominators, views = zip(*decided)
    assert {*denominators} == {1, 2, 4, 8} and {*views} == {*range(5)}


def test_a_few_pixels_are_decoded_in_full():
    assert chosen(crops((7, 7)), 1) == 1
    assert chosen(crops((8, 8)), 1) > 1
    assert choose_denominator(crops((800, 800), (7, 7)), np.array([8, 1])) == 1


# What is decoded


@pytest.mark.parametrize("denominator", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(160, 240), (101, 67), (8, 8), (9, 300)])
def test_scaled_jpegs_decode_to_the_pixels_that_pillows_draft_mode_finds(size, denominator):
    data = jpeg_bytes(smooth_image(*size, seed=1))
    height, width = (-(-side // denominator) for side in size)
    pixels = np.zeros(3 * size[0] * size[1] + 5, np.uint8)
    assert decode(np.frombuffer(data, np.uint8), 0, *size, pixels, denominator)
    with PIL.Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (size[1] // denominator, size[0] // denominator))
        expected = np.asarray(image)
    assert expected.shape == (height, width, 3)
    difference = np.abs(pixels[: 3 * height * width].reshape(expected.shape).astype(int) - expected)
    assert difference.mean() < 1.5 and difference.max() <= 8
    assert not pixels[3 * height * width :].any()


def test_views_of_several_sizes_share_the_finest_decode_that_one_of_them_needs(photographs):
    words = {"indices": range(4), "policy": WHOLE}  # 1500 x 2000: 1/2 for 400 px, 1/8 for 16
    with ViewLoader(
        photographs, batch_size=4, views=(1, 1), resolution=(400, 16), shuffle=False, **words
    ) as loader:
        ((large, small), _, _) = next(iter(loader))
    alone = {
        (side, scaled): views_of(photographs, scaled, views=1, resolution=side, **words)
        for side in (400, 16)
        for scaled in (False, True)
    }
    np.testing.assert_array_equal(large, alone[400, True])
    assert (alone[400, True] != alone[400, False]).any()
    assert (small.numpy() != alone[16, True]).any() and (small.numpy() != alone[16, False]).any()
    assert np.abs(small.numpy().astype(int) - alone[16, False]).mean() < 0.5


def test_damaged_jpegs_do_not_decode_at_any_scale():
    data = jpeg_bytes(natural_image(200, 200, seed=3))
    for denominator in (2, 4, 8):
        assert not decode(
            np.frombuffer(data[: len(data) // 2], np.uint8),
            0,
            200,
            200,
            np.zeros(120000, np.uint8),
            denominator,
        )


# Where the crop lies


@pytest.mark.parametrize("origin", [0, 0.25, 0.5, 0.875])
@pytest.mark.parametrize("scale", [0.25, 1, 2, 3])
def test_taps_are_centred_on_the_pixels_of_a_crop_with_a_fractional_origin(origin, scale):
    """A triangle whose half-width is whole, or that interpolates, keeps a straight line as it
    is.
    """
    target = 20
    length = scale * target
    first, count = np.empty(target, np.uint64), np.empty(target, np.int64)
    weights = np.zeros((target, operations.most_taps(length, target, False)), np.float32)
    operations.filter_weights(origin, length, target, False, first, count, weights)
    inner = range(6, target - 6)
    positions = [sum(weights[i, k] * (first[i] + k + 0.5) for k in range(count[i])) for i in inner]
    np.testing.assert_allclose(positions, [origin + (i + 0.5) * scale for i in inner], atol=1e-5)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    assert (first + count.astype(np.uint64)).max() == np.ceil(origin + length)


def displacement(a, b, axis):
    """How far the pattern of `a` lies from that of `b` along an axis, in pixels, by the gradient
    (least squares).
    """
    slope = np.gradient(b.astype(float), axis=axis)
    return (slope * (b.astype(float) - a)).sum() / (slope**2).sum()


@pytest.mark.parametrize("resolution, denominator", [(320, 2), (160, 4), (80, 8)])
@pytest.mark.parametrize("policy", [WHOLE, CROPPED])
def test_scaled_views_are_not_displaced(tmp_path, policy, resolution, denominator):
    """A shift by half a scaled pixel would be seen as SCALED_PIXELS / 4 of a view's pixel or
    more.
    """
    y, x = np.mgrid[:1501, :2003]
    waves = 128 + 60 * np.sin(2 * np.pi * x / 250) + 60 * np.sin(2 * np.pi * y / 250)
    path = write_beton(
        tmp_path / "waves.beton", [np.repeat(waves[..., None].round().astype(np.uint8), 3, -1)]
    )
    options = {"policy": policy, "resolution": resolution, "views": 4}
    full, scaled = views_of(path, False, **options)[0], views_of(path, True, **options)[0]
    for a, b in zip(full, scaled, strict=True):
        for axis in (1, 2):
            assert abs(displacement(a, b, axis)) < 0.02


# What is served


@pytest.mark.parametrize("resolution", [96, 224])
@pytest.mark.parametrize("crop_scale", [(0.08, 1), (0.2, 1)])
def test_crops_of_natural_images_are_those_of_the_full_decode(photographs, resolution, crop_scale):
    policy = ViewPolicy(crop_scale=crop_scale, jitter=0, grey=0, blur=0)
    assert view_differences(photographs, resolution=resolution, policy=policy, views=4).max() < 2


@pytest.mark.parametrize("policy", ["simsiam", "simclr", "byol"])
def test_views_of_natural_images_are_those_of_the_full_decode(photographs, policy):
    """Contrast and saturation stretch a difference, so it is the mean over the views that is
    held.
    """
    differences = view_differences(photographs, resolution=96, policy=POLICIES[policy])
    assert differences.mean() < 1.5
    assert differences.any(axis=1).all()  # every image was decoded at a scale


def test_views_of_photographs_are_those_of_the_full_decode(shared_data, tmp_path):
    with tarfile.open(shared_data / "photos-natural-size.tar") as archive:
        files = [archive.extractfile(member).read() for member in archive if member.isfile()]
    photos = [PIL.Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    largest = sorted(photos, key=lambda photo: -photo.width * photo.height)[:8]
    images = [np.asarray(photo.resize((2000, 1500), PIL.Image.LANCZOS)) for photo in largest]
    path = write_beton(tmp_path / "photos.beton", images)
    for resolution in (96, 224):
        differences = view_differences(path, resolution=resolution)
        assert 0 < differences.mean() < 1 and differences.max() < 2.5


def test_scaled_views_do_not_depend_on_workers(photographs):
    alone = views_of(photographs, True, resolution=96)
    for workers in (2, 4):
        np.testing.assert_array_equal(
            views_of(photographs, True, resolution=96, workers=workers, batch_size=5), alone
        )


def test_nothing_changes_where_no_scale_is_chosen(tmp_path):
    path = write_beton(
        tmp_path / "small.beton", [natural_image(375, 500, seed=i) for i in range(4)]
    )
    assert not view_differences(path, resolution=224).any()


def test_raw_images_are_not_scaled(tmp_path):
    path = write_beton(tmp_path / "raw.beton", [natural_image(600, 800, seed=1)], raw=True)
    assert not view_differences(path).any()


@pytest.mark.parametrize("views", [1, 32])
@pytest.mark.parametrize("resolution", [32, 512])
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (7, 9), (1500, 2000)])
def test_images_of_any_shape_give_the_views_of_the_full_decode(tmp_path, size, resolution, views):
    path = write_beton(tmp_path / "one.beton", [smooth_image(*size, seed=4)])
    assert view_differences(path, resolution=resolution, views=views).max() < 2


@pytest.mark.parametrize("resolution", [32, 512])
def test_very_large_images_give_the_views_of_the_full_decode(tmp_path, resolution):
    path = write_beton(tmp_path / "huge.beton", [smooth_image(8000, 8000, seed=5)])
    differences = view_differences(path, resolution=resolution)
    assert 0 < differences.max() < 2
