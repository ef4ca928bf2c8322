"""The kernels against torchvision's functions of the same name, on the same pixels and parameters.

torchvision is run on float tensors, where it rounds nothing, so our one rounding to uint8 is all
that may differ: half a level.
"""

import colorsys
import itertools
import math
import tarfile
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from support.sample_images import smooth_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from ffssl.data.kernels import operations
from ffssl.data.kernels.draw import (
    P_BRIGHTNESS,
    P_CONTRAST,
    P_CUBIC,
    P_FLIP,
    P_GREY,
    P_HEIGHT,
    P_HUE,
    P_JITTER,
    P_LEFT,
    P_ORDER,
    P_SATURATION,
    P_SIGMA,
    P_SOLARISE,
    P_TOP,
    P_WIDTH,
    PARAMETER_COLUMNS,
    draw,
    view_key,
)
from ffssl.data.kernels.render import colour_order, render
from ffssl.data.policy import POLICIES, ViewPolicy

ROUNDING = 0.51  # levels: half a level, and float32's own noise


def parameters(image, **drawn):
    """A view's parameters that leave the image as it is, but for those given by column number."""
    row = np.zeros(PARAMETER_COLUMNS)
    row[[P_HEIGHT, P_WIDTH]] = image.shape[:2]
    row[[P_BRIGHTNESS, P_CONTRAST, P_SATURATION]] = 1
    for column, value in drawn.items():
        row[globals()[column]] = value
    return row


def rendered(image, row, resolution=None, affine=False):
    out = np.empty((3, *[resolution or image.shape[0]] * 2), np.uint8)
    render(image, row, affine, out)
    return out.astype(np.float64)


def as_float(image):
    """The float tensor (3, height, width) in 0..1 that torchvision's functions take."""
    return torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255


def levels(tensor):
    return 255 * tensor.double().numpy()


def mean_difference(a, b):
    return np.abs(a - b).mean()


def planes_of(image):
    return [np.ascontiguousarray(image[..., c], np.float32).reshape(-1) for c in range(3)]


def noise_image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


CROPS = [  # image height, width; top, left, height, width; resolution
    (100, 133, 0, 0, 100, 133, 64),
    (100, 133, 13, 27, 51, 37, 23),
    (100, 133, 90, 120, 10, 13, 96),
    (60, 60, 5, 7, 31, 31, 31),
    (375, 500, 1, 2, 370, 490, 17),
    (90, 90, 0, 0, 90, 90, 1),
    (1, 40, 0, 3, 1, 37, 16),
    (40, 1, 2, 0, 37, 1, 16),
    (1, 1, 0, 0, 1, 1, 5),
    (50, 50, 49, 49, 1, 1, 8),
]


@pytest.mark.parametrize("height, width, top, left, h, w, resolution", CROPS)
def test_crop_and_resize_equal_torchvision_and_pillow(height, width, top, left, h, w, resolution):
    image = noise_image(height, width)
    ours = rendered(
        image, parameters(image, P_TOP=top, P_LEFT=left, P_HEIGHT=h, P_WIDTH=w), resolution
    )
    crop = (top, left, h, w, [resolution, resolution], InterpolationMode.BILINEAR)
    exact = levels(F.resized_crop(as_float(image), *crop, antialias=True))
    eight_bit = F.resized_crop(
        torch.from_numpy(image).permute(2, 0, 1), *crop, antialias=True
    ).numpy()
    pillow = np.asarray(F.resized_crop(PIL.Image.fromarray(image), *crop)).transpose(2, 0, 1)
    assert np.abs(ours - exact).max() <= ROUNDING
    assert np.abs(ours - eight_bit).max() <= 1  # they round between the two passes as well
    assert np.abs(ours - pillow).max() <= 1


