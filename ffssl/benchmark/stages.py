"""Measure where the time of a view goes."""

import time
from pathlib import Path

import numpy as np

from ffssl.data.beton.read import read_beton
from ffssl.data.kernels.decode import decode
from ffssl.data.kernels.draw import (
    AFFINE_JITTER,
    P_GREY,
    P_JITTER,
    P_OPERATION,
    P_SIGMA,
    P_SOLARISE,
    PARAMETER_COLUMNS,
    draw,
    view_key,
)
from ffssl.data.kernels.jit import compiled_uncached
from ffssl.data.kernels.operations import store
from ffssl.data.kernels.render import render
from ffssl.data.policy import ViewPolicy

SAMPLES = 200
REPEATS = 5


def stage_times(path: Path, policy: ViewPolicy, resolution: int) -> dict[str, float]:
    """Return the milliseconds of each stage on one core, as the policy mixes them.

    Decode is per image, the others are per view. The passes are fused, so colour, blur and
    RandAugment's operations are differences: a view with them less a view without. Resize is the
    rest.
    """
    beton = read_beton(path)
    file = np.memmap(beton.files[0].path, np.uint8, "r")
    row = policy.row()
    images, drawn = [], np.zeros((min(SAMPLES, len(beton)), PARAMETER_COLUMNS))
    stored = []
    for i in range(len(drawn)):
        meta = beton.images[i]
        begin, height, width = int(meta["data_ptr"]), int(meta["height"]), int(meta["width"])
        stored.append(
            (file[begin : begin + int(beton.image_sizes[i])], int(meta["mode"]), height, width)
        )
        pixels = np.empty(3 * height * width, np.uint8)
        decode(*stored[i], pixels)
        images.append(pixels.reshape(height, width, 3))
        draw(np.uint64(view_key(0, 0, i, 0)), height, width, row, drawn[i])

    scratch = np.empty(3 * max(image.size for image in images), np.uint8)
    view = np.empty((3, resolution, resolution), np.uint8)
    planes = np.zeros((3, resolution, resolution), np.float32)

    def decode_all() -> None:
        for data in stored:
            decode(*data, scratch)

    def render_all(parameters: np.ndarray) -> None:
        for image, one in zip(images, parameters):
            render(image, one, row[AFFINE_JITTER] != 0, view)

    blurred = drawn.copy()
    blurred[:, P_OPERATION:] = 0
    plain, coloured = blurred.copy(), blurred.copy()
    plain[:, [P_JITTER, P_GREY, P_SIGMA, P_SOLARISE]] = 0
    coloured[:, P_SIGMA] = 0
    per_image = 1 / len(images)
    bare, with_colour, with_blur, full = (
        per_image * _milliseconds(lambda p=p: render_all(p))
        for p in (plain, coloured, blurred, drawn)
    )
    storing = _milliseconds(lambda: _store_view(planes, view))
    return {
        "decode": per_image * _milliseconds(decode_all),
        "resize": bare - storing,
        "colour": with_colour - bare,
        "blur": with_blur - with_colour,
        "operations": full - with_blur,
        "store": storing,
        "view": full,
    }


@compiled_uncached
def _store_view(planes, view):
    for c in range(3):
        for y in range(planes.shape[1]):
            store(planes[c, y], view[c, y])


def _milliseconds(work) -> float:
    """Return the least of a few timings: the time on an undisturbed machine."""
    work()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1000 * min(times)
