"""BatchNorm over the batches of all ranks: the statistics are those that one process would take of the joint batch."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ffssl.distributed import mean_over_ranks, world_size
from ffssl.errors import UserError


class CpuSyncBatchNorm(_BatchNorm):
    """`nn.SyncBatchNorm` takes tensors on GPUs only; this one takes others. The ranks' batches must be of one size."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # (N, C) and (N, C, ...) alike

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        y, mean, variance = _Normalise.apply(input.float(), self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._track(mean, variance, count=input.numel() // input.shape[1] * world_size())
        return y.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)  # unbiased, as BatchNorm keeps it


class _Normalise(torch.autograd.Function):
    """From x (N, C, ...) in float32: normalised by the mean and variance (C) of all ranks' batches, which it returns too.

    By torch's fused passes over one rank's batch; written in single operations it took half of a training step.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        own_mean, own_variance = torch.batch_norm_update_stats(x, None, None, 0.0)
        own_mean, own_variance = own_mean.double(), own_variance.double()  # whose squares are to be subtracted
        mean, square = mean_over_ranks(torch.stack([own_mean, own_variance + own_mean.square()]))
        variance = (square - mean.square()).clamp(min=0)
        mean, inverse = mean.float(), (variance + eps).rsqrt().float()
        variance = variance.float()
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *_) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, inverse = ctx.saved_tensors
        per_channel = (-1, *[1] * (x.ndim - 2))
        # Of this rank's batch: the sums of the gradient times the normalised x, and of the gradient.
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, torch.ones_like(mean), None, None, mean, inverse, True, 0.0, [False, True, True]
        )
        # (Ioffe & Szegedy 2015, section 3): a (dy - mean(dy) - x^ mean(dy x^)), with a = weight / sqrt(variance + eps)
        product, plain = mean_over_ranks(torch.stack([of_weight, of_bias])) / (x.numel() // x.shape[1])
        scale = inverse if weight is None else weight * inverse
        slope = scale * inverse * product
        rest = torch.addcmul((slope * mean - scale * plain).view(per_channel), x, slope.view(per_channel), value=-1)
        of_x = rest.addcmul_(gradient, scale.view(per_channel))
        return of_x, of_weight if weight is not None else None, of_bias if weight is not None else None, None


def synchronise(network: nn.Module, device: torch.device) -> None:
    """Put synchronised BatchNorm in the place of all BatchNorm inside `network`, with the same parameters, buffers and names.

    Raises UserError for a kind that only GPUs can synchronise.
    """
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm  # takes seconds; torch's would drop the activation in timm's BatchNormAct2d

        convert_sync_batchnorm(network)
        return
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                setattr(parent, name, _synchronised(child))


def _synchronised(norm: _BatchNorm) -> CpuSyncBatchNorm:
    if type(norm).forward is not _BatchNorm.forward:
        raise UserError(f"--model.backbone: its {type(norm).__name__} can't be synchronised between processes on CPUs; use one process, or GPUs")
    twin = CpuSyncBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats).train(norm.training)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(twin, name, getattr(norm, name))
    return twin
