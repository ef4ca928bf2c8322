"""BatchNorm over the batches of all ranks.

The statistics are those of the joint batch, as one process would compute them.

torch's own `nn.SyncBatchNorm` makes the host wait for the GPU in every layer, since it allows the
ranks' batches to differ in size. It breaks torch.compile's graphs, and it fails in half precision
if no statistics are tracked (pytorch#50126). The ranks of a run have batches of one size, so that
nothing has to wait.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ffssl.errors import UserError
from ffssl.parallel.ranks import gather, mean_over_ranks, sum_over_ranks, world_size


class SyncBatchNorm(_BatchNorm):
    """BatchNorm of inputs (N, C) or (N, C, ...) in any float dtype, on any device.

    All ranks' batches must have the same size.
    """

    # None in a layer that tracks no statistics. They are only read where it tracks them.
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # any shape will do

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        if taken_as_on_gpu(input):
            running: tuple[Tensor | None, Tensor | None] = (None, None)
            if self.track_running_stats:
                running = self.running_mean, self.running_var
                self.num_batches_tracked += 1
            return _NormaliseOnGpu.apply(
                input, self.weight, self.bias, *running, self.momentum, self.eps
            )
        y, mean, variance = _Normalise.apply(input, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._track(mean, variance, count=input.numel() // input.shape[1] * world_size())
        return y

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        # BatchNorm's running variance is unbiased.
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)


def taken_as_on_gpu(x: Tensor) -> bool:
    """Return whether to use torch's GPU passes: they break torch.compile's graphs."""
    return x.is_cuda and not torch.compiler.is_compiling()


class _SyncBatchNormAct(SyncBatchNorm):
    """Replacement for timm's BatchNormAct2d: BatchNorm, then dropout, then the activation.

    The layers keep their names.
    """

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


class _Normalise(torch.autograd.Function):
    """Normalise x (N, C, ...) by the mean and variance over all ranks' batches.

    Return the normalised x in its dtype, and the mean and the biased variance, (C,) in float32.

    On a CPU it uses torch's fused passes over one rank's batch: single operations took half of a
    training step. torch.compile fuses the operations itself.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        own_mean, own_variance = _statistics(x.float())
        # In float64, since nearly equal squares are subtracted.
        own_mean, own_variance = own_mean.double(), own_variance.double()
        mean, square = mean_over_ranks(torch.stack([own_mean, own_variance + own_mean.square()]))
        variance = (square - mean.square()).clamp(min=0)
        mean, inverse = mean.float(), (variance + eps).rsqrt().float()
        variance = variance.float()
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.mark_non_differentiable(mean, variance)
        y = F.batch_norm(x.float(), mean, variance, weight, bias, training=False, eps=eps)
        return y.to(x.dtype), mean, variance

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor, *_: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        half, weight, mean, inverse = ctx.saved_tensors
        x, gradient = half.float(), gradient.float()
        per_channel = (-1, *[1] * (x.ndim - 2))
        # Sums over this rank's batch: of the gradient times the normalised x, and of the gradient.
        training, eps, wanted = True, 0.0, [False, True, True]  # weight and bias, not x
        ones, running = torch.ones_like(mean), (None, None)
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, ones, *running, mean, inverse, training, eps, wanted
        )
        # The gradient of x is a (dy - mean(dy) - x^ mean(dy x^)), with
        # a = weight / sqrt(variance + eps) (Ioffe & Szegedy 2015, section 3).
        count = x.numel() // x.shape[1]
        product, plain = mean_over_ranks(torch.stack([of_weight, of_bias])) / count
        scale = inverse if weight is None else weight * inverse
        slope = scale * inverse * product
        offset = (slope * mean - scale * plain).view(per_channel)
        rest = torch.addcmul(offset, x, slope.view(per_channel), value=-1)
        of_x = rest.addcmul_(gradient, scale.view(per_channel)).to(half.dtype)
        if weight is None:
            of_weight = of_bias = None
        return of_x, of_weight, of_bias, None


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance, (C,), of this rank's x (N, C, ...)."""
    if torch.compiler.is_compiling():  # torch.compile can't fuse anything with the fused pass
        variance, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
        return mean, variance
    return torch.batch_norm_update_stats(x, None, None, 0.0)


class _NormaliseOnGpu(torch.autograd.Function):
    """The same with the GPU passes of nn.SyncBatchNorm, which also track the statistics.

    They take half precision as it is, and keep the memory layout.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        x = x.contiguous(memory_format=_layout(x))
        count = x.numel() // x.shape[1]
        means, inverses = gather(torch.stack(torch.batch_norm_stats(x, eps))[None]).unbind(1)
        counts = means.new_full((world_size(),), count)
        # The first argument only gives the counts' dtype, if no running statistics give it.
        mean, inverse = torch.batch_norm_gather_stats_with_counts(
            means, means, inverses, running_mean, running_var, momentum, eps, counts
        )
        ctx.save_for_backward(x, weight, mean, inverse)
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=_layout(x))
        affine = weight is not None
        *sums, of_weight, of_bias = torch.batch_norm_backward_reduce(
            gradient, x, mean, inverse, weight, True, affine, affine
        )
        total, product = sum_over_ranks(torch.stack(sums))
        count = x.numel() // x.shape[1]
        counts = torch.full((world_size(),), count, dtype=torch.int32, device=x.device)
        of_x = torch.batch_norm_backward_elemt(
            gradient, x, mean, inverse, weight, total, product, counts
        )
        of_affine = (of_weight, of_bias) if affine else (None, None)
        return of_x, *of_affine, *[None] * 4


def _layout(x: Tensor) -> torch.memory_format:
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def synchronise(network: nn.Module) -> None:
    """Replace all BatchNorm layers inside `network` by synchronised ones.

    Parameters, buffers and names stay. Raise UserError for a BatchNorm layer of an unknown kind.
    """
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                setattr(parent, name, _synchronised(child))


def _synchronised(norm: _BatchNorm) -> SyncBatchNorm:
    kind = SyncBatchNorm
    if type(norm).forward is not _BatchNorm.forward:
        from timm.layers import BatchNormAct2d  # takes seconds

        if type(norm) is not BatchNormAct2d:
            raise UserError(
                f"--model.backbone: its {type(norm).__name__} can't be synchronised "
                "between processes; use one process"
            )
        kind = _SyncBatchNormAct
    tracking = norm.track_running_stats
    twin = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, tracking)
    twin.train(norm.training)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(twin, name, getattr(norm, name))
    for name, child in norm.named_children():
        setattr(twin, name, child)
    return twin
