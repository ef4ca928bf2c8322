"""One view of a decoded image: the kernels in the order of a policy.

Between the stages a view is float32 planes, which fit into a core's second-level cache. The colour
jitter does all its steps to a chunk of them while the chunk is in the first-level cache. The last
stage rounds to uint8; RandAugment's operations work on that. `operations` draws the memory layouts.
"""

import math

import numpy as np

from ffssl.data.kernels import operations
from ffssl.data.kernels.draw import (
    MOST_OPERATIONS,
    P_BRIGHTNESS,
    P_CONTRAST,
    P_CUBIC,
    P_FLIP,
    P_GREY,
    P_HEIGHT,
    P_HUE,
    P_JITTER,
    P_LEFT,
    P_OPERATION,
    P_ORDER,
    P_SATURATION,
    P_SIGMA,
    P_SOLARISE,
    P_STRENGTH,
    P_TOP,
    P_WIDTH,
)
from ffssl.data.kernels.jit import compiled
from ffssl.data.kernels.rand_augment import augment
from ffssl.data.kernels.simd import BLOCK, LANES, weighted_sum

SOLARISE_THRESHOLD = np.float32(128)
_IDENTITY_SIGMA = 0.2  # a narrower Gaussian leaves every pixel within 0.001/255
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
CHUNK = 2048  # pixels; their three channels take 24 kB


