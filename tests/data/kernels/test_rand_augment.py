"""RandAugment's operations against torchvision's, on the same uint8 views with the same
strengths.
"""

import numpy as np
import pytest
import torch
from support.sample_images import smooth_image
from torchvision import transforms
from torchvision.transforms import v2

from ffssl.data.kernels.decode import render_samples
from ffssl.data.kernels.draw import P_OPERATION, P_STRENGTH, PARAMETER_COLUMNS, draw, view_key
from ffssl.data.kernels.rand_augment import (
    AUTOCONTRAST,
    EQUALISE,
    IDENTITY,
    OPERATIONS,
    POSTERISE,
    ROTATE,
    SHARPNESS,
    SHEAR_X,
    SHEAR_Y,
    SOLARISE,
    TRANSLATE_X,
    TRANSLATE_Y,
    augment,
    autocontrast,
    inverse_map,
    operation_strength,
)
from ffssl.data.kernels.render import render
from ffssl.data.loader import ViewLoader
from ffssl.data.policy import POLICIES, ViewPolicy

SPACE = v2.RandAugment._AUGMENTATION_SPACE
NAMES = list(SPACE)
SIDES = (7, 45, 64)
MAGNITUDES = (0, 1, 5, 9, 15, 20, 30)
CASES = [
    (side, magnitude, negative)
    for side in SIDES
    for magnitude in MAGNITUDES
    for negative in (False, True)
]


def views(side, seed=0):
    """Noise, where every misplaced pixel shows, and a smooth image, as uint8 (3, side, side)."""
    yield np.random.default_rng(seed).integers(0, 256, (3, side, side), np.uint8)
    yield smooth_image(side, side, seed).transpose(2, 0, 1).copy()


def torchvision_strength(operation, magnitude, negative, side):
    magnitudes, signed = SPACE[NAMES[operation]]
    bins = magnitudes(31, side, side)
    return 0.0 if bins is None else float(bins[magnitude]) * (-1 if signed and negative else 1)


def torchvision_operation(view, operation, strength):
    transform = v2.RandAugment()
    view = torch.from_numpy(view)
    return transform._apply_image_or_video_transform(
        view, NAMES[operation], strength, transform.interpolation, transform._fill
    ).numpy()


def in_our_units(operation, strength, side):
    """Ours are a share of the side and a level, torchvision's pixels and a share of 255."""
    return (
        strength / side
        if operation in (TRANSLATE_X, TRANSLATE_Y)
        else 255 * strength
        if operation == SOLARISE
        else strength
    )


def augmented(view, operation, strength):
    out = view.copy()
    augment(out, operation, strength)
    return out


@pytest.mark.parametrize("operation", range(OPERATIONS), ids=NAMES)
def test_magnitudes_are_torchvisions(operation):
    older = list(transforms.RandAugment()._augmentation_space(31, (224, 224)).values())[operation]
    for magnitude in range(31):
        for negative in (False, True):
            ours = operation_strength(operation, float(magnitude), negative)
            strength = torchvision_strength(operation, magnitude, negative, 224)
            assert ours == pytest.approx(in_our_units(operation, strength, 224), abs=1e-4)
        if older[0].ndim and operation not in (TRANSLATE_X, TRANSLATE_Y):
            assert operation_strength(operation, float(magnitude), False) == pytest.approx(
                float(older[0][magnitude]), abs=1e-4
            )


@pytest.mark.parametrize("operation", range(OPERATIONS), ids=NAMES)
def test_magnitudes_between_two_bins_are_interpolated(operation):
    below, between, above = (
        operation_strength(operation, magnitude, False) for magnitude in (15.0, 15.25, 16.0)
    )
    if operation == POSTERISE:
        # Whole bits.
        assert [operation_strength(operation, magnitude, False) for magnitude in (3.7, 3.8)] == [
            8,
            7,
        ]
    else:
        assert between == pytest.approx(below + (above - below) / 4)


@pytest.mark.parametrize(
    "operation",
    [SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE],
    ids=lambda operation: NAMES[operation],
)
def test_warps_are_torchvisions_but_where_two_pixels_are_equally_near(operation):
    shares = []
    for side, magnitude, negative in CASES:
        strength = torchvision_strength(operation, magnitude, negative, side)
        xx, xy, x0, yx, yy, y0 = inverse_map(
            operation, in_our_units(operation, strength, side), side
        )
        y, x = np.mgrid[:side, :side]
        fractions = np.stack([xx * x + xy * y + x0, yx * x + yy * y + y0]) % 1
        tied = (np.abs(fractions - 0.5) < 1e-4).any(0)
        shares.append(tied.mean())
        for view in views(side):
            ours = augmented(view, operation, in_our_units(operation, strength, side))
            np.testing.assert_array_equal(
                ours[:, ~tied], torchvision_operation(view, operation, strength)[:, ~tied]
            )
    assert np.mean(shares) < 0.04
    assert max(shares) < 0.21  # a shear by 0.2, magnitude 20: every fifth row


