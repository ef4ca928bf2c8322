"""BatchNorm over the batches of all ranks: the statistics are those that one process would take of
the joint batch.

torch's own `nn.SyncBatchNorm` has the host wait for the GPU in every layer, since the ranks'
batches may differ in size there, breaks torch.compile's graphs, and fails in half precision where
no statistics are tracked (pytorch#50126). The ranks of a run have batches of one size: nothing has
to wait.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ffssl.errors import UserError
from ffssl.parallel.ranks import gather, mean_over_ranks, sum_over_ranks, world_size


class SyncBatchNorm(_BatchNorm):
    """For (N, C) and (N, C, ...) in any float type, on any device.

    The ranks' batches must be of one size.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # all are taken

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        if taken_as_on_gpu(input):
            running = (
                (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
            )
            if self.track_running_stats:
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
        # Unbiased, as BatchNorm keeps it.
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)


def taken_as_on_gpu(x: Tensor) -> bool:
    """Whether torch's passes for GPUs are there for it, and not in the way of torch.compile."""
    return x.is_cuda and not torch.compiler.is_compiling()


class _SyncBatchNormAct(SyncBatchNorm):
    """In the place of timm's BatchNormAct2d: followed by its dropout and its activation, of the
    same names.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


class _Normalise(torch.autograd.Function):
    """From x (N, C, ...): normalised by the mean and variance (C), in float32, of all ranks'
    batches, which it returns too.

    On a CPU by torch's fused passes over one rank's batch: written in single operations it took
    half of a training step. torch.compile fuses what these are made of.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        own_mean, own_variance = _statistics(x.float())
        # Whose squares are to be subtracted.
        own_mean, own_variance = own_mean.double(), own_variance.double()
        mean, square = mean_over_ranks(torch.stack([own_mean, own_variance + own_mean.square()]))
        variance = (square - mean.square()).clamp(min=0)
        mean, inverse = mean.float(), (variance + eps).rsqrt().float()
        variance = variance.float()
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.mark_non_differentiable(mean, variance)
        return (
            F.batch_norm(x.float(), mean, variance, weight, bias, training=False, eps=eps).to(
                x.dtype
            ),
            mean,
            variance,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *_) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        half, weight, mean, inverse = ctx.saved_tensors
        x, gradient = half.float(), gradient.float()
        per_channel = (-1, *[1] * (x.ndim - 2))
        # Of this rank's batch: the sums of the gradient times the normalised x, and of the
        # gradient.
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient,
            x,
            torch.ones_like(mean),
            None,
            None,
            mean,
            inverse,
            True,
            0.0,
            [False, True, True],
        )
        # (Ioffe & Szegedy 2015, section 3): a (dy - mean(dy) - x^ mean(dy x^)), with a = weight /
        # sqrt(variance + eps)
        product, plain = mean_over_ranks(torch.stack([of_weight, of_bias])) / (
            x.numel() // x.shape[1]
        )
        scale = inverse if weight is None else weight * inverse
        slope = scale * inverse * product
        rest = torch.addcmul(
            (slope * mean - scale * plain).view(per_channel), x, slope.view(per_channel), value=-1
        )
        of_x = rest.addcmul_(gradient, scale.view(per_channel)).to(half.dtype)
        return (
            of_x,
            of_weight if weight is not None else None,
            of_bias if weight is not None else None,
            None,
        )


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (C), biased, of this rank's x (N, C, ...)."""
    if torch.compiler.is_compiling():  # to which the fused pass would be a wall
        variance, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
        return mean, variance
    return torch.batch_norm_update_stats(x, None, None, 0.0)


class _NormaliseOnGpu(torch.autograd.Function):
    """The same with the passes of nn.SyncBatchNorm, which take half precision as it is, and keep
    the layout. Tracks the statistics.
    """

    @staticmethod
    def forward(
        ctx,
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
        # Its first argument gives no more than the type of the counts, where there are no running
        # statistics to give it.
        mean, inverse = torch.batch_norm_gather_stats_with_counts(
            means, means, inverses, running_mean, running_var, momentum, eps, counts
        )
        ctx.save_for_backward(x, weight, mean, inverse)
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=_layout(x))
        affine = weight is not None
        *sums, of_weight, of_bias = torch.batch_norm_backward_reduce(
            gradient, x, mean, inverse, weight, True, affine, affine
        )
        total, product = sum_over_ranks(torch.stack(sums))
        counts = torch.full(
            (world_size(),), x.numel() // x.shape[1], dtype=torch.int32, device=x.device
        )
        of_x = torch.batch_norm_backward_elemt(
            gradient, x, mean, inverse, weight, total, product, counts
        )
        return (
            of_x,
            of_weight if affine else None,
            of_bias if affine else None,
            None,
            None,
            None,
            None,
        )


def _layout(x: Tensor) -> torch.memory_format:
    return (
        torch.channels_last
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
        else torch.contiguous_format
    )


def synchronise(network: nn.Module) -> None:
    """Put synchronised BatchNorm in the place of all BatchNorm inside `network`, with the same
    parameters, buffers and names.

    Raises UserError for a kind that does more than it is known to.
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
    twin = kind(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    ).train(norm.training)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(twin, name, getattr(norm, name))
    for name, child in norm.named_children():
        setattr(twin, name, child)
    return twin
