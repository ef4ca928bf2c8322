"""Weighted sums and transposes of float32 vectors of eight lanes (SIMD).

These loops are written as LLVM vector instructions, since LLVM's vectoriser gives up on them. It
keeps a sum in memory if the number of terms is unknown, and it transposes element by element. The
vectors are portable: on a CPU with narrower or wider registers LLVM splits or joins them.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ffssl.data.kernels.jit import compiled

LANES = 8  # values in a vector
BLOCK = 16  # rows that are resized together
_INDEX, _VECTOR = ir.IntType(64), ir.VectorType(ir.FloatType(), LANES)
_MASK = ir.VectorType(ir.IntType(32), LANES)


@compiled
def weighted_sum(source, start, step, weights, first, taps, out, at, length):
    """Write `length` weighted sums, each over `taps` rows of the source.

    out[at + i] = sum over k < taps of weights[first + k] * source[start + k * step + i], for
    i < length.

    source: uint8 or float32.
    weights, out: float32; `out` must be another array than `source`.
    start, step, first, taps, at, length: uint64.

    All arrays are contiguous and 1-D. They come whole, with positions, because a slice costs Numba
    two atomic operations.
    """
    i = np.uint64(0)
    while i + np.uint64(4 * LANES) <= length:
        _sum_32(source, start + i, step, weights, first, taps, out, at + i)
        i += np.uint64(4 * LANES)
    while i + np.uint64(LANES) <= length:
        _sum_8(source, start + i, step, weights, first, taps, out, at + i)
        i += np.uint64(LANES)
    # The last vector ends with the last value, and so repeats some values.
    if i < length and np.uint64(LANES) <= length:
        last = length - np.uint64(LANES)
        _sum_8(source, start + last, step, weights, first, taps, out, at + last)
        return
    while i < length:
        total = np.float32(0)
        for k in range(taps):
            total += weights[first + k] * np.float32(source[start + i + k * step])
        out[at + i] = total
        i += np.uint64(1)


def _fixed_weighted_sum(width: int):
    """Return an intrinsic like `weighted_sum` for a fixed length, `width`, a multiple of LANES."""

    def build(typing_context, source, start, step, weights, first, taps, out, at):
        def generate(context, builder, signature, arguments):
            source, weights, out = (
                _data(context, builder, signature, arguments, i) for i in (0, 3, 6)
            )
            start, step, first, taps, at = (arguments[i] for i in (1, 2, 4, 5, 7))
            zero = ir.Constant(_VECTOR, [0.0] * LANES)
            totals = [cgutils.alloca_once(builder, _VECTOR) for _ in range(width // LANES)]
            for total in totals:
                builder.store(zero, total)
            with cgutils.for_range(builder, taps) as loop:
                weight = _broadcast(
                    builder, builder.load(builder.gep(weights, [builder.add(first, loop.index)]))
                )
                position = builder.add(start, builder.mul(loop.index, step))
                for i, total in enumerate(totals):
                    term = builder.fmul(
                        weight,
                        _load(builder, source, _plus(builder, position, LANES * i)),
                        flags=["fast"],
                    )
                    builder.store(builder.fadd(builder.load(total), term, flags=["fast"]), total)
            for i, total in enumerate(totals):
                _store(builder, builder.load(total), out, _plus(builder, at, LANES * i))
            return context.get_dummy_value()

        number = types.uint64
        return types.void(source, number, number, weights, number, number, out, number), generate

    return intrinsic(build)


_sum_8, _sum_32, sum_pixel = (_fixed_weighted_sum(width) for width in (LANES, 4 * LANES, 3 * BLOCK))


@intrinsic
def transpose(typing_context, source, start, step, out, at, out_step):
    """Transpose 8 rows of 8 values: out[at + j * out_step + i] = source[start + i * step + j].

    source, out: float32, contiguous and 1-D.
    """

    def generate(context, builder, signature, arguments):
        source, out = (_data(context, builder, signature, arguments, i) for i in (0, 3))
        rows, position = [], arguments[1]
        for _ in range(LANES):
            rows.append(_load(builder, source, position))
            position = builder.add(position, arguments[2])
        for distance in (1, 2, 4):  # each stage swaps the off-diagonal blocks of this size
            low = [
                lane if not lane & distance else lane - distance + LANES for lane in range(LANES)
            ]
            high = [lane + distance for lane in low]
            for i in (i for i in range(LANES) if not i & distance):
                a, b = rows[i], rows[i + distance]
                rows[i], rows[i + distance] = (
                    builder.shuffle_vector(a, b, ir.Constant(_MASK, mask)) for mask in (low, high)
                )
        position = arguments[4]
        for row in rows:
            _store(builder, row, out, position)
            position = builder.add(position, arguments[5])
        return context.get_dummy_value()

    return types.void(source, types.uint64, types.uint64, out, types.uint64, types.uint64), generate


def _data(context, builder, signature, arguments, i):
    return context.make_array(signature.args[i])(context, builder, arguments[i]).data


def _plus(builder, index, constant):
    return builder.add(index, ir.Constant(_INDEX, constant))


def _broadcast(builder, value):
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    return builder.shuffle_vector(
        builder.insert_element(undefined, value, _INDEX(0)),
        undefined,
        ir.Constant(_MASK, [0] * LANES),
    )


def _load(builder, array, position):
    """Load LANES elements from `position` on, as float32."""
    pointer = builder.gep(array, [position])
    kind = ir.VectorType(pointer.type.pointee, LANES)
    vector = builder.load(builder.bitcast(pointer, kind.as_pointer()), align=1)
    return vector if kind == _VECTOR else builder.uitofp(vector, _VECTOR)


def _store(builder, vector, array, position):
    builder.store(
        vector, builder.bitcast(builder.gep(array, [position]), _VECTOR.as_pointer()), align=4
    )
