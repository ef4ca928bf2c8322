"""Pixel kernels of one view, compiled by Numba.

A view in the making is three contiguous float32 planes of values in 0..255. Each kernel follows
torchvision's definition on float tensors; the tests compare the two.

Three rules make the kernels fast:

- Colour kernels take contiguous 1-D slices (of each channel a row or the whole plane) and change
  them in place. LLVM vectorises such loops. It does not vectorise loops that index into a 2-D
  array element by element.
- Resizing and blurring use the vector sums of `simd`.
- An index that does not come from a `range` is unsigned, since Numba checks a signed one for
  negative values.

How a crop is resized (`render.resized_crop`, `shrink_rows`), BLOCK = 16 output rows at a time:

    image    uint8, rows of interleaved pixels:       R G B R G B R G B ...
      |
      |  vertical sums: each row is a weighted sum of a few image rows
      v
    rows     float32, 16 rows, one after the other; a row holds n values, filled up to a multiple
             of 8:
               row 0    R0 G0 B0 R1 G1 B1 ...
               row 1    R0 G0 B0 R1 G1 B1 ...
               ...
               row 15   R0 G0 B0 R1 G1 B1 ...
      |
      |  transposed, in squares of 8 x 8 values
      v
    columns  float32, value i of all 16 rows side by side; a pixel is 3 * 16 = 48 values:
               R0 of rows 0..15 | G0 of rows 0..15 | B0 of rows 0..15 | R1 of rows 0..15 | ...
      |
      |  horizontal sums: each output pixel is a weighted sum of a few columns, 48 values at once
      v
    shrunk   float32, the same layout, of as many pixels as the view is wide
      |
      |  transposed back, and the channels taken apart
      v
    planes   float32 (3, R, R), rows y .. y + 15 of each plane:
               R R R R ...    G G G G ...    B B B B ...
"""

import math

import numpy as np

from ffssl.data.kernels.jit import compiled
from ffssl.data.kernels.simd import BLOCK, LANES, sum_pixel, transpose, weighted_sum

_ZERO, _ONE, _WHITE, _HALF = np.float32(0), np.float32(1), np.float32(255), np.float32(0.5)
# ITU-R 601-2 luma, as torchvision rounds it.
RED, GREEN, BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)


# Resizing


