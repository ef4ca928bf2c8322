"""The same views from a stock ffcv loader, for a pipeline that already uses one.

    decoder = ViewDecoder(views=2, resolution=224)
    image = PipelineSpec("image", decoder=decoder, transforms=[ToTensor()])
    loader = ffcv.loader.Loader(path, ..., pipelines={"image": image})
    decoder.set_epoch(epoch, resolution=160)     # before an epoch

`ffssl.data.ViewLoader` gives bit-identical views. It also stops when an image does not decode;
ffcv's loader prints the error and waits for ever.
"""

from collections.abc import Sequence
from dataclasses import replace
from unittest import mock

import numba.typed
import numpy as np
import torch
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from ffssl.data.kernels.decode import most_pixels, render_sample
from ffssl.data.kernels.layout import layout_of_size
from ffssl.data.policy import STANDARD_MAGNITUDE, ViewPolicy, ViewSettings
from ffssl.errors import UserError

# At import ffcv compiles a numba.typed.Dict, which takes seconds, only to look up two strings in
# it; a plain dict does. Its import also sets torch and Numba to one thread.
_torch_threads, _numba_threads = torch.get_num_threads(), numba.get_num_threads()
try:
    with mock.patch.object(numba.typed, "Dict", dict):
        from ffcv.pipeline.allocation_query import AllocationQuery
        from ffcv.pipeline.operation import Operation
        from ffcv.pipeline.state import State
except ImportError as error:
    raise UserError(
        f"ffcv can't be loaded: {error}; it needs OpenCV (Debian, Ubuntu: apt-get install "
        "libopencv-dev), and to be built again where that has changed. ViewLoader needs neither"
    ) from error
torch.set_num_threads(_torch_threads)
numba.set_num_threads(_numba_threads)


@intrinsic
def _pointer_at(typing_context, address):
    """Return the memory address in an int64 as a pointer."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


class ViewDecoder(Operation):
    """FFCV decoder: JPEG or raw image to uint8 (batch, views, 3, resolution, resolution).

    Arguments: see `ViewSettings`; all views have one size. Raises ValueError with the sample's
    index if an image does not decode.
    """

    def __init__(
        self,
        views: int,
        resolution: int,
        policy: ViewPolicy | Sequence[ViewPolicy] = ViewPolicy(),
        seed: int = 0,
        scaled_decoding: bool = True,
    ):
        super().__init__()
        self.settings = ViewSettings(views, resolution, policy, seed, scaled_decoding)

    def set_epoch(self, epoch: int, resolution: int, magnitude: float = STANDARD_MAGNITUDE) -> None:
        """Choose what the loader's next iteration serves; nothing is compiled again."""
        self.settings.set_epoch(epoch, resolution, self.settings.views, magnitude)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape = (self.settings.views, 3, self.settings.resolution, self.settings.resolution)
        dtype = np.dtype("u1")
        state = replace(previous_state, jit_mode=True, shape=shape, dtype=dtype)
        return state, AllocationQuery(shape, dtype)

    def generate_code(self):
        # Numba freezes the arrays of a closure, so the settings come in by their addresses.
        counters_at = self.settings.counters.ctypes.data
        policies_at = self.settings.policy_rows.ctypes.data
        policies_shape = self.settings.policy_rows.shape
        scaled_decoding = self.settings.scaled_decoding
        read_file = self.memory_read

        def decode_batch(indices, views, metadata, storage_state):
            counters = carray(_pointer_at(counters_at), 2, np.int64)
            policy_rows = carray(_pointer_at(policies_at), policies_shape, np.float64)
            pixels = np.empty(3 * most_pixels(metadata, indices), np.uint8)
            layout = layout_of_size(0, views.shape[1], views.shape[3], 0)
            for b, sample in enumerate(indices):
                image = metadata[sample]
                data = read_file(image["data_ptr"], storage_state)
                if not render_sample(
                    data,
                    image,
                    sample,
                    counters,
                    policy_rows,
                    scaled_decoding,
                    pixels,
                    layout,
                    b,
                    views.reshape(-1),
                ):
                    raise ValueError("image does not decode", sample)
            return views[: len(indices)]

        return decode_batch
