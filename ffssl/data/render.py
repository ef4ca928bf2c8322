"""One view of a decoded image: the kernels in the order of a policy.

A view goes through memory in at most three passes, a row at a time so that the row stays in the fastest cache: resize and the
colour steps up to contrast, which needs the mean of the whole view; the other colour steps and the horizontal blur; the
vertical blur. The last pass stores uint8, on which RandAugment's operations work.
"""

import numpy as np

from ffssl.data import kernels
from ffssl.data.compiled import compiled
from ffssl.data.policy import (
    AFFINE_JITTER, MOST_OPERATIONS, P_BRIGHTNESS, P_CONTRAST, P_FLIP, P_GREY, P_HEIGHT, P_HUE, P_JITTER, P_LEFT, P_OPERATION,
    P_ORDER, P_SATURATION, P_SIGMA, P_SOLARISE, P_STRENGTH, P_TOP, P_WIDTH,
)  # fmt: skip
from ffssl.data.rand_augment import augment

SOLARISE_THRESHOLD = np.float32(128)
_IDENTITY_SIGMA = 0.2  # a narrower Gaussian leaves every pixel within 0.001/255
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)


@compiled
def colour_order(number, order):
    """Permutation `number` (0..23) of the four colour steps into `order` (int64, (4,)), by its factorial digits."""
    left = np.arange(4)
    for i in range(4):
        radix = (6, 2, 1, 1)[i]
        digit = (number // radix) % (4 - i)
        order[i] = left[digit]
        for j in range(digit, 3 - i):
            left[j] = left[j + 1]


@compiled
def _jitter(steps, red, green, blue, drawn, mean):
    """Apply the torchvision form's steps (indices into brightness, contrast, saturation, hue) to one row."""
    for step in steps:
        if step == _BRIGHTNESS:
            kernels.adjust_brightness(red, green, blue, np.float32(drawn[P_BRIGHTNESS]))
        elif step == _CONTRAST:
            kernels.adjust_contrast(red, green, blue, np.float32(drawn[P_CONTRAST]), mean)
        elif step == _SATURATION:
            kernels.adjust_saturation(red, green, blue, np.float32(drawn[P_SATURATION]))
        elif drawn[P_HUE] != 0:
            kernels.adjust_hue(red, green, blue, np.float32(drawn[P_HUE]))


@compiled
def render(image, drawn, affine, out):
    """Render one view.

    image: uint8 (height, width, 3). drawn: the view's parameters, see `policy.draw`. affine: which form of colour jitter.
    out: uint8 (3, R, R), written. Allocates about 3 R^2 floats of scratch.
    """
    resolution = out.shape[1]
    top, left = np.int64(drawn[P_TOP]), np.int64(drawn[P_LEFT])
    height, width = np.int64(drawn[P_HEIGHT]), np.int64(drawn[P_WIDTH])
    jitter = drawn[P_JITTER] != 0
    order = np.empty(4, np.int64)
    colour_order(np.int64(drawn[P_ORDER]), order)
    pivot = 0  # the step at which contrast, and with it the second pass, begins
    while order[pivot] != _CONTRAST:
        pivot += 1
    matrix = np.empty((3, 4), np.float32)
    if affine:
        kernels.colour_matrix(drawn[P_BRIGHTNESS], drawn[P_CONTRAST], drawn[P_SATURATION], drawn[P_HUE], matrix)
    radius = 0
    if drawn[P_SIGMA] > _IDENTITY_SIGMA:
        radius = kernels.blur_radius(drawn[P_SIGMA])
    taps = np.empty(radius + 1, np.float32)
    kernels.gaussian_taps(max(drawn[P_SIGMA], _IDENTITY_SIGMA), radius, taps)
    padded = np.empty(resolution + 2 * radius, np.float32)

    first_y, count_y = np.empty(resolution, np.uint64), np.empty(resolution, np.int64)
    first_x, count_x = np.empty(resolution, np.uint64), np.empty(resolution, np.int64)
    weights_y = np.empty((resolution, kernels.most_taps(height, resolution)), np.float32)
    weights_x = np.empty((resolution, kernels.most_taps(width, resolution)), np.float32)
    kernels.triangle_weights(height, resolution, first_y, count_y, weights_y)
    kernels.triangle_weights(width, resolution, first_x, count_x, weights_x)
    rows = image.reshape(image.shape[0], image.shape[1] * 3)
    blended, pixels = np.zeros(3 * width + 1, np.float32), np.empty(4 * resolution, np.float32)
    planes = np.empty((3, resolution, resolution), np.float32)

    total = 0.0
    for y in range(resolution):
        red, green, blue = planes[0, y], planes[1, y], planes[2, y]
        kernels.blend_rows(rows, 3 * left, 3 * (left + width), first_y[y] + np.uint64(top), count_y[y], weights_y[y],
                           blended[: 3 * width])
        kernels.shrink_row(blended, first_x, count_x, weights_x, pixels)
        kernels.split_channels(pixels, drawn[P_FLIP] != 0, red, green, blue)
        if jitter and not affine:
            _jitter(order[:pivot], red, green, blue, drawn, np.float32(0))
            total += kernels.grey_sum(red, green, blue)

    mean = np.float32(total / (resolution * resolution))
    for y in range(resolution):
        red, green, blue = planes[0, y], planes[1, y], planes[2, y]
        if jitter and affine:
            kernels.apply_colour_matrix(red, green, blue, matrix)
        elif jitter:
            _jitter(order[pivot:], red, green, blue, drawn, mean)
        if drawn[P_GREY] != 0:
            kernels.to_grey(red, green, blue)
        for c in range(3):
            if radius > 0:
                kernels.blur_row(planes[c, y], taps, radius, padded)
            else:
                _finish(planes[c, y], drawn, out[c, y])
    if radius > 0:
        row = np.empty(resolution, np.float32)
        for c in range(3):
            for y in range(resolution):
                kernels.blur_column_into(planes[c], y, taps, radius, row)
                _finish(row, drawn, out[c, y])
    for i in range(MOST_OPERATIONS):
        augment(out, int(drawn[P_OPERATION + 2 * i]), drawn[P_STRENGTH + 2 * i])


@compiled
def _finish(row, drawn, out):
    if drawn[P_SOLARISE] != 0:
        kernels.solarise(row, SOLARISE_THRESHOLD)
    kernels.store(row, out)
