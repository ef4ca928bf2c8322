"""RandAugment (Cubuk et al. 2019) on one rendered view, compiled by Numba.

Operations and magnitudes are torchvision's. A view is uint8 (3, R, R) and is changed in place.
Every operation rounds to uint8 as torchvision's do on uint8 tensors; the tests compare the two.
Warps take the nearest pixel, and black outside. The row kernels follow the rules of `operations`.
"""

import math

import numpy as np

from ffssl.data.kernels.jit import compiled
from ffssl.data.kernels.operations import BLUE, GREEN, RED

(
    IDENTITY,
    SHEAR_X,
    SHEAR_Y,
    TRANSLATE_X,
    TRANSLATE_Y,
    ROTATE,
    BRIGHTNESS,
    COLOUR,
    CONTRAST,
    SHARPNESS,
    POSTERISE,
    SOLARISE,
    AUTOCONTRAST,
    EQUALISE,
) = range(14)
OPERATIONS = 14
MOST_MAGNITUDE = 30.0

# Strength of each operation at magnitude 0 and at 30, and whether its sign is drawn.
_STRENGTHS = np.array(
    [
        (0, 0, 0),  # identity
        (0, 0.3, 1),  # shear x: pixels a pixel
        (0, 0.3, 1),  # shear y
        (0, 150 / 331, 1),  # translate x: share of the side
        (0, 150 / 331, 1),  # translate y
        (0, 30, 1),  # rotate: degrees counterclockwise
        (0, 0.9, 1),  # brightness: factor minus one
        (0, 0.9, 1),  # colour: the same
        (0, 0.9, 1),  # contrast: the same
        (0, 0.9, 1),  # sharpness: the same
        (8, 4, 0),  # posterise: bits left
        (255, 0, 0),  # solarise: threshold
        (0, 0, 0),  # autocontrast
        (0, 0, 0),  # equalise
    ]
)

_WHITE, _HALF = np.float32(255), np.float32(0.5)


@compiled
def operation_strength(operation, magnitude, negative):
    """Return torchvision's strength of an operation, negated if asked for and if it has a sign.

    magnitude: 0..30; linear between torchvision's 31 bins.
    """
    weakest, strongest = _STRENGTHS[operation, 0], _STRENGTHS[operation, 1]
    value = weakest + (strongest - weakest) * (magnitude / MOST_MAGNITUDE)
    if operation == POSTERISE:
        value = float(round(value))
    return -value if negative and _STRENGTHS[operation, 2] != 0 else value


# Warps


@compiled
def inverse_map(operation, strength, side):
    """Return (xx, xy, x0, yx, yy, y0), which map output pixels to source pixels.

    Output pixel (x, y) shows the source at (xx x + xy y + x0, yx x + yy y + y0), in pixel indices.
    """
    if operation == SHEAR_X:
        return 1.0, strength, strength / 2, 0.0, 1.0, 0.0
    if operation == SHEAR_Y:
        return 1.0, 0.0, 0.0, strength, 1.0, strength / 2
    if operation == TRANSLATE_X:
        return 1.0, 0.0, -float(int(strength * side)), 0.0, 1.0, 0.0
    if operation == TRANSLATE_Y:
        return 1.0, 0.0, 0.0, 0.0, 1.0, -float(int(strength * side))
    angle, centre = math.radians(strength), (side - 1) / 2
    cosine, sine = math.cos(angle), math.sin(angle)
    x0, y0 = centre - (cosine - sine) * centre, centre - (sine + cosine) * centre
    return cosine, -sine, x0, sine, cosine, y0


@compiled
def nearest_pixels(x0, dx, y0, dy, side, places):
    """Write the place in a plane of the pixel nearest to (x0 + i dx, y0 + i dy), for each i.

    places: int32 (side,), written; side * side stands for a pixel outside.
    """
    last = np.float32(side - 1)
    for i in range(side):
        x, y = np.rint(x0 + np.float32(i) * dx), np.rint(y0 + np.float32(i) * dy)
        inside = (x >= 0) & (x <= last) & (y >= 0) & (y <= last)
        places[i] = np.int32(y) * side + np.int32(x) if inside else side * side


@compiled
def take(plane, places, out):
    for i in range(out.shape[0]):
        out[i] = plane[np.uint32(places[i])]


@compiled
def _copy(row, out):
    for i in range(row.shape[0]):
        out[i] = row[i]


@compiled
def _warp(channels, side, operation, strength):
    # The last value of each channel stands for all pixels outside.
    source = np.zeros((3, side * side + 1), np.uint8)
    for c in range(3):
        _copy(channels[c], source[c])
    xx, xy, x0, yx, yy, y0 = inverse_map(operation, strength, side)
    places = np.empty(side, np.int32)
    for y in range(side):
        nearest_pixels(
            np.float32(xy * y + x0),
            np.float32(xx),
            np.float32(yy * y + y0),
            np.float32(yx),
            side,
            places,
        )
        for c in range(3):
            take(source[c], places, channels[c, y * side : (y + 1) * side])


# Colour


@compiled
def _level(value):
    """Round a value down to a level, as torchvision's conversion to uint8 does."""
    return np.uint8(min(max(value, np.float32(0)), _WHITE))


@compiled
def _luma(red, green, blue):
    return np.floor(RED * np.float32(red) + GREEN * np.float32(green) + BLUE * np.float32(blue))


@compiled
def scale(channel, factor, offset):
    for i in range(channel.shape[0]):
        channel[i] = _level(factor * np.float32(channel[i]) + offset)