@pytest.mark.parametrize("height, width, top, left, h, w, resolution", CROPS)
def test_bicubic_crop_and_resize_equal_torchvision(height, width, top, left, h, w, resolution):
    image = noise_image(height, width)
    row = parameters(image, P_TOP=top, P_LEFT=left, P_HEIGHT=h, P_WIDTH=w, P_CUBIC=1)
    crop = (top, left, h, w, [resolution, resolution], InterpolationMode.BICUBIC)
    exact = levels(F.resized_crop(as_float(image), *crop, antialias=True)).clip(0, 255)
    assert np.abs(rendered(image, row, resolution) - exact).max() <= ROUNDING


def test_bicubic_equals_pillow_where_nothing_overshoots():
    """Pillow clips between the two passes as well."""
    image = smooth_image(100, 133, seed=0) // 2 + 64
    crop = (13, 27, 61, 77, [48, 48], InterpolationMode.BICUBIC)
    row = parameters(image, P_TOP=13, P_LEFT=27, P_HEIGHT=61, P_WIDTH=77, P_CUBIC=1)
    pillow = np.asarray(F.resized_crop(PIL.Image.fromarray(image), *crop)).transpose(2, 0, 1)
    assert pillow.min() > 0 and pillow.max() < 255
    assert np.abs(rendered(image, row, 48) - pillow).max() <= 1


def test_a_policy_chooses_the_filter():
    for interpolation, cubic in (("bilinear", 0), ("bicubic", 1)):
        policy, row = (
            replace(ViewPolicy(), interpolation=interpolation),
            np.empty(PARAMETER_COLUMNS),
        )
        draw(view_key(0, 0, 0, 0), 100, 133, policy.row(), row)
        assert row[P_CUBIC] == cubic


def test_what_bicubic_overshoots_is_clipped_before_the_colour_steps():
    image = np.full((8, 8, 3), 255, np.uint8)
    image[:, :4] = 0
    plain = rendered(image, parameters(image, P_CUBIC=1), 32)
    assert plain.min() == 0 and plain.max() == 255
    row = parameters(image, P_CUBIC=1, P_JITTER=1, P_BRIGHTNESS=0.5)
    assert rendered(image, row, 32).max() == 128  # 0.5 * 255, rounded


def test_flip_mirrors_left_and_right():
    image = noise_image(9, 9)
    np.testing.assert_array_equal(
        rendered(image, parameters(image, P_FLIP=1)), levels(F.hflip(as_float(image))).round()
    )


# Colours of every kind: greys, primaries, black and white, pairs of equal channels, and noise.
PALETTE = np.concatenate(
    [
        np.array(list(itertools.product((0, 1, 127, 128, 254, 255), repeat=3)), np.uint8),
        noise_image(1, 808)[0],
    ]
).reshape(32, 32, 3)


def adjusted(kernel, *arguments):
    planes = planes_of(PALETTE)
    kernel(*planes, *arguments)
    return np.stack(planes).reshape(3, 32, 32)


@pytest.mark.parametrize("factor", [0.0, 0.2, 0.63, 1.0, 1.4, 1.8])
def test_brightness_contrast_and_saturation_equal_torchvision(factor):
    tensor, f = as_float(PALETTE), np.float32(factor)
    mean = np.float32(operations.grey_sum(*planes_of(PALETTE)) / PALETTE[..., 0].size)
    for ours, theirs in (
        (adjusted(operations.adjust_brightness, f), F.adjust_brightness(tensor, factor)),
        (adjusted(operations.adjust_contrast, f, mean), F.adjust_contrast(tensor, factor)),
        (adjusted(operations.adjust_saturation, f), F.adjust_saturation(tensor, factor)),
    ):
        np.testing.assert_allclose(ours, levels(theirs), atol=0.01)


@pytest.mark.parametrize("shift", [-0.5, -0.3, -0.1, -0.013, 0.0, 0.05, 0.1, 0.25, 1 / 3, 0.5])
def test_hue_equals_torchvision_and_the_standard_library(shift):
    ours = adjusted(operations.adjust_hue, np.float32(shift))
    np.testing.assert_allclose(ours, levels(F.adjust_hue(as_float(PALETTE), shift)), atol=0.05)

    def turned(pixel):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        return colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)

    exact = np.array([turned(pixel) for pixel in PALETTE.reshape(-1, 3) / 255.0]) * 255
    np.testing.assert_allclose(ours.reshape(3, -1).T, exact, atol=0.01)


