"""Pixel kernels of one view, compiled by Numba.

A view in the making is three contiguous float32 planes of values in 0..255. Colour kernels take
contiguous 1-D slices (a row or a whole plane a channel) and change them in place: LLVM vectorises
such loops, and does not vectorise the same loops written as element-wise indexing into a 2-D array.
Resizing and blurring stand on the vector sums of `lanes`. Indices that do not come from a `range`
are unsigned, since Numba checks signed ones for negative values. Each kernel follows torchvision's
definition on float tensors; the tests hold the two side by side.
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
def triangle_weights(origin, length, target, first, count, weights):
    """Taps of the antialiased triangle filter (Pillow's and torchvision's "bilinear") from `length`
    source pixels to `target`.

    The source extends from `origin` (in 0..1) to origin + length, which may both be fractions; a
    pixel cut by an edge counts whole. Writes for each output pixel its `first` source pixel and the
    `count` of its taps (both uint64), and its row of `weights` (float32, (target,
    `most_taps(length, target)` or more)), which sums to one.
    """
    scale = length / target
    support = max(scale, 1.0)
    narrow = 1.0 / support
    end = int(math.ceil(origin + length))
    for i in range(target):
        centre = origin + (i + 0.5) * scale
        low = max(int(centre - support + 0.5), 0)
        high = min(int(centre + support + 0.5), end)
        total = 0.0
        for k in range(high - low):
            total += max(0.0, 1.0 - abs(low + k - centre + 0.5) * narrow)
        share = 1.0 / total
        for k in range(high - low):
            weights[i, k] = max(0.0, 1.0 - abs(low + k - centre + 0.5) * narrow) * share
        first[i] = low
        count[i] = high - low


@compiled
def most_taps(length, target):
    """The largest number of taps that `triangle_weights` gives an output pixel."""
    return int(math.ceil(max(length / target, 1.0))) * 2 + 1


@compiled
def shrink_rows(rows, n, first, count, weights, flip, columns, shrunk, planes, y):
    """Horizontal pass over BLOCK interleaved RGB rows into rows y, y + 1, ... of the planes,
    mirrored if `flip`.

    rows: float32 (BLOCK * n,), n a multiple of LANES and at least 3 values for each source pixel.
    first, count, weights: see `triangle_weights`. columns: scratch of BLOCK * n float32. shrunk:
    scratch of 3 * BLOCK * R. planes: float32 (3, R, R).

    The sums run over pixels whose BLOCK rows lie side by side, so the block is transposed before
    and after.
    """
    block, pixel = np.uint64(BLOCK), np.uint64(3 * BLOCK)
    for i in range(0, n, LANES):
        for part in range(0, BLOCK, LANES):
            transpose(
                rows,
                np.uint64(part * n + i),
                np.uint64(n),
                columns,
                np.uint64(i) * block + np.uint64(part),
                block,
            )
    resolution, taps, all_weights = count.shape[0], np.uint64(weights.shape[1]), weights.reshape(-1)
    for x in range(resolution):
        to = np.uint64(resolution - 1 - x if flip else x)
        sum_pixel(
            columns,
            pixel * first[x],
            pixel,
            all_weights,
            taps * np.uint64(x),
            count[x],
            shrunk,
            pixel * to,
        )
    whole = resolution // LANES * LANES if y + BLOCK <= resolution else 0
    out = planes.reshape(-1)
    for c in range(3):
        for part in range(0, BLOCK, LANES):
            for x in range(0, whole, LANES):
                transpose(
                    shrunk,
                    pixel * np.uint64(x) + np.uint64(c * BLOCK + part),
                    pixel,
                    out,
                    np.uint64((c * resolution + y + part) * resolution + x),
                    np.uint64(resolution),
                )
        for i in range(min(BLOCK, resolution - y)):
            for x in range(whole, resolution):
                planes[c, y + i, x] = shrunk[(3 * x + c) * BLOCK + i]


# Colour


@compiled
def _clip(value):
    return min(max(value, _ZERO), _WHITE)


@compiled
def adjust_brightness(red, green, blue, factor):
    for channel in (red, green, blue):
        for i in range(channel.shape[0]):
            channel[i] = _clip(factor * channel[i])


@compiled
def grey_sum(red, green, blue):
    """Sum of the luma over the slice; its mean over the view is what contrast blends towards."""
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
    """Hue rotation in HSV by `shift` turns (-0.5..0.5), without a branch: value and chroma stay,
    hue moves.
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
    """The 3x4 affine colour map of DALI's kind: hue as a rotation by `hue` turns in YIQ,
    saturation, contrast about mid-grey, brightness.

    Differs from the torchvision form in that contrast pivots on 128 instead of the view's mean,
    nothing is clipped between the steps, and the linear hue keeps luma instead of HSV's value (mean
    absolute difference of hue alone about 9/255 at 0.1 turns).
    """
    # Red to green, as HSV.
    cosine, sine = (
        saturation * math.cos(2 * math.pi * hue),
        -saturation * math.sin(2 * math.pi * hue),
    )
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
    a, b, c, d = matrix[0, 0], matrix[0, 1], matrix[0, 2], matrix[0, 3]
    e, f, g, h = matrix[1, 0], matrix[1, 1], matrix[1, 2], matrix[1, 3]
    i, j, k, l = matrix[2, 0], matrix[2, 1], matrix[2, 2], matrix[2, 3]
    for x in range(red.shape[0]):
        r, g_, b_ = red[x], green[x], blue[x]
        red[x] = _clip(a * r + b * g_ + c * b_ + d)
        green[x] = _clip(e * r + f * g_ + g * b_ + h)
        blue[x] = _clip(i * r + j * g_ + k * b_ + l)


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
    """Radius at which the Gaussian is cut: three sigma, rounded up."""
    return int(math.ceil(3 * sigma))


