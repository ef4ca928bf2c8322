"""The views of the benchmark's contenders: ours and every peer's follow the same policy.

Parameters are read off the views' pixels, so all contenders are held to the same.
"""

import itertools
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ffssl.benchmark import peers
from ffssl.benchmark.contenders import CONTENDERS
from ffssl.benchmark.workload import Size, Workload
from ffssl.data.convert.conversion import ConvertOptions, convert
from ffssl.data.convert.sources.folder import ImageFolder
from ffssl.data.policy import POLICIES, ViewPolicy
from ffssl.errors import UserError

CROP_AND_FLIP = "ffcv, crop and flip only"
WHOLE_POLICY = [
    name
    for name in CONTENDERS
    if name not in ("ffssl, one worker", "ffssl, affine jitter", "decode only", CROP_AND_FLIP)
]
(SIMSIAM,) = POLICIES["simsiam"]
NOTHING = replace(
    SIMSIAM, crop_scale=(1, 1), crop_ratio=(1, 1), flip=0.0, jitter=0.0, grey=0.0, blur=0.0
)
SIDE = 48


def in_this_process(workload, decode, view_maker):
    """Stands for `peers.dataloader`: the same views without a DataLoader's processes."""
    makers = [(number, view_maker(side, policy)) for number, side, policy in workload.sizes]
    files = [path.read_bytes() for path in workload.folder.iterdir()]
    while True:
        images = [decode(file) for file in files[: workload.batch_size]]
        yield [
            torch.stack([torch.stack([make(image) for _ in range(number)]) for image in images])
            for number, make in makers
        ]


def take(name: str, workload: Workload, count: int) -> list[list[np.ndarray]]:
    batches = itertools.islice(CONTENDERS[name](workload), count)
    return [[np.array(np.asarray(part)) for part in batch] for batch in batches]


@pytest.fixture
def batches(tmp_path, monkeypatch):
    """A function from a contender's name, an array and sizes of views to batches of 4 images."""
    monkeypatch.setattr(peers, "dataloader", in_this_process)
    torch.manual_seed(0)

    def of(name, pixels, sizes, count):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        (folder / "files" / "class").mkdir(parents=True)
        for i in range(8):
            Image.fromarray(pixels).save(
                folder / "files" / "class" / f"{i}.jpg", quality=95, subsampling=0
            )
        beton = folder / "images.beton"
        convert(ImageFolder(folder / "files"), beton, ConvertOptions(progress=False))
        workload = Workload(beton, folder / "files" / "class", sizes, workers=1, batch_size=4)
        try:
            if name != CROP_AND_FLIP:
                return take(name, workload, count)
            # ffcv's threads outlive the loop.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                return pool.submit(take, name, workload, count).result()
        except ModuleNotFoundError as error:
            pytest.skip(f"{error.name} is not installed")

    return of