@compiled
def colour_order(number, order):
    """Write permutation `number` (0..23) of the four colour steps into `order` (int64 (4,)).

    Its factorial digits choose from the steps that are left.
    """
    left = np.arange(4)
    for i in range(4):
        radix = (6, 2, 1, 1)[i]
        digit = (number // radix) % (4 - i)
        order[i] = left[digit]
        for j in range(digit, 3 - i):
            left[j] = left[j + 1]


@compiled
def render(image, drawn, affine, out):
    """Render one view.

    image: uint8 (height, width, 3).
    drawn: the view's parameters, see `draw.draw`. The crop is in pixels of `image`, perhaps in
        fractions of them.
    affine: jitter by a colour matrix instead of torchvision's steps.
    out: uint8 (3, R, R), written.

    Allocates about 4 R^2 floats of scratch.
    """
    resolution = out.shape[1]
    square = np.empty((3, resolution, resolution), np.float32)
    resized_crop(image, drawn, square)

    planes = square.reshape(3, resolution * resolution)
    if drawn[P_JITTER] != 0:
        if affine:
            jitter_by_matrix(planes, drawn)
        else:
            jitter_by_steps(planes, drawn)
    channels = 3
    if drawn[P_GREY] != 0:
        operations.to_grey(planes[0], planes[1], planes[2])
        channels = 1  # they are equal from here on

    stored = out.reshape(3, resolution * resolution)
    for c in range(channels):
        if drawn[P_SIGMA] > _IDENTITY_SIGMA:
            blur(planes[c], resolution, drawn[P_SIGMA])
        if drawn[P_SOLARISE] != 0:
            operations.solarise(planes[c], SOLARISE_THRESHOLD)
        operations.store(planes[c], stored[c])
    for c in range(channels, 3):
        stored[c] = stored[0]

    for i in range(MOST_OPERATIONS):
        augment(out, int(drawn[P_OPERATION + 2 * i]), drawn[P_STRENGTH + 2 * i])


@compiled
def resized_crop(image, drawn, planes):
    """Resize the crop of `image` with antialiasing, mirrored if drawn so.

    image: uint8 (height, width, 3).
    drawn: see `render`.
    planes: float32 (3, R, R), written. `operations` draws the layouts on the way there.
    """
    resolution = planes.shape[1]
    top, left, height, width = drawn[P_TOP], drawn[P_LEFT], drawn[P_HEIGHT], drawn[P_WIDTH]
    first_row, first_column = np.uint64(top), np.uint64(left)
    row_length = 3 * (np.int64(math.ceil(left + width)) - np.int64(left))
    first_y, count_y = np.empty(resolution, np.uint64), np.empty(resolution, np.uint64)
    first_x, count_x = np.empty(resolution, np.uint64), np.empty(resolution, np.uint64)
    cubic = drawn[P_CUBIC] != 0
    weights_y = np.empty((resolution, operations.most_taps(height, resolution, cubic)), np.float32)
    weights_x = np.empty((resolution, operations.most_taps(width, resolution, cubic)), np.float32)
    operations.filter_weights(top % 1, height, resolution, cubic, first_y, count_y, weights_y)
    operations.filter_weights(left % 1, width, resolution, cubic, first_x, count_x, weights_x)

    # A row is filled up to whole vectors. The filling is transposed too, but is in no sum.
    row_stride = (row_length + LANES - 1) // LANES * LANES
    rows = np.empty(BLOCK * row_stride, np.float32)
    columns = np.empty(BLOCK * row_stride, np.float32)
    shrunk = np.empty(3 * BLOCK * resolution, np.float32)

    pixels, step, length = image.reshape(-1), np.uint64(3 * image.shape[1]), np.uint64(row_length)
    all_weights, taps = weights_y.reshape(-1), np.uint64(weights_y.shape[1])
    flip = drawn[P_FLIP] != 0
    for y in range(0, resolution, BLOCK):
        for i in range(min(BLOCK, resolution - y)):
            start = (first_row + first_y[y + i]) * step + np.uint64(3) * first_column
            first, count, at = taps * np.uint64(y + i), count_y[y + i], np.uint64(i * row_stride)
            weighted_sum(pixels, start, step, all_weights, first, count, rows, at, length)
        operations.shrink_rows(
            rows, row_stride, first_x, count_x, weights_x, flip, columns, shrunk, planes, y
        )
    if cubic:
        operations.clip(planes.reshape(-1))


@compiled
def jitter_by_matrix(planes, drawn):
    matrix = np.empty((3, 4), np.float32)
    operations.colour_matrix(
        drawn[P_BRIGHTNESS], drawn[P_CONTRAST], drawn[P_SATURATION], drawn[P_HUE], matrix
    )
    operations.apply_colour_matrix(planes[0], planes[1], planes[2], matrix)


@compiled
def jitter_by_steps(planes, drawn):
    """Apply torchvision's four colour steps in the drawn order.

    Contrast needs the mean of the whole view. So one pass does the steps before it and sums the
    luma, and a second pass does contrast and the steps after it.
    """
    order = np.empty(4, np.int64)
    colour_order(np.int64(drawn[P_ORDER]), order)
    pivot = 0
    while order[pivot] != _CONTRAST:
        pivot += 1
    total, n = 0.0, planes.shape[1]
    for i in range(0, n, CHUNK):
        end = i + CHUNK
        red, green, blue = planes[0, i:end], planes[1, i:end], planes[2, i:end]
        _steps(order[:pivot], red, green, blue, drawn, np.float32(0))
        total += operations.grey_sum(red, green, blue)
    mean = np.float32(total / n)
    for i in range(0, n, CHUNK):
        end = i + CHUNK
        red, green, blue = planes[0, i:end], planes[1, i:end], planes[2, i:end]
        _steps(order[pivot:], red, green, blue, drawn, mean)


@compiled
def _steps(steps, red, green, blue, drawn, mean):
    """Apply colour steps (indices into brightness, contrast, saturation, hue) to a chunk."""
    for step in steps:
        if step == _BRIGHTNESS:
            operations.adjust_brightness(red, green, blue, np.float32(drawn[P_BRIGHTNESS]))
        elif step == _CONTRAST:
            operations.adjust_contrast(red, green, blue, np.float32(drawn[P_CONTRAST]), mean)
        elif step == _SATURATION:
            operations.adjust_saturation(red, green, blue, np.float32(drawn[P_SATURATION]))
        elif drawn[P_HUE] != 0:
            operations.adjust_hue(red, green, blue, np.float32(drawn[P_HUE]))


@compiled
def blur(plane, n, sigma):
    """Blur `plane` (float32 (n * n,)) in place: first along the rows, then along the columns."""
    radius, side = operations.blur_radius(sigma), np.uint64(n)
    taps, padded = np.empty(2 * radius + 1, np.float32), np.empty(n + 2 * radius, np.float32)
    blurred = np.empty((n + 2 * radius) * n, np.float32)
    operations.gaussian_taps(sigma, radius, taps)
    operations.blur_rows(plane, n, taps, padded, blurred)
    zero, count = np.uint64(0), np.uint64(taps.shape[0])
    for y in range(n):
        row = np.uint64(y) * side
        weighted_sum(blurred, row, side, taps, zero, count, plane, row, side)