@compiled
def _filter(x, cubic):
    """The triangle filter at x, of support 1, or the cubic convolution filter, of support 2.

    The latter's parameter is -0.5 (Keys 1981).
    """
    x = abs(x)
    if not cubic:
        return max(0.0, 1.0 - x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0 if x < 2.0 else 0.0


@compiled
def filter_weights(origin, length, target, cubic, first, count, weights):
    """Compute the taps of an antialiased filter from `length` pixels to `target`.

    It is the triangle filter, which Pillow and torchvision call "bilinear", or if `cubic` the one
    that they call "bicubic".

    The source extends from `origin` (in 0..1) to origin + length. Both may be fractions; a pixel
    cut by an edge counts whole.

    Written for each output pixel:
    first: uint64 (target,), the first source pixel of its sum.
    count: uint64 (target,), the number of its taps.
    weights: float32 (target, `most_taps(length, target, cubic)` or more); a row's taps sum to one.
    """
    scale = length / target
    narrow = 1.0 / max(scale, 1.0)
    support = max(scale, 1.0) * (2.0 if cubic else 1.0)
    end = int(math.ceil(origin + length))
    for i in range(target):
        centre = origin + (i + 0.5) * scale
        low = max(int(centre - support + 0.5), 0)
        high = min(int(centre + support + 0.5), end)
        total = 0.0
        for k in range(high - low):
            total += _filter((low + k - centre + 0.5) * narrow, cubic)
        share = 1.0 / total
        for k in range(high - low):
            weights[i, k] = _filter((low + k - centre + 0.5) * narrow, cubic) * share
        first[i] = low
        count[i] = high - low


@compiled
def most_taps(length, target, cubic):
    """The largest number of taps that `filter_weights` gives an output pixel."""
    return int(math.ceil(max(length / target, 1.0) * (2.0 if cubic else 1.0))) * 2 + 1


@compiled
def shrink_rows(rows, n, first, count, weights, flip, columns, shrunk, planes, y):
    """Shrink BLOCK rows horizontally into rows y, y + 1, ... of the planes; mirror them if `flip`.

    The module's docstring draws the layouts. The sums run over pixels whose BLOCK rows lie side by
    side, so the block is transposed before and after.

    rows: float32 (BLOCK * n,), interleaved RGB. n is a multiple of LANES, and at least 3 values
        for each source pixel.
    first, count, weights: see `filter_weights`.
    columns: scratch, float32 (BLOCK * n,).
    shrunk: scratch, float32 (3 * BLOCK * R,).
    planes: float32 (3, R, R), written.
    """
    block, pixel, row = np.uint64(BLOCK), np.uint64(3 * BLOCK), np.uint64(n)
    for i in range(0, n, LANES):
        for part in range(0, BLOCK, LANES):
            start, at = np.uint64(part * n + i), np.uint64(i) * block + np.uint64(part)
            transpose(rows, start, row, columns, at, block)

    resolution, taps, all_weights = count.shape[0], np.uint64(weights.shape[1]), weights.reshape(-1)
    for x in range(resolution):
        start, at = pixel * first[x], pixel * np.uint64(resolution - 1 - x if flip else x)
        taps_of_x = taps * np.uint64(x)
        sum_pixel(columns, start, pixel, all_weights, taps_of_x, count[x], shrunk, at)

    # Whole squares are transposed; the rest goes value by value.
    whole = resolution // LANES * LANES if y + BLOCK <= resolution else 0
    out, side = planes.reshape(-1), np.uint64(resolution)
    for c in range(3):
        for part in range(0, BLOCK, LANES):
            for x in range(0, whole, LANES):
                start = pixel * np.uint64(x) + np.uint64(c * BLOCK + part)
                at = np.uint64((c * resolution + y + part) * resolution + x)
                transpose(shrunk, start, pixel, out, at, side)
        for i in range(min(BLOCK, resolution - y)):
            for x in range(whole, resolution):
                planes[c, y + i, x] = shrunk[(3 * x + c) * BLOCK + i]


# Colour


@compiled
def _clip(value):
    return min(max(value, _ZERO), _WHITE)


@compiled
def clip(channel):
    """Clip values to 0..255: the cubic filter overshoots."""
    for i in range(channel.shape[0]):
        channel[i] = _clip(channel[i])


@compiled
def adjust_brightness(red, green, blue, factor):
    for channel in (red, green, blue):
        for i in range(channel.shape[0]):
            channel[i] = _clip(factor * channel[i])


@compiled
def grey_sum(red, green, blue):
    """Return the sum of the slice's luma. Contrast blends towards its mean over the view."""
    total = _ZERO
    for i in range(red.shape[0]):
        total += RED * red[i] + GREEN * green[i] + BLUE * blue[i]
    return total


@compiled
def adjust_contrast(red, green, blue, factor, mean):
    offset = (_ONE - factor) * mean
    for channel in (red, green, blue):
        for i in range(channel.shape[0]):
            channel[i] = _clip(factor * channel[i] + offset)


@compiled
def adjust_saturation(red, green, blue, factor):
    rest = _ONE - factor
    for i in range(red.shape[0]):
        grey = rest * (RED * red[i] + GREEN * green[i] + BLUE * blue[i])
        red[i] = _clip(factor * red[i] + grey)
        green[i] = _clip(factor * green[i] + grey)
        blue[i] = _clip(factor * blue[i] + grey)


@compiled
def _from_hue(hue, offset, value, chroma):
    k = hue + offset
    k -= np.float32(6) * np.floor(k * np.float32(1 / 6))
    return value - chroma * max(_ZERO, min(min(k, np.float32(4) - k), _ONE))


@compiled
def adjust_hue(red, green, blue, shift):
    """Rotate the hue in HSV by `shift` turns (-0.5..0.5), without a branch.

    Value and chroma stay.
    """
    turn = np.float32(6) * shift
    for i in range(red.shape[0]):
        r, g, b = red[i], green[i], blue[i]
        value = max(r, max(g, b))
        chroma = value - min(r, min(g, b))
        scale = _ONE / max(chroma, np.float32(1e-6))
        hue = (r - g) * scale + np.float32(4)
        hue = (b - r) * scale + np.float32(2) if g == value else hue
        hue = (g - b) * scale if r == value else hue
        hue += turn
        red[i] = _from_hue(hue, np.float32(5), value, chroma)
        green[i] = _from_hue(hue, np.float32(3), value, chroma)
        blue[i] = _from_hue(hue, _ONE, value, chroma)


@compiled
def colour_matrix(brightness, contrast, saturation, hue, matrix):
    """Compute a 3x4 affine colour map (float32 (3, 4), written), like DALI's.

    The steps are hue (a rotation by `hue` turns in YIQ), saturation, contrast about mid-grey and
    brightness.

    It differs from the torchvision form in three ways. Contrast pivots on 128 instead of the view's
    mean. Nothing is clipped between the steps. The linear hue keeps luma instead of HSV's value
    (hue alone differs by about 9/255 in the mean at 0.1 turns).
    """
    # The sign makes a positive hue turn red towards green, as in HSV.
    cosine = saturation * math.cos(2 * math.pi * hue)
    sine = -saturation * math.sin(2 * math.pi * hue)
    to_yiq = (
        (0.299, 0.587, 0.114),
        (0.595716, -0.274453, -0.321263),
        (0.211456, -0.522591, 0.311135),
    )
    to_rgb = ((1.0, 0.9563, 0.6210), (1.0, -0.2721, -0.6474), (1.0, -1.1070, 1.7046))
    gain = brightness * contrast
    for c in range(3):
        for d in range(3):
            i, q = to_yiq[1][d], to_yiq[2][d]
            matrix[c, d] = gain * (
                to_yiq[0][d]
                + to_rgb[c][1] * (cosine * i - sine * q)
                + to_rgb[c][2] * (sine * i + cosine * q)
            )
        matrix[c, 3] = brightness * (1 - contrast) * 128.0


@compiled
def apply_colour_matrix(red, green, blue, matrix):
    # In local variables, which LLVM keeps in registers. rg: to red, from green; r1: the offset.
    rr, rg, rb, r1 = matrix[0, 0], matrix[0, 1], matrix[0, 2], matrix[0, 3]
    gr, gg, gb, g1 = matrix[1, 0], matrix[1, 1], matrix[1, 2], matrix[1, 3]
    br, bg, bb, b1 = matrix[2, 0], matrix[2, 1], matrix[2, 2], matrix[2, 3]
    for i in range(red.shape[0]):
        r, g, b = red[i], green[i], blue[i]
        red[i] = _clip(rr * r + rg * g + rb * b + r1)
        green[i] = _clip(gr * r + gg * g + gb * b + g1)
        blue[i] = _clip(br * r + bg * g + bb * b + b1)


@compiled
def to_grey(red, green, blue):
    for i in range(red.shape[0]):
        grey = RED * red[i] + GREEN * green[i] + BLUE * blue[i]
        red[i] = grey
        green[i] = grey
        blue[i] = grey


@compiled
def solarise(channel, threshold):
    """Invert the values at or above `threshold`, as torchvision's `solarize` does."""
    for i in range(channel.shape[0]):
        channel[i] = _WHITE - channel[i] if channel[i] >= threshold else channel[i]


# Blurring


@compiled
def blur_radius(sigma):
    """Return the radius at which the Gaussian is cut: three sigma, rounded up."""
    return int(math.ceil(3 * sigma))


@compiled
def gaussian_taps(sigma, radius, taps):
    """Compute the weights of the pixels at distances -radius..radius, which sum to one.

    taps: float32 (2 * radius + 1,), written.
    """
    total = 0.0
    for k in range(-radius, radius + 1):
        total += math.exp(-0.5 * (k / sigma) ** 2)
    for k in range(-radius, radius + 1):
        taps[k + radius] = math.exp(-0.5 * (k / sigma) ** 2) / total


@compiled
def _mirror(i, n):
    """Return the index, in a row of n pixels, of pixel i of the row continued by reflection.

    The border pixel is not repeated.
    """
    if n == 1:
        return 0
    while not 0 <= i < n:  # a division would take longer than the rest of a short blur
        i = -i if i < 0 else 2 * n - 2 - i
    return i


@compiled
def blur_rows(plane, n, taps, padded, blurred):
    """Blur the rows of a plane, and continue the result above and below by reflection.

    plane: float32 (n * n,).
    taps: see `gaussian_taps`.
    padded: scratch, float32 (n + 2 * radius,).
    blurred: float32 ((n + 2 * radius) * n,), written.

        padded, one row at a time           blurred, a row of n values a line
                                              radius rows, reflected
        radius | a row: n | radius    ->      n rows, blurred horizontally
        reflected     reflected               radius rows, reflected
    """
    side, radius = np.uint64(n), taps.shape[0] // 2
    zero, one, count = np.uint64(0), np.uint64(1), np.uint64(taps.shape[0])
    for y in range(n):
        row = np.uint64(y) * side
        for x in range(n):
            padded[np.uint64(radius + x)] = plane[row + np.uint64(x)]
        for k in range(1, radius + 1):
            padded[radius - k] = plane[row + np.uint64(_mirror(-k, n))]
            padded[radius + n - 1 + k] = plane[row + np.uint64(_mirror(n - 1 + k, n))]
        at = np.uint64(radius + y) * side
        weighted_sum(padded, zero, one, taps, zero, count, blurred, at, side)

    rows = blurred.reshape(n + 2 * radius, n)
    for k in range(1, radius + 1):
        rows[radius - k] = rows[radius + _mirror(-k, n)]
        rows[radius + n - 1 + k] = rows[radius + _mirror(n - 1 + k, n)]


@compiled
def store(row, out):
    """Round a float32 row to uint8."""
    for i in range(out.shape[0]):
        out[i] = np.uint8(_clip(row[i]) + _HALF)
