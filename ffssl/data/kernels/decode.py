"""Stored images to views: each image is decoded once, and all its views are rendered while the
pixels are in cache.
"""

import ctypes

import llvmlite.binding
import numpy as np
from numba import types

from ffssl.data.beton.read import MODE_RAW
from ffssl.data.kernels.draw import (
    AFFINE_JITTER,
    P_HEIGHT,
    P_LEFT,
    P_TOP,
    P_WIDTH,
    PARAMETER_COLUMNS,
    draw,
    view_key,
)
from ffssl.data.kernels.jit import compiled
from ffssl.data.kernels.render import render
from ffssl.data.turbojpeg import turbojpeg

# Side of a crop in scaled pixels over that of its view, at least. With 1.5 the views of photographs
# differ from those of the full decode by 0.3 to 1 of 255 levels in the mean, a few by more than 2;
# with 1 by twice as much.
SCALED_PIXELS = 1.5

_pointer, _integer = types.voidptr, types.int32


def _external(name: str, signature: types.Type) -> types.ExternalFunction:
    """A function of libjpeg-turbo as an external symbol: unlike ctypes pointers, these let Numba
    cache the functions that call them.

    llvmlite is told its address. Would it load the library itself, it would do so for all of the
    process: OpenCV's BLAS, the reference one, would then compute torch's products, 30 times slower.
    """
    llvmlite.binding.add_symbol(name, ctypes.cast(turbojpeg()[name], ctypes.c_void_p).value)
    return types.ExternalFunction(name, signature)


_new_decompressor = _external("tjInitDecompress", _pointer())
_read_header = _external(
    "tjDecompressHeader3",
    _integer(_pointer, _pointer, types.uint64, _pointer, _pointer, _pointer, _pointer),
)
_decompress = _external(
    "tjDecompress2",
    _integer(
        _pointer, _pointer, types.uint64, _pointer, _integer, _integer, _integer, _integer, _integer
    ),
)
_free_decompressor = _external("tjDestroy", _integer(_pointer))
_TJPF_RGB, _TJFLAG_FASTDCT = 0, 2048  # the format and the transform that ffcv decodes with


@compiled
def decode(data, mode, height, width, pixels, denominator=1):
    """Decode one stored image of `height` x `width` into `pixels` (uint8, 3 * height * width or
    longer).

    A JPEG is decoded at the scale 1/denominator (1, 2, 4 or 8), each side rounded up: of an 8 x 8
    block only the lowest frequencies are transformed. Returns whether it decoded cleanly, to that
    size.
    """
    if mode == MODE_RAW:
        if data.shape[0] != height * width * 3:
            return False
        pixels[: data.shape[0]] = data
        return True
    # A new decompressor for each image (0.4 us): an old one would lend a file that has lost its
    # tables those of the image before.
    decompressor, said = _new_decompressor(), np.zeros(4, np.int32)
    # That its size is not the one asked for has to be seen here: turbojpeg then takes the nearest
    # scale below, and fills `pixels` in part. What the call returns is of no use: it fails for rare
    # subsamplings, which do decode.
    _read_header(
        decompressor,
        data.ctypes,
        data.shape[0],
        said.ctypes,
        said[1:].ctypes,
        said[2:].ctypes,
        said[3:].ctypes,
    )
    decoded = (
        said[0] == width
        and said[1] == height
        and _decompress(
            decompressor,
            data.ctypes,
            data.shape[0],
            pixels.ctypes,
            -(-width // denominator),
            0,
            -(-height // denominator),
            _TJPF_RGB,
            _TJFLAG_FASTDCT,
        )
        == 0
    )
    _free_decompressor(decompressor)
    return decoded


@compiled
def choose_denominator(drawn, resolution):
    """The strongest reduction (8, 4, 2 or 1) after which no crop of `drawn` is smaller than
    SCALED_PIXELS * `resolution`.

    drawn: float64 (views, PARAMETER_COLUMNS), in full pixels.
    """
    smallest = min(drawn[:, P_HEIGHT].min(), drawn[:, P_WIDTH].min())
    # Turbojpeg infers the scale from the scaled size, which is ambiguous for a few pixels.
    if smallest < 8:
        return 1
    for denominator in (8, 4, 2):
        if smallest >= SCALED_PIXELS * resolution * denominator:
            return denominator
    return 1


@compiled
def render_sample(
    data, mode, height, width, counters, policy_rows, sample, scaled_decoding, pixels, views
):
    """Draw the views of one stored image, decode it as finely as they need, and render them.

    Returns whether it decoded cleanly.

    pixels: scratch, see `decode`. views: uint8 (views, 3, R, R), written.
    """
    drawn = np.empty((views.shape[0], PARAMETER_COLUMNS))
    for v in range(views.shape[0]):
        draw(
            view_key(counters[0], counters[1], sample, v),
            height,
            width,
            policy_rows[v % policy_rows.shape[0]],
            drawn[v],
        )
    denominator = 1
    if scaled_decoding and mode != MODE_RAW:
        denominator = choose_denominator(drawn, views.shape[2])
    if not decode(data, mode, height, width, pixels, denominator):
        return False
    height, width = -(-height // denominator), -(-width // denominator)
    image = pixels[: height * width * 3].reshape((height, width, 3))
    for v in range(views.shape[0]):
        for side in (P_TOP, P_LEFT, P_HEIGHT, P_WIDTH):
            drawn[v, side] /= denominator
        render(image, drawn[v], policy_rows[v % policy_rows.shape[0], AFFINE_JITTER] != 0, views[v])
    return True


@compiled
def most_pixels(images, indices):
    """Pixels of the largest of the images at `indices`."""
    largest = 0
    for i in indices:
        largest = max(largest, np.int64(images[i]["height"]) * np.int64(images[i]["width"]))
    return largest


@compiled
def render_samples(
    file, pointers, sizes, images, indices, counters, policy_rows, scaled_decoding, views
):
    """Decode the images at `indices` and render their views: uint8 (len(indices), views, 3, R, R).

    file: the mapped beton file, uint8. pointers, sizes: where stored fields begin, sorted, and
    their bytes. images: the image field's metadata. Raises ValueError with the index of an image
    that does not decode.
    """
    pixels = np.empty(3 * most_pixels(images, indices), np.uint8)
    for b in range(len(indices)):
        image = images[indices[b]]
        height, width = np.int64(image["height"]), np.int64(image["width"])
        pointer = image["data_ptr"]
        data = file[pointer : pointer + sizes[np.searchsorted(pointers, pointer)]]
        if not render_sample(
            data,
            image["mode"],
            height,
            width,
            counters,
            policy_rows,
            indices[b],
            scaled_decoding,
            pixels,
            views[b],
        ):
            raise ValueError("image does not decode", indices[b])