@pytest.mark.parametrize("name", ["Identity", "Brightness", "Posterize", "Solarize", "Equalize"])
def test_these_operations_are_torchvisions(name):
    operation = NAMES.index(name)
    for side, magnitude, negative in CASES:
        strength = torchvision_strength(operation, magnitude, negative, side)
        for view in views(side):
            ours = augmented(view, operation, in_our_units(operation, strength, side))
            np.testing.assert_array_equal(ours, torchvision_operation(view, operation, strength))


@pytest.mark.parametrize("name", ["Color", "Contrast", "Sharpness"])
def test_blends_are_torchvisions_but_for_float32s_rounding_at_integers(name):
    """At strength 0.6 every fifth blend of two integers is one, and rounding down then makes a
    level of it.
    """
    operation = NAMES.index(name)
    for side, magnitude, negative in CASES:
        strength = torchvision_strength(operation, magnitude, negative, side)
        for view in views(side):
            ours, theirs = (
                augmented(view, operation, strength).astype(int),
                torchvision_operation(view, operation, strength),
            )
            assert np.abs(ours - theirs).max() <= 1
            assert (ours != theirs).mean() <= (0.15 if magnitude == 20 else 0.05)


def test_autocontrast_is_exact_where_torchvisions_float32_falls_short():
    for side in SIDES:
        for view in views(side):
            view = view // 3 + 40
            ours, theirs = (
                augmented(view, AUTOCONTRAST, 0.0).astype(int),
                torchvision_operation(view, AUTOCONTRAST, 0.0),
            )
            assert set(np.unique(ours - theirs)) <= {0, 1}
            assert (ours != theirs).mean() <= 0.05
    for low in range(255):
        for high in range(low + 1, 256):
            levels = np.arange(low, high + 1, dtype=np.uint8)
            exact = 255 * (levels.astype(int) - low) // (high - low)
            autocontrast(levels)
            np.testing.assert_array_equal(levels, exact)


@pytest.mark.parametrize(
    "operation", [SHARPNESS, AUTOCONTRAST, EQUALISE], ids=lambda operation: NAMES[operation]
)
@pytest.mark.parametrize("side", [1, 2, 5])
def test_what_has_nothing_to_sharpen_or_to_stretch_stays(operation, side):
    flat = np.full((3, side, side), 77, np.uint8)
    np.testing.assert_array_equal(augmented(flat, operation, 0.9), flat)
    noise = next(views(side))
    if operation == SHARPNESS and side < 3:
        np.testing.assert_array_equal(augmented(noise, operation, 0.9), noise)


def drawn_parameters(policy, sample, magnitude, image, fill=0.0):
    row = np.full(PARAMETER_COLUMNS, fill)
    draw(np.uint64(view_key(5, 0, sample, 0)), *image.shape[:2], policy.row(magnitude), row)
    return row


def rendered(image, row, side=64):
    out = np.empty((3, side, side), np.uint8)
    render(image, row, False, out)
    return out


@pytest.mark.parametrize("magnitude", [3, 9, 15])
def test_a_view_is_the_plain_view_after_torchvisions_operations(magnitude):
    (policy,) = POLICIES["randaugment"]
    image = smooth_image(120, 90, seed=1)
    for sample in range(60):
        row = drawn_parameters(policy, sample, magnitude, image)
        plain = row.copy()
        plain[P_OPERATION:] = 0
        expected = rendered(image, plain)
        for i in range(policy.rand_augment):
            operation, negative = int(row[P_OPERATION + 2 * i]), row[P_STRENGTH + 2 * i] < 0
            expected = torchvision_operation(
                expected, operation, torchvision_strength(operation, magnitude, negative, 64)
            )
        assert np.abs(rendered(image, row).astype(float) - expected).mean() < 0.5


def test_a_view_follows_from_its_key_whatever_the_scratch_held():
    image = smooth_image(60, 60, seed=2)
    for operations in range(5):
        policy = ViewPolicy(jitter=0, grey=0, blur=0, rand_augment=operations)
        clean, dirty = (drawn_parameters(policy, 3, 9, image, fill) for fill in (0.0, 11.0))
        np.testing.assert_array_equal(rendered(image, clean), rendered(image, dirty))
        assert (dirty[P_OPERATION + 2 * operations :: 2] == IDENTITY).all()


def test_the_magnitude_changes_by_the_epoch_without_compiling(beton):
    with ViewLoader(
        beton, batch_size=4, views=2, resolution=32, policy=POLICIES["randaugment"], shuffle=False
    ) as loader:
        served, compiled = [], []
        for magnitude in (3.0, 3.0, 12.5):
            loader.set_epoch(0, 32, magnitude)
            served.append(next(iter(loader)).views.numpy().copy())
            # Counted, not listed: Numba's dictionary of them may not be iterated while threads look
            # things up in it.
            compiled.append(len(render_samples.overloads))
    np.testing.assert_array_equal(served[0], served[1])
    assert (served[0] != served[2]).any()
    assert compiled[0] == compiled[2]
