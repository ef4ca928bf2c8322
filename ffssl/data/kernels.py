"""Pixel kernels of one view, compiled by Numba.

A view in the making is three contiguous float32 planes of values in 0..255. Kernels take contiguous 1-D slices (a row or a whole
plane a channel) and change them in place: LLVM vectorises such loops, and does not vectorise the same loops written as
element-wise indexing into a 2-D array. Indices that do not come from a `range` are unsigned, since Numba checks signed ones for
negative values. Each kernel follows torchvision's definition on float tensors; the tests hold the two side by side.
"""

import math

import numpy as np

from ffssl.data.compiled import compiled

_ZERO, _ONE, _WHITE, _HALF = np.float32(0), np.float32(1), np.float32(255), np.float32(0.5)
_RED, _GREEN, _BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)  # ITU-R 601-2 luma, as torchvision rounds it


# Resizing


@compiled
def triangle_weights(origin, length, target, first, count, weights):
    """Taps of the antialiased triangle filter (Pillow's and torchvision's "bilinear") from `length` source pixels to `target`.

    The source extends from `origin` (in 0..1) to origin + length, which may both be fractions; a pixel cut by an edge counts whole.
    Writes for each output pixel its `first` source pixel (uint64), the `count` of its taps (int64), and its row of `weights`
    (float32, (target, `most_taps(length, target)` or more)), which sums to one.
    """
    scale = length / target
    support = max(scale, 1.0)
    end = int(math.ceil(origin + length))
    for i in range(target):
        centre = origin + (i + 0.5) * scale
        low = max(int(centre - support + 0.5), 0)
        high = min(int(centre + support + 0.5), end)
        total = 0.0
        for k in range(high - low):
            total += max(0.0, 1.0 - abs((low + k - centre + 0.5) / support))
        for k in range(high - low):
            weights[i, k] = max(0.0, 1.0 - abs((low + k - centre + 0.5) / support)) / total
        first[i] = low
        count[i] = high - low


@compiled
def most_taps(length, target):
    """The largest number of taps that `triangle_weights` gives an output pixel."""
    return int(math.ceil(max(length / target, 1.0))) * 2 + 1


@compiled
def _set_1(a, x, out):
    for i in range(out.shape[0]):
        out[i] = a * np.float32(x[i])


@compiled
def _add_1(a, x, out):
    for i in range(out.shape[0]):
        out[i] += a * np.float32(x[i])


@compiled
def _set_2(a, b, x, y, out):
    for i in range(out.shape[0]):
        out[i] = a * np.float32(x[i]) + b * np.float32(y[i])


@compiled
def _set_3(a, b, c, x, y, z, out):
    for i in range(out.shape[0]):
        out[i] = a * np.float32(x[i]) + b * np.float32(y[i]) + c * np.float32(z[i])


@compiled
def blend_rows(rows, begin, end, first, count, weights, out):
    """out (float32) = the sum of weights[k] * rows[first + k, begin:end] over `count` taps: one output row of a vertical pass."""
    y = np.int64(first)
    if count == 3:
        _set_3(weights[0], weights[1], weights[2], rows[y, begin:end], rows[y + 1, begin:end], rows[y + 2, begin:end], out)
    elif count == 2:
        _set_2(weights[0], weights[1], rows[y, begin:end], rows[y + 1, begin:end], out)
    else:
        _set_1(weights[0], rows[y, begin:end], out)
        for k in range(1, count):
            _add_1(weights[k], rows[y + k, begin:end], out)


@compiled
def shrink_row(row, first, count, weights, pixels):
    """Horizontal pass over one interleaved RGB row (float32, one value longer than its pixels) into `pixels` of four lanes each.

    The fourth lane holds rubbish: with it every pixel is one SIMD register.
    """
    for x in range(count.shape[0]):
        j = np.uint64(3) * first[x]
        red = green = blue = rest = _ZERO
        for k in range(count[x]):
            w = weights[x, k]
            red += w * row[j]
            green += w * row[j + np.uint64(1)]
            blue += w * row[j + np.uint64(2)]
            rest += w * row[j + np.uint64(3)]
            j += np.uint64(3)
        i = np.uint64(4 * x)
        pixels[i] = red
        pixels[i + np.uint64(1)] = green
        pixels[i + np.uint64(2)] = blue
        pixels[i + np.uint64(3)] = rest


