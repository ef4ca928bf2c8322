"""The drawn parameters against torchvision's own draws, distribution by distribution."""

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torchvision import transforms

from ffssl.data.kernels import draw as columns
from ffssl.data.kernels.draw import PARAMETER_COLUMNS, draw, view_key
from ffssl.data.kernels.rand_augment import (
    BRIGHTNESS,
    COLOUR,
    CONTRAST,
    ROTATE,
    SHARPNESS,
    SHEAR_X,
    SHEAR_Y,
    TRANSLATE_X,
    TRANSLATE_Y,
)
from ffssl.data.policy import EVALUATION, POLICIES, ViewPolicy, choose_policies
from ffssl.errors import UserError

SIGNED = (
    SHEAR_X,
    SHEAR_Y,
    TRANSLATE_X,
    TRANSLATE_Y,
    ROTATE,
    BRIGHTNESS,
    COLOUR,
    CONTRAST,
    SHARPNESS,
)
DRAWS = 4000


def drawn(
    policy=ViewPolicy(),
    height=300,
    width=400,
    *,
    seed=1,
    epoch=0,
    view=0,
    magnitude=5.0,
    draws=DRAWS,
):
    """Parameters by name, of a view of `draws` samples: each (draws,)."""
    rows, row = np.empty((draws, PARAMETER_COLUMNS)), policy.row(magnitude)
    for sample in range(draws):
        draw(np.uint64(view_key(seed, epoch, sample, view)), height, width, row, rows[sample])
    return {
        name[2:].lower(): rows[:, getattr(columns, name)]
        for name in dir(columns)
        if name.startswith("P_")
    }


def from_torchvision(get_params, draws=DRAWS):
    torch.manual_seed(0)
    return np.array([get_params() for _ in range(draws)], np.float64).T


def assert_same_distribution(a, b):
    """Two-sample Kolmogorov-Smirnov at a significance of 0.001."""
    grid = np.sort(np.concatenate([a, b]))
    distance = np.abs(
        np.searchsorted(np.sort(a), grid, "right") / len(a)
        - np.searchsorted(np.sort(b), grid, "right") / len(b)
    ).max()
    assert distance < 1.95 * np.sqrt(1 / len(a) + 1 / len(b))


@pytest.mark.parametrize("height, width", [(300, 400), (400, 120)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 0.3)])
def test_crops_are_distributed_as_torchvisions(height, width, scale):
    ours = drawn(ViewPolicy(crop_scale=scale), height, width)
    image = torch.empty(3, height, width)
    top, left, h, w = from_torchvision(
        partial(transforms.RandomResizedCrop.get_params, image, scale, (3 / 4, 4 / 3))
    )
    assert_same_distribution(ours["height"] * ours["width"], h * w)
    assert_same_distribution(ours["width"] / ours["height"], w / h)
    assert_same_distribution(ours["top"], top)
    assert_same_distribution(ours["left"], left)
    assert (ours["top"] + ours["height"] <= height).all() and (
        ours["left"] + ours["width"] <= width
    ).all()
    assert ours["top"].min() == ours["left"].min() == 0


@pytest.mark.parametrize("height, width", [(10, 400), (400, 10), (1, 50), (50, 1), (1, 1)])
def test_images_without_an_admissible_crop_get_torchvisions_fallback(height, width):
    ours = drawn(ViewPolicy(crop_scale=(1.0, 1.0)), height, width, draws=3)
    image = torch.empty(3, height, width)
    # With scale (4, 4) no try succeeds, and torchvision falls back as well.
    expected = transforms.RandomResizedCrop.get_params(image, (4.0, 4.0), (3 / 4, 4 / 3))
    for i in range(3):
        assert tuple(ours[name][i] for name in ("top", "left", "height", "width")) == expected


@pytest.mark.parametrize("strength", [0.4, 0.8, 1.3])
def test_jitter_is_distributed_as_torchvisions(strength):
    ours = drawn(ViewPolicy(brightness=strength, contrast=strength, saturation=strength, hue=0.2))
    ranges = transforms.ColorJitter(strength, strength, strength, 0.2)
    theirs = from_torchvision(
        lambda: transforms.ColorJitter.get_params(
            ranges.brightness, ranges.contrast, ranges.saturation, ranges.hue
        )[1:]
    )
    for name, values in zip(("brightness", "contrast", "saturation", "hue"), theirs):
        assert_same_distribution(ours[name], values)