def test_grey_equals_torchvision():
    grey = adjusted(operations.to_grey)
    np.testing.assert_allclose(grey, levels(F.rgb_to_grayscale(as_float(PALETTE), 3)), atol=0.01)


def test_solarise_inverts_the_values_that_torchvision_inverts():
    values = np.arange(256, dtype=np.uint8)
    for threshold in (0, 1, 128, 255):
        row = values.astype(np.float32)
        operations.solarise(row, np.float32(threshold))
        np.testing.assert_array_equal(
            row, F.solarize(torch.from_numpy(values).expand(3, 1, -1), threshold)[0, 0].numpy()
        )


@pytest.mark.parametrize("sigma", [0.21, 0.5, 0.8, 1.0, 1.37, 2.0, 4.5])
@pytest.mark.parametrize("resolution", [32, 45])
def test_blur_equals_torchvision(sigma, resolution):
    image = noise_image(resolution, resolution)
    ours = rendered(image, parameters(image, P_SIGMA=sigma))
    radius = math.ceil(3 * sigma)
    assert (
        np.abs(ours - levels(F.gaussian_blur(as_float(image), 2 * radius + 1, sigma))).max()
        <= ROUNDING
    )
    if sigma <= 2:  # the kernel that the authors of SimCLR and torchvision's users take at 224
        assert mean_difference(ours, levels(F.gaussian_blur(as_float(image), 23, sigma))) < 0.5


def test_a_blur_too_narrow_to_be_drawn_would_change_nothing():
    image = noise_image(16, 16)
    np.testing.assert_array_equal(
        rendered(image, parameters(image, P_SIGMA=0.2)), image.transpose(2, 0, 1)
    )
    assert (
        np.abs(levels(F.gaussian_blur(as_float(image), 3, 0.2)) - levels(as_float(image))).max()
        < 0.01
    )


@pytest.mark.parametrize("resolution", [1, 2, 3, 5])
def test_blur_of_an_image_smaller_than_the_kernel_reflects_again_and_again(resolution):
    sigma, radius = 2.0, 6
    image = noise_image(resolution, resolution)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    exact = image.transpose(2, 0, 1).astype(np.float64)
    for axis in (1, 2):
        width = [(0, 0)] * 3
        width[axis] = (radius, radius)
        padded = np.pad(exact, width, "reflect" if resolution > 1 else "edge")
        exact = sum(
            t * np.take(padded, np.arange(resolution) + k, axis) for k, t in enumerate(taps)
        )
    assert np.abs(rendered(image, parameters(image, P_SIGMA=sigma)) - exact).max() <= ROUNDING


def test_the_colour_orders_are_all_the_permutations():
    order = np.empty(4, np.int64)
    seen = set()
    for number in range(24):
        colour_order(number, order)
        seen.add(tuple(order.tolist()))
    assert seen == set(itertools.permutations(range(4)))


@pytest.mark.parametrize("number", range(24))
def test_colour_steps_of_a_view_come_in_torchvisions_order(number):
    image = smooth_image(32, 32, seed=number)
    factors = (1.5, 0.55, 1.6, 0.13)
    order = np.empty(4, np.int64)
    colour_order(number, order)
    steps = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    expected = as_float(image)
    for step in order:
        expected = steps[step](expected, factors[step])
    drawn = dict(
        zip(("P_BRIGHTNESS", "P_CONTRAST", "P_SATURATION", "P_HUE"), factors),
        P_JITTER=1,
        P_ORDER=number,
    )
    assert (
        np.abs(rendered(image, parameters(image, **drawn)) - levels(expected)).max()
        <= ROUNDING + 0.05
    )


