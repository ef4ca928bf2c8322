"""From stored images to views.

Each image is decoded once, and all its views are rendered while its pixels are in cache.
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
from ffssl.data.kernels.layout import L_SIDE, L_START, L_STEP, L_VIEW
from ffssl.data.kernels.render import render
from ffssl.data.turbojpeg import turbojpeg

# A crop's side in scaled pixels is at least this times its view's side. With 1.5 the views of
# photographs differ from those of the full decode by 0.3 to 1 of 255 levels in the mean, a few by
# more than 2; with 1 by twice as much.
SCALED_PIXELS = 1.5

_pointer, _integer = types.voidptr, types.int32


def _external(name: str, signature: types.Type) -> types.ExternalFunction:
    """Make a function of libjpeg-turbo callable from kernels, as an external symbol.

    Numba caches functions that call external symbols, but not those that call ctypes pointers.

    We give llvmlite the address. If llvmlite loaded the library itself, it would do so globally,
    and torch's matrix products would go through OpenCV's reference BLAS, 30 times slower.
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
_TJPF_RGB, _TJFLAG_FASTDCT = 0, 2048  # the pixel format and the DCT that ffcv decodes with


@compiled
def decode(data, mode, height, width, pixels, denominator=1):
    """Decode one stored image; return whether it decoded cleanly, to its claimed size.

    data: uint8, a JPEG file or raw pixels, as `mode` says.
    height, width: of the image, in pixels.
    pixels: uint8 (3 * height * width or more,), written: RGB, row by row.
    denominator: 1, 2, 4 or 8. A JPEG is decoded at the scale 1/denominator, each side rounded up.
        Only the lowest frequencies of each 8 x 8 block are transformed then.
    """
    if mode == MODE_RAW:
        if data.shape[0] != height * width * 3:
            return False
        pixels[: data.shape[0]] = data
        return True

    # A new decompressor for each image (0.4 us). An old one would lend a file without tables those
    # of the image before.
    decompressor = _new_decompressor()

    # Check the size ourselves: for a different size turbojpeg silently uses the next smaller scale
    # and fills only part of `pixels`. Its return code is useless: it reports failure for rare
    # subsamplings that decode fine.
    header = np.zeros(4, np.int32)  # width, height, subsampling, colour space
    _read_header(
        decompressor,
        data.ctypes,
        data.shape[0],
        header.ctypes,
        header[1:].ctypes,
        header[2:].ctypes,
        header[3:].ctypes,
    )
    decoded = False
    if header[0] == width and header[1] == height:
        status = _decompress(
            decompressor,
            data.ctypes,
            data.shape[0],
            pixels.ctypes,
            -(-width // denominator),
            0,  # bytes from row to row: turbojpeg's default, no gaps
            -(-height // denominator),
            _TJPF_RGB,
            _TJFLAG_FASTDCT,
        )
        decoded = status == 0
    _free_decompressor(decompressor)
    return decoded


@compiled
def choose_denominator(drawn, sides):
    """Return the strongest reduction (8, 4, 2 or 1) that leaves every crop large enough.

    A crop's sides must keep SCALED_PIXELS times as many pixels as its view's side has.

    drawn: float64 (views, PARAMETER_COLUMNS), crops in full pixels.
    sides: int64 (views,), of the views, in pixels.
    """
    strongest = 8
    for v in range(len(sides)):
        smallest = min(drawn[v, P_HEIGHT], drawn[v, P_WIDTH])
        # Turbojpeg infers the scale from the scaled size, which is ambiguous for a few pixels.
        if smallest < 8:
            return 1
        while strongest > 1 and smallest < SCALED_PIXELS * sides[v] * strongest:
            strongest //= 2
    return strongest


@compiled
def render_sample(
    data,
    image,
    sample,
    counters,
    policy_rows,
    scaled_decoding,
    pixels,
    layout,
    position,
    out,
):
    """Draw the views of one stored image, decode it as finely as they need, and render them.

    Return whether it decoded cleanly.

    data: the stored image, see `decode`.
    image: its row of the image field's metadata.
    sample: its index in the file.
    counters, policy_rows, scaled_decoding: see `policy.ViewSettings`.
    pixels: scratch, see `decode`.
    layout: where the views go, see `layout`.
    position: the image's place in the batch.
    out: uint8 (bytes,), the batch's buffer; the views are written.
    """
    mode, height, width = image["mode"], np.int64(image["height"]), np.int64(image["width"])
    drawn = np.empty((layout.shape[0], PARAMETER_COLUMNS))
    for v in range(layout.shape[0]):
        view = layout[v, L_VIEW]
        draw(
            view_key(counters[0], counters[1], sample, view),
            height,
            width,
            policy_rows[view],
            drawn[v],
        )

    denominator = 1
    if scaled_decoding and mode != MODE_RAW:
        denominator = choose_denominator(drawn, layout[:, L_SIDE])
    if not decode(data, mode, height, width, pixels, denominator):
        return False

    height, width = -(-height // denominator), -(-width // denominator)
    decoded = pixels[: height * width * 3].reshape((height, width, 3))
    for v in range(layout.shape[0]):
        for edge in (P_TOP, P_LEFT, P_HEIGHT, P_WIDTH):
            drawn[v, edge] /= denominator
        side = layout[v, L_SIDE]
        start = layout[v, L_START] + position * layout[v, L_STEP]
        view = out[start : start + 3 * side * side].reshape((3, side, side))
        render(decoded, drawn[v], policy_rows[layout[v, L_VIEW], AFFINE_JITTER] != 0, view)
    return True


@compiled
def most_pixels(images, indices):
    """Return the number of pixels of the largest image at `indices`."""
    largest = 0
    for i in indices:
        largest = max(largest, np.int64(images[i]["height"]) * np.int64(images[i]["width"]))
    return largest


@compiled
def render_samples(
    file,
    pointers,
    sizes,
    images,
    indices,
    counters,
    policy_rows,
    scaled_decoding,
    layout,
    position,
    out,
):
    """Decode the images at `indices` and render their views.

    file: uint8, the mapped beton file.
    pointers, sizes: where stored fields begin, sorted, and their bytes.
    images: the image field's metadata.
    counters, policy_rows, scaled_decoding: see `policy.ViewSettings`.
    layout, out: see `render_sample`.
    position: the first image's place in the batch.

    Raises ValueError with the index of an image that does not decode.
    """
    pixels = np.empty(3 * most_pixels(images, indices), np.uint8)
    for b, sample in enumerate(indices):
        image = images[sample]
        pointer = image["data_ptr"]
        data = file[pointer : pointer + sizes[np.searchsorted(pointers, pointer)]]
        if not render_sample(
            data,
            image,
            sample,
            counters,
            policy_rows,
            scaled_decoding,
            pixels,
            layout,
            position + b,
            out,
        ):
            raise ValueError("image does not decode", sample)