def test_blur_sigmas_are_distributed_as_torchvisions():
    ours = drawn(ViewPolicy(blur=1.0, blur_sigma=(0.1, 2.0)))
    assert_same_distribution(
        ours["sigma"], from_torchvision(lambda: [transforms.GaussianBlur.get_params(0.1, 2.0)])[0]
    )


def test_every_order_of_the_colour_steps_is_as_likely():
    counts = np.bincount(drawn()["order"].astype(int), minlength=24)
    assert len(counts) == 24
    # Chi-squared, 23 degrees of freedom, 0.001.
    assert ((counts - DRAWS / 24) ** 2 / (DRAWS / 24)).sum() < 49.7


def test_each_step_is_drawn_with_its_probability_and_independently():
    probabilities = {"flip": 0.5, "jitter": 0.8, "grey": 0.2, "blur": 0.6, "solarise": 0.3}
    ours = drawn(ViewPolicy(**probabilities))
    flags = {name: ours[name if name != "blur" else "sigma"] > 0 for name in probabilities}
    for name, p in probabilities.items():
        assert abs(flags[name].mean() - p) < 4 * np.sqrt(p * (1 - p) / DRAWS), name
    for a, b in itertools.combinations(
        [*flags.values(), ours["top"], ours["brightness"], ours["hue"], ours["order"]], 2
    ):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(DRAWS)


@pytest.mark.parametrize("probability", [0, 1])
def test_probabilities_of_0_and_1_are_certain(probability):
    steps = ("flip", "jitter", "grey", "solarise")
    ours = drawn(ViewPolicy(**dict.fromkeys((*steps, "blur"), probability)))
    for name in steps:
        assert (ours[name] == probability).all()
    assert ((ours["sigma"] > 0) == probability).all()


def test_magnitude_scales_the_jitter_in_proportion_to_5_and_nothing_else():
    policy = ViewPolicy(brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1)
    standard = drawn(policy)
    for magnitude in (0.0, 2.5, 7.5):
        ours = drawn(policy, magnitude=magnitude)
        for name in standard:
            if name in ("brightness", "contrast", "saturation"):
                np.testing.assert_allclose(
                    ours[name] - 1, (standard[name] - 1) * magnitude / 5, atol=1e-12
                )
            elif name == "hue":
                np.testing.assert_allclose(ours[name], standard[name] * magnitude / 5, atol=1e-12)
            else:
                np.testing.assert_array_equal(ours[name], standard[name])
    # Where torchvision's hue ends.
    assert np.abs(drawn(replace(policy, hue=0.4), magnitude=10)["hue"]).max() <= 0.5


def rand_augment_steps(**options):
    """Operation and strength of each of the two steps of RandAugment: (DRAWS, 2) each."""
    rows, policy = np.empty((DRAWS, PARAMETER_COLUMNS)), POLICIES["randaugment"][0].row(**options)
    for sample in range(DRAWS):
        draw(np.uint64(view_key(1, 0, sample, 0)), 300, 400, policy, rows[sample])
    return rows[:, columns.P_OPERATION :: 2][:, :2].astype(int), rows[:, columns.P_STRENGTH :: 2][
        :, :2
    ]


def test_every_pair_of_operations_and_both_signs_are_as_likely():
    operations, strengths = rand_augment_steps()
    pairs = np.bincount(operations[:, 0] * 14 + operations[:, 1], minlength=196)
    assert len(pairs) == 196
    # Chi-squared, 195 degrees of freedom, 0.001.
    assert ((pairs - DRAWS / 196) ** 2 / (DRAWS / 196)).sum() < 261.7
    for step in range(2):
        counts = np.bincount(operations[:, step], minlength=14)
        assert ((counts - DRAWS / 14) ** 2 / (DRAWS / 14)).sum() < 34.6  # 13 degrees of freedom
        for operation in range(14):
            negative = strengths[operations[:, step] == operation, step] < 0
            if operation in SIGNED:
                assert abs(negative.mean() - 0.5) < 2 / np.sqrt(len(negative))
            else:
                assert not negative.any()


def test_the_magnitude_of_rand_augment_is_a_number_of_torchvisions_bins():
    operations, _ = rand_augment_steps()
    for magnitude, share in ((0, 0), (9, 0.3), (7.5, 0.25), (30, 1), (45, 1), (-1, 0)):
        same, strengths = rand_augment_steps(magnitude=magnitude)
        np.testing.assert_array_equal(same, operations)
        np.testing.assert_allclose(np.abs(strengths[operations == ROTATE]), 30 * share, atol=1e-12)


