"""What pytest needs on the made-up GPU (`-p made_up_gpu.plugin`).

Convolutions and BatchNorm in place of cuDNN's, and what has been asked of the GPU.
"""

import collections
import ctypes

import torch
from torch._prims_common import suggest_memory_format

layouts = collections.Counter()  # of what came to convolutions: channels_last or not
_aten = torch.library.Library("aten", "IMPL")


def _note(tensor: torch.Tensor, what: str) -> None:
    layouts[
        what
        if tensor.is_contiguous(memory_format=torch.channels_last)
        else f"{what} not channels_last"
    ] += 1


def _like(shape, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Without values, channels_last if one of two is, as cuDNN's results are."""
    both = (suggest_memory_format(a), suggest_memory_format(b))
    layout = torch.channels_last if torch.channels_last in both else torch.contiguous_format
    return torch.empty(shape, dtype=a.dtype, device=a.device, memory_format=layout)


def convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    assert x.dtype == weight.dtype, (x.dtype, weight.dtype)
    _note(x, "input")
    kernel = weight.shape[2:]
    side = [
        (x.shape[i + 2] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    return _like((x.shape[0], weight.shape[0], *side), x, weight)


def convolution_backward(
    gradient,
    x,
    weight,
    bias_sizes,
    stride,
    padding,
    dilation,
    transposed,
    output_padding,
    groups,
    wanted,
):
    _note(gradient, "gradient")
    of_bias = (
        torch.empty(weight.shape[0], dtype=gradient.dtype, device=gradient.device)
        if wanted[2]
        else None
    )
    return (
        _like(x.shape, x, weight) if wanted[0] else None,
        _like(weight.shape, weight, x) if wanted[1] else None,
        of_bias,
    )


def cudnn_convolution(x, weight, padding, stride, dilation, groups, *rest):
    return convolution(x, weight, None, stride, padding, dilation, False, None, groups)


def cudnn_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps):
    return (
        torch.empty_like(x),
        torch.empty_like(weight),
        torch.empty_like(weight),
        x.new_empty(0, dtype=torch.uint8),
    )


def cudnn_batch_norm_backward(
    x, gradient, weight, running_mean, running_var, mean, variance, eps, reserved
):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def pytest_configure(config):
    torch.backends.cuda.enable_cudnn_sdp(False)
    for function in (
        convolution,
        convolution_backward,
        cudnn_convolution,
        cudnn_batch_norm,
        cudnn_batch_norm_backward,
    ):
        _aten.impl(function.__name__, function, "CUDA")


class MadeUp:
    """What has been asked of the GPU since the test began."""

    def __init__(self):
        self._library = ctypes.CDLL(None)
        self._library.made_up_counts.restype = ctypes.c_char_p
        self.reset()

    def reset(self) -> None:
        self._library.made_up_reset()
        layouts.clear()

    def counts(self) -> dict[str, int]:
        lines = self._library.made_up_counts().decode().splitlines()
        return {name: int(number) for name, number in (line.split("\t") for line in lines)}

    def memory(self, size: int) -> None:
        self._library.made_up_memory(ctypes.c_size_t(size))

    layouts = layouts
