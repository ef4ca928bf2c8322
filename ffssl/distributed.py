"""What the methods share between ranks. In one process these functions give back what they are given.

Gradients follow the convention of DistributedDataParallel, which averages them over the ranks: where a loss is a mean over its own
rank's images, that average is the gradient of the loss of the joint batch.
"""

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.nn import functional as differentiable


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def gather(tensor: Tensor) -> Tensor:
    """The tensors (n, ...) of all ranks, by rank, as one (world size * n, ...), without gradient."""
    tensor = tensor.detach()
    if world_size() == 1:
        return tensor
    tensors = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(tensors, tensor.contiguous())
    return torch.cat(tensors)


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """As `gather`; the gradients of all ranks reach the rank that a row came from, and are summed there."""
    return tensor if world_size() == 1 else torch.cat(differentiable.all_gather(tensor))


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean over the ranks of tensors of one shape, with gradient."""
    return tensor if world_size() == 1 else differentiable.all_reduce(tensor) / world_size()