@pytest.fixture
def views(batches):
    """A function from a contender's name, an array, a policy and a count to views, float64."""

    def of(name, pixels, policy, count, side=SIDE):
        served = batches(name, pixels, (Size(1, side, policy),), count // 4)
        parts = [batch[0].reshape(4, 3, side, side) for batch in served]
        return np.concatenate(parts).astype(np.float64)

    return of


def plain(colour, side=SIDE):
    return np.full((side, side, 3), colour, np.uint8)


def stripes(side=SIDE):
    """Vertical waves of 8 pixels, grey."""
    wave = 128 + 100 * np.sin(2 * np.pi * np.arange(side) / 8)
    return np.broadcast_to(wave[None, :, None], (side, side, 3)).astype(np.uint8)


@pytest.mark.parametrize("name", WHOLE_POLICY)
def test_views_of_several_sizes_have_their_shapes(batches, name):
    sizes = (Size(2, 32, SIMSIAM), Size(3, 16, replace(SIMSIAM, crop_scale=(0.05, 0.14))))
    for batch in batches(name, stripes(64), sizes, 3):
        assert {part.dtype for part in batch} == {np.dtype(np.uint8)}
        for number, side, _ in sizes:
            of_side = [part for part in batch if part.shape[-3:] == (3, side, side)]
            assert {len(part) for part in of_side} == {4}
            assert sum(part.size for part in of_side) == 4 * number * 3 * side * side


@pytest.mark.parametrize("what", ["flip", "jitter", "grey", "blur"])
@pytest.mark.parametrize("name", WHOLE_POLICY)
def test_each_step_is_taken_as_often_as_the_policy_says(views, name, what):
    image = stripes()
    image[:, : SIDE // 2] = (200, 90, 60)
    (untouched, *others) = views(name, image, NOTHING, 8)
    assert all(np.abs(other - untouched).max() <= 2 for other in others)
    assert np.abs(untouched - image.transpose(2, 0, 1)).mean() < 4
    policy = replace(NOTHING, blur_sigma=(1.9, 2.0), **{what: 0.3})
    changed = np.abs(views(name, image, policy, 400) - untouched).max((1, 2, 3)) > 8
    assert abs(changed.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 400)


PLANES = {  # of colours without their lightness: the circle of hues, and the YIQ space
    "hues": np.array([[2, -1, -1], [0, 3**0.5, -(3**0.5)]]),
    "YIQ": np.array([[0.596, -0.274, -0.322], [0.211, -0.523, 0.312]]),
}


def turned(views, plane="hues"):
    """Return by what part of a circle the colour of views has turned, from (170, 110, 110)."""
    (x, y), (x0, y0) = PLANES[plane] @ views.mean((2, 3)).T, PLANES[plane] @ (170, 110, 110)
    return (np.arctan2(y, x) - np.arctan2(y0, x0)) / (2 * np.pi)


TWO_TONES = plain((100, 100, 100))
TWO_TONES[:, : SIDE // 2] = 150
JITTER = {  # an image, and what is read off its views: 1 where nothing has changed
    "brightness": (plain((110, 110, 110)), lambda v: v.mean((1, 2, 3)) / 110),
    "contrast": (TWO_TONES, lambda v: v.std((1, 2, 3)) / 25),
    "saturation": (plain((190, 110, 90)), lambda v: (v[:, 0] - v[:, 2]).mean((1, 2)) / 100),
    "hue": (plain((170, 110, 110)), lambda v: 1 + turned(v)),
}


@pytest.mark.parametrize("what", JITTER)
@pytest.mark.parametrize("name", WHOLE_POLICY)
def test_jitter_ranges_are_the_policys(views, name, what):
    image, factor_of = JITTER[what]
    if (name, what) == ("DALI, CPU", "hue"):

        def factor_of(v):
            return 1 + turned(v, "YIQ")

    strength = getattr(SIMSIAM, what)
    none = dict.fromkeys(JITTER, 0.001)  # DALI takes no empty range
    factors = factor_of(
        views(name, image, replace(NOTHING, jitter=1.0, **{**none, what: strength}), 400)
    )
    tolerance = 0.15 * strength + 0.01  # of the mean, six standard errors
    assert abs(factors.min() - (1 - strength)) < tolerance
    assert abs(factors.max() - (1 + strength)) < tolerance
    assert abs(factors.mean() - 1) < tolerance


@pytest.mark.parametrize("name", WHOLE_POLICY)
def test_blur_sigmas_are_the_policys(views, name):
    side, centre = 128, slice(32, 96)

    def amplitude(views):
        return views[:, 0, 64, centre].std(1)

    before = amplitude(views(name, stripes(side), NOTHING, 4, side)).mean()
    after = amplitude(views(name, stripes(side), replace(NOTHING, blur=1.0), 200, side))
    # A Gaussian of sigma leaves exp(-2 (pi sigma / period)^2) of a wave.
    sigmas = 8 / np.pi * np.sqrt(np.maximum(-np.log(after / before), 0) / 2)
    low, high = SIMSIAM.blur_sigma
    assert sigmas.min() < low + 0.25 and abs(sigmas.max() - high) < 0.25
    assert abs(sigmas.mean() - (low + high) / 2) < 0.2  # five standard errors


@pytest.mark.parametrize(
    "name", [*WHOLE_POLICY, pytest.param(CROP_AND_FLIP, marks=pytest.mark.slow)]
)
def test_crops_and_flips_are_the_policys(views, name):
    steps = np.arange(256, dtype=np.uint8)
    image = np.zeros((256, 256, 3), np.uint8)
    image[..., 0], image[..., 1] = steps[None], steps[:, None]
    policy = replace(
        NOTHING, crop_scale=SIMSIAM.crop_scale, crop_ratio=SIMSIAM.crop_ratio, flip=0.3
    )
    shown = views(name, image, policy, 400)
    # Between the centres of the first and the last pixel.
    whole = 256 * (1 - 1 / SIDE)
    width = np.ptp(shown[:, 0].mean(1), axis=1) / whole
    height = np.ptp(shown[:, 1].mean(2), axis=1) / whole
    area, ratio = width * height, width / height
    (least, most), (narrow, wide) = SIMSIAM.crop_scale, SIMSIAM.crop_ratio
    assert least - 0.02 < area.min() < least + 0.04 and most - 0.1 < area.max() < most + 0.02
    flipped = shown[:, 0, :, 0].mean(1) > shown[:, 0, :, -1].mean(1)
    assert abs(flipped.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 400)
    assert narrow - 0.03 < ratio.min() < narrow + 0.03 and wide - 0.05 < ratio.max() < wide + 0.05


def test_albumentations_says_that_it_has_no_rand_augment(batches):
    pytest.importorskip("albumentations")
    sizes = (Size(1, SIDE, ViewPolicy(rand_augment=2)),)
    with pytest.raises(UserError, match="no RandAugment"):
        batches("Albumentations + DataLoader", stripes(), sizes, 1)
