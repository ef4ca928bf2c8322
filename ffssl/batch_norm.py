"""BatchNorm over the batches of all ranks: the statistics are those that one process would take of the joint batch."""

import torch
from torch import Tensor, nn
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
        x = input.float()
        batch, per_channel = [d for d in range(x.ndim) if d != 1], (-1, *[1] * (x.ndim - 2))
        mean = mean_over_ranks(x.mean(batch))
        centred = x - mean.view(per_channel)
        variance = mean_over_ranks(centred.square().mean(batch))
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach(), count=x.numel() // x.shape[1] * world_size())
        y = centred * (variance + self.eps).rsqrt().view(per_channel)
        if self.affine:
            y = y * self.weight.view(per_channel) + self.bias.view(per_channel)
        return y.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)  # unbiased, as BatchNorm keeps it


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