@compiled
def gaussian_taps(sigma, radius, taps):
    """Taps (float32, (2 * radius + 1,)): the weights of the pixels at distances -radius..radius,
    which sum to one.
    """
    total = 0.0
    for k in range(-radius, radius + 1):
        total += math.exp(-0.5 * (k / sigma) ** 2)
    for k in range(-radius, radius + 1):
        taps[k + radius] = math.exp(-0.5 * (k / sigma) ** 2) / total


@compiled
def _mirror(i, n):
    """Index of pixel i of a row of n that is continued by reflection without repeating the border
    pixel.
    """
    if n == 1:
        return 0
    while not 0 <= i < n:  # a division would take longer than the rest of a short blur
        i = -i if i < 0 else 2 * n - 2 - i
    return i


@compiled
def blur_rows(plane, n, taps, padded, blurred):
    """Horizontal pass over `plane` (float32, (n * n,)) into `blurred` ((n + 2 * radius) * n,),
    continued above and below by reflection.

    taps: see `gaussian_taps`. padded: scratch of n + 2 * radius.
    """
    side, radius = np.uint64(n), taps.shape[0] // 2
    for y in range(n):
        row = np.uint64(y) * side
        for x in range(n):
            padded[np.uint64(radius + x)] = plane[row + np.uint64(x)]
        for k in range(1, radius + 1):
            padded[radius - k] = plane[row + np.uint64(_mirror(-k, n))]
            padded[radius + n - 1 + k] = plane[row + np.uint64(_mirror(n - 1 + k, n))]
        weighted_sum(
            padded,
            np.uint64(0),
            np.uint64(1),
            taps,
            np.uint64(0),
            np.uint64(taps.shape[0]),
            blurred,
            np.uint64(radius + y) * side,
            side,
        )
    rows = blurred.reshape(n + 2 * radius, n)
    for k in range(1, radius + 1):
        rows[radius - k] = rows[radius + _mirror(-k, n)]
        rows[radius + n - 1 + k] = rows[radius + _mirror(n - 1 + k, n)]


@compiled
def store(row, out):
    """Round a float32 row to uint8."""
    for i in range(out.shape[0]):
        out[i] = np.uint8(_clip(row[i]) + _HALF)