@compiled
def split_channels(pixels, flip, red, green, blue):
    """Four-lane `pixels` to one row a channel, mirrored if `flip`."""
    width = red.shape[0]
    if flip:
        for x in range(width):
            red[x] = pixels[4 * (width - 1 - x)]
            green[x] = pixels[4 * (width - 1 - x) + 1]
            blue[x] = pixels[4 * (width - 1 - x) + 2]
    else:
        for x in range(width):
            red[x] = pixels[4 * x]
            green[x] = pixels[4 * x + 1]
            blue[x] = pixels[4 * x + 2]


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
        total += _RED * red[i] + _GREEN * green[i] + _BLUE * blue[i]
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
        grey = rest * (_RED * red[i] + _GREEN * green[i] + _BLUE * blue[i])
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
    """Hue rotation in HSV by `shift` turns (-0.5..0.5), without a branch: value and chroma stay, hue moves."""
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
    """The 3x4 affine colour map of DALI's kind: hue as a rotation by `hue` turns in YIQ, saturation, contrast about mid-grey, brightness.

    Differs from the torchvision form in that contrast pivots on 128 instead of the view's mean, nothing is clipped between the
    steps, and the linear hue keeps luma instead of HSV's value (mean absolute difference of hue alone about 9/255 at 0.1 turns).
    """
    cosine, sine = saturation * math.cos(2 * math.pi * hue), -saturation * math.sin(2 * math.pi * hue)  # red to green, as HSV
    to_yiq = ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))
    to_rgb = ((1.0, 0.9563, 0.6210), (1.0, -0.2721, -0.6474), (1.0, -1.1070, 1.7046))
    gain = brightness * contrast
    for c in range(3):
        for d in range(3):
            i, q = to_yiq[1][d], to_yiq[2][d]
            matrix[c, d] = gain * (to_yiq[0][d] + to_rgb[c][1] * (cosine * i - sine * q) + to_rgb[c][2] * (sine * i + cosine * q))
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
        grey = _RED * red[i] + _GREEN * green[i] + _BLUE * blue[i]
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
    """taps[k] (float32) is the weight of the pixels at distance k; taps[0] + 2 * sum(taps[1:radius + 1]) is one."""
    total = 1.0
    for k in range(1, radius + 1):
        total += 2 * math.exp(-0.5 * (k / sigma) ** 2)
    for k in range(radius + 1):
        taps[k] = math.exp(-0.5 * (k / sigma) ** 2) / total


@compiled
def _add_pair(a, x, y, out):
    for i in range(out.shape[0]):
        out[i] += a * (x[i] + y[i])


@compiled
def _add_two_pairs(a, b, x, y, z, w, out):
    for i in range(out.shape[0]):
        out[i] += a * (x[i] + y[i]) + b * (z[i] + w[i])


@compiled
def mirror(i, n):
    """Index of pixel i of a row of n that is continued by reflection without repeating the border pixel."""
    if n == 1:
        return 0
    i = abs(i) % (2 * n - 2)
    return i if i < n else 2 * n - 2 - i


@compiled
def blur_row(row, taps, radius, padded):
    """Blur one row in place; `padded` is scratch of len(row) + 2 * radius."""
    n = row.shape[0]
    padded[radius : radius + n] = row
    for k in range(1, radius + 1):
        padded[radius - k] = row[mirror(-k, n)]
        padded[radius + n - 1 + k] = row[mirror(n - 1 + k, n)]
    _set_1(taps[0], padded[radius : radius + n], row)
    k = 1
    while k + 1 <= radius:
        _add_two_pairs(taps[k], taps[k + 1], padded[radius - k : radius - k + n], padded[radius + k : radius + k + n],
                       padded[radius - k - 1 : radius - k - 1 + n], padded[radius + k + 1 : radius + k + 1 + n], row)
        k += 2
    if k <= radius:
        _add_pair(taps[k], padded[radius - k : radius - k + n], padded[radius + k : radius + k + n], row)


@compiled
def blur_column_into(plane, y, taps, radius, out):
    """out = row y of `plane` (float32, (height, width)), blurred along the columns."""
    n = plane.shape[0]
    _set_1(taps[0], plane[y], out)
    k = 1
    while k + 1 <= radius:
        _add_two_pairs(taps[k], taps[k + 1], plane[mirror(y - k, n)], plane[mirror(y + k, n)],
                       plane[mirror(y - k - 1, n)], plane[mirror(y + k + 1, n)], out)
        k += 2
    if k <= radius:
        _add_pair(taps[k], plane[mirror(y - k, n)], plane[mirror(y + k, n)], out)


@compiled
def store(row, out):
    """Round a float32 row to uint8."""
    for i in range(out.shape[0]):
        out[i] = np.uint8(_clip(row[i]) + _HALF)