def test_colour_matrix_is_the_composition_of_its_steps():
    brightness, contrast, saturation, hue = 1.3, 0.7, 1.4, 0.08
    to_yiq = np.array(
        [[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]]
    )
    turn = 2 * math.pi * hue
    # Hue rises from red to yellow, that is clockwise in the plane of I and Q.
    rotation = np.array(
        [[1, 0, 0], [0, math.cos(turn), math.sin(turn)], [0, -math.sin(turn), math.cos(turn)]]
    )
    colour = np.linalg.inv(to_yiq) @ np.diag([1, saturation, saturation]) @ rotation @ to_yiq
    expected = np.column_stack(
        [brightness * contrast * colour, np.full(3, brightness * (1 - contrast) * 128)]
    )
    matrix = np.empty((3, 4), np.float32)
    operations.colour_matrix(brightness, contrast, saturation, hue, matrix)
    np.testing.assert_allclose(matrix[:, :3], expected[:, :3], atol=1e-3)
    np.testing.assert_allclose(matrix[:, 3], expected[:, 3], rtol=1e-6)

    image = noise_image(16, 16)
    drawn = {
        "P_JITTER": 1,
        "P_BRIGHTNESS": brightness,
        "P_CONTRAST": contrast,
        "P_SATURATION": saturation,
        "P_HUE": hue,
    }
    pixels = (
        np.einsum("cd,yxd->cyx", expected[:, :3], image.astype(np.float64))
        + expected[:, 3, None, None]
    )
    assert (
        np.abs(rendered(image, parameters(image, **drawn), affine=True) - pixels.clip(0, 255)).max()
        <= ROUNDING + 0.3
    )


def test_colour_matrix_turns_hue_the_way_hsv_does():
    matrix = np.empty((3, 4), np.float32)
    operations.colour_matrix(1.0, 1.0, 1.0, 1 / 3, matrix)
    # Red to green, green to blue, blue to red.
    assert [int((matrix[:, :3] @ primary).argmax()) for primary in np.eye(3)] == [1, 2, 0]


@pytest.fixture(scope="module")
def photographs(shared_data):
    photos = []
    with tarfile.open(shared_data / "photos-natural-size.tar") as tar:
        for member in tar.getmembers()[:60:3]:
            photos.append(np.asarray(PIL.Image.open(tar.extractfile(member)).convert("RGB")))
    return photos


def test_linear_hue_differs_from_torchvisions_as_stated(photographs):
    for shift, stated in ((0.1, 9), (0.05, 5)):
        differences = []
        for photo in photographs:
            image = np.asarray(PIL.Image.fromarray(photo).resize((96, 96)))
            ours = rendered(image, parameters(image, P_JITTER=1, P_HUE=shift), affine=True)
            differences.append(mean_difference(ours, levels(F.adjust_hue(as_float(image), shift))))
        assert 0.5 * stated < np.mean(differences) < 1.5 * stated


@pytest.mark.parametrize("name", ["simsiam", "simclr", "byol"])
def test_whole_views_of_photographs_equal_torchvisions_chain(photographs, name):
    steps = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    order, row = np.empty(4, np.int64), np.empty(PARAMETER_COLUMNS)
    for i, photo in enumerate(photographs[:10]):
        policy = POLICIES[name][i % len(POLICIES[name])]
        draw(np.uint64(view_key(3, 1, i, 0)), *photo.shape[:2], policy.row(), row)
        box = [int(row[p]) for p in (P_TOP, P_LEFT, P_HEIGHT, P_WIDTH)]
        view = F.resized_crop(
            torch.from_numpy(photo.copy()).permute(2, 0, 1).float() / 255,
            *box,
            [96, 96],
            antialias=True,
        )
        if row[P_FLIP]:
            view = F.hflip(view)
        if row[P_JITTER]:
            colour_order(int(row[P_ORDER]), order)
            for step in order:
                view = steps[step](view, row[(P_BRIGHTNESS, P_CONTRAST, P_SATURATION, P_HUE)[step]])
        if row[P_GREY]:
            view = F.rgb_to_grayscale(view, 3)
        if row[P_SIGMA]:
            view = F.gaussian_blur(view, 23, row[P_SIGMA])
        if row[P_SOLARISE]:
            view = F.solarize(view, 128 / 255)
        assert mean_difference(rendered(photo, row, 96), levels(view)) < 0.5