def test_a_view_follows_from_seed_epoch_sample_and_view_alone():
    keys = {
        (s, e, i, v): view_key(s, e, i, v)
        for s, e, i, v in itertools.product(range(4), range(5), range(6), range(7))
    }
    assert keys == {key: view_key(*key) for key in keys}
    assert len(set(keys.values())) == len(keys)


@pytest.mark.parametrize("other", [{"seed": 2}, {"epoch": 1}, {"view": 1}])
def test_views_of_another_seed_epoch_or_number_are_unrelated(other):
    ours, others = drawn(), drawn(**other)
    for name in ("top", "brightness", "hue", "order", "flip"):
        assert abs(np.corrcoef(ours[name], others[name])[0, 1]) < 4 / np.sqrt(DRAWS), name


def test_consecutive_samples_are_unrelated():
    for values in drawn().values():
        if values.std() > 0:
            assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / np.sqrt(DRAWS)


@pytest.mark.parametrize(
    "change, affected",
    [
        ({"blur": 0.0}, {"sigma"}),
        ({"blur_sigma": (1.0, 3.0)}, {"sigma"}),
        ({"flip": 0.0}, {"flip"}),
        ({"grey": 1.0}, {"grey"}),
        ({"jitter": 0.0}, {"jitter"}),
        ({"hue": 0.0}, {"hue"}),
        ({"solarise": 0.5}, {"solarise"}),
        ({"rand_augment": 1}, {"operation", "strength"}),
        ({"crop_scale": (0.05, 0.1)}, {"top", "left", "height", "width"}),
    ],
)
def test_an_option_changes_its_own_draws_only(change, affected):
    before, after = drawn(draws=200), drawn(ViewPolicy(**change), draws=200)
    assert {name for name in before if (before[name] != after[name]).any()} == affected


@pytest.mark.parametrize(
    "height, width, fraction",
    [(300, 400, 224 / 256), (401, 300, 1.0), (256, 256, 224 / 256), (1, 9, 0.5)],
)
def test_centre_crop_is_torchvisions_and_nothing_else_happens(height, width, fraction):
    ours = drawn(replace(EVALUATION, centre_crop=fraction), height, width, draws=20)
    side = max(1, round(min(height, width) * fraction))
    # torchvision's rounds half a pixel up or down with the parity of the size
    np.testing.assert_allclose(ours["top"], (height - side) / 2, atol=0.5)
    np.testing.assert_allclose(ours["left"], (width - side) / 2, atol=0.5)
    assert (ours["height"] == side).all() and (ours["width"] == side).all()
    assert not any(ours[name].any() for name in ("flip", "jitter", "grey", "sigma", "solarise"))


@pytest.mark.parametrize(
    "field, value",
    [
        ("flip", 1.5),
        ("jitter", -0.1),
        ("grey", float("nan")),
        ("blur", 2),
        ("solarise", -1),
        ("centre_crop", 1.01),
        ("crop_scale", (0.5, 0.2)),
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.2, 1.5)),
        ("crop_ratio", (0.0, 1.0)),
        ("crop_ratio", (2.0, 1.0)),
        ("blur_sigma", (-0.1, 2.0)),
        ("blur_sigma", (2.0, 0.1)),
        ("blur_side", -1),
        ("jitter_form", "dali"),
        ("interpolation", "lanczos"),
        ("brightness", -0.4),
        ("saturation", -0.1),
        ("hue", 0.6),
        ("rand_augment", -1),
        ("rand_augment", 5),
        ("rand_augment", 1.5),
    ],
)
def test_bad_policies_are_refused_by_the_name_of_the_field(field, value):
    with pytest.raises(UserError, match=field):
        ViewPolicy(**{field: value})


def test_policies_are_chosen_by_name_and_changed_where_asked():
    assert choose_policies("byol", blur=None) == POLICIES["byol"]
    changes = {"blur": 0.1, "jitter_form": "affine", "interpolation": "bicubic"}
    assert choose_policies("simclr", crop_scale_min=0.3, **changes) == tuple(
        replace(policy, crop_scale=(0.3, 1.0), **changes) for policy in POLICIES["simclr"]
    )
    with pytest.raises(UserError, match="simclr"):
        choose_policies("simkler")