@compiled
def luma_sum(red, green, blue):
    total = 0
    for i in range(red.shape[0]):
        total += np.int32(_luma(red[i], green[i], blue[i]))
    return total


@compiled
def adjust_colour(red, green, blue, factor):
    rest = np.float32(1) - factor
    for i in range(red.shape[0]):
        grey = rest * _luma(red[i], green[i], blue[i])
        red[i] = _level(factor * np.float32(red[i]) + grey)
        green[i] = _level(factor * np.float32(green[i]) + grey)
        blue[i] = _level(factor * np.float32(blue[i]) + grey)


@compiled
def posterise(channel, bits):
    mask = np.uint8(256 - (1 << (8 - bits)))
    for i in range(channel.shape[0]):
        channel[i] &= mask


@compiled
def solarise(channel, threshold):
    """Invert the levels at or above `threshold` (uint8)."""
    for i in range(channel.shape[0]):
        channel[i] = np.uint8(255) - channel[i] if channel[i] >= threshold else channel[i]


# Sharpness


@compiled
def _add_rows(above, row, below, out):
    for i in range(out.shape[0]):
        out[i] = np.float32(above[i]) + np.float32(row[i]) + np.float32(below[i])


@compiled
def _sharpen_row(left, middle, right, factor, row):
    """Move `row` away from its smoothed self: eight neighbours and five times itself.

    left, middle, right: sums over three rows of the columns beside and at each pixel.
    """
    rest = np.float32(1) - factor
    for i in range(row.shape[0]):
        value = np.float32(row[i])
        smooth = np.floor(
            (left[i] + middle[i] + right[i] + np.float32(4) * value) * np.float32(1 / 13) + _HALF
        )
        row[i] = _level(value + rest * (smooth - value))


@compiled
def adjust_sharpness(plane, factor):
    """Blend a plane (uint8 (height, width)) with its smoothed self, in place.

    The pixels on its border stay.
    """
    height, width = plane.shape
    if height < 3 or width < 3:
        return
    source, sums = plane.copy(), np.empty(width, np.float32)
    for y in range(1, height - 1):
        _add_rows(source[y - 1], source[y], source[y + 1], sums)
        _sharpen_row(sums[:-2], sums[1:-1], sums[2:], factor, plane[y, 1:-1])


# Stretching the levels


@compiled
def autocontrast(channel):
    """Stretch the levels in use to 0..255, rounded down exactly.

    (Torchvision's float32 quotient often falls just short of an integer.)
    """
    low = high = channel[0]
    for i in range(channel.shape[0]):
        low, high = min(low, channel[i]), max(high, channel[i])
    if low < high:
        width = np.float32(high) - np.float32(low)
        # The half keeps integers from being rounded down.
        scale(channel, _WHITE / width, (_HALF - _WHITE * np.float32(low)) / width)


@compiled
def histograms(red, green, blue, counts):
    """Add the levels of three channels to `counts` (int64 (3, 256)).

    The channels take turns, since counting equal neighbours one after the other makes the CPU wait.
    """
    for i in range(red.shape[0]):
        counts[0, np.uint64(red[i])] += 1
        counts[1, np.uint64(green[i])] += 1
        counts[2, np.uint64(blue[i])] += 1


@compiled
def equalise_table(counts, table):
    """Compute Pillow's table that makes all levels about as frequent.

    counts: int64 (256,).
    table: uint8 (256,), written.
    """
    pixels = last = 0
    for level in range(256):
        pixels += counts[level]
        last = counts[level] if counts[level] > 0 else last
    step = (pixels - last) // 255
    below = step // 2
    for level in range(256):
        table[level] = min(below // step, 255) if step > 0 else level
        below += counts[level]


@compiled
def look_up(channel, table):
    for i in range(channel.shape[0]):
        channel[i] = table[np.uint64(channel[i])]


@compiled
def _equalise(red, green, blue):
    counts, table = np.zeros((3, 256), np.int64), np.empty(256, np.uint8)
    histograms(red, green, blue, counts)
    for channel, levels in ((red, counts[0]), (green, counts[1]), (blue, counts[2])):
        equalise_table(levels, table)
        look_up(channel, table)


@compiled
def augment(view, operation, strength):
    """Apply one operation to a view, in place.

    view: uint8 (3, R, R), contiguous.
    strength: see `operation_strength`.
    """
    channels = view.reshape(3, view.shape[1] * view.shape[2])
    red, green, blue = channels[0], channels[1], channels[2]
    factor = np.float32(1 + strength)
    if SHEAR_X <= operation <= ROTATE:
        _warp(channels, view.shape[1], operation, strength)
    elif operation == COLOUR:
        adjust_colour(red, green, blue, factor)
    elif operation == EQUALISE:
        _equalise(red, green, blue)
    elif operation != IDENTITY:
        mean = luma_sum(red, green, blue) / red.shape[0] if operation == CONTRAST else 0.0
        for c in range(3):
            if operation in (BRIGHTNESS, CONTRAST):
                scale(channels[c], factor, np.float32(-strength * mean))
            elif operation == SHARPNESS:
                adjust_sharpness(view[c], factor)
            elif operation == POSTERISE:
                posterise(channels[c], int(strength))
            elif operation == AUTOCONTRAST:
                autocontrast(channels[c])
            else:
                solarise(channels[c], np.uint8(math.ceil(np.float32(strength))))
