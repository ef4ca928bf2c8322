"""Communication between the ranks, the processes of a run.

In a single process these functions return their input.

Gradients follow the convention of DistributedDataParallel, which averages them over the ranks. If a
loss is the mean over its rank's images, the average is the gradient of the loss of the joint batch.
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from ffssl.errors import Stopped, UserError

# More than rank 0 takes to evaluate and to write a checkpoint, and more than torch.compile takes.
TIMEOUT = timedelta(minutes=30)


@contextlib.contextmanager
def process_group(device: torch.device, timeout: timedelta = TIMEOUT) -> Iterator[None]:
    """Join the processes that torchrun has started, over NCCL on GPUs, else over gloo.

    A single process joins nothing. All ranks exit the block together, also after Stopped, which all
    must raise.

    timeout: how long a rank waits for the others.

    Raise ConnectionError if another rank is lost. Raise UserError if only some ranks have a GPU,
    and if the environment does not say how to join.
    """
    if launched() == 1:
        yield
        return
    on_gpu = device.type == "cuda"
    stopped, together = None, False
    try:
        store, number, ranks = next(dist.rendezvous("env://", timeout=timeout))
        _require_one_kind(store, number, ranks, device.type)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=number,
            world_size=ranks,
            timeout=timeout,
            device_id=device if on_gpu else None,
        )
        try:
            yield
        except Stopped as reason:  # on all ranks
            stopped = reason
        # Rank 0 may still be writing, and torchrun ends it if another rank exits before.
        dist.barrier()
        together = True
    except RuntimeError as error:
        # gloo's errors have no class of their own.
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        told = str(error).splitlines()[0]
        raise ConnectionError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} has lost another "
            f"rank ({told})"
        ) from error
    finally:
        # With NCCL this would wait for the others, which may be waiting for this rank.
        if dist.is_initialized() and (together or not on_gpu):
            dist.destroy_process_group()
    if stopped:
        raise stopped


def _require_one_kind(store: "dist.Store", number: int, ranks: int, kind: str) -> None:
    """Raise UserError if some ranks have a GPU and others do not.

    Called before they join: a rank on NCCL and one on gloo would wait for each other.
    """
    store.set(f"device/{number}", kind)
    kinds = [store.get(f"device/{other}").decode() for other in range(ranks)]
    if len(set(kinds)) > 1:
        store.set(f"told/{number}", "")
        # Rank 0 may hold the store: it must outlive the others' reads.
        if number == 0:
            store.wait([f"told/{other}" for other in range(ranks)])
        other = next(other for other in range(ranks) if kinds[other] != kinds[0])
        raise UserError(
            f"--run.device: {kinds[0]} on rank 0, but {kinds[other]} on rank {other}; all "
            "ranks need the same"
        )


def launched() -> int:
    """Return how many processes have been started as ranks of this run.

    Raise UserError if the environment is incomplete.
    """
    ranks = _variable("WORLD_SIZE", 1, least=1)
    if ranks > 1:
        missing = [
            name
            for name in ("RANK", "MASTER_ADDR", "MASTER_PORT")
            if not os.environ.get(name, "").strip()
        ]
        if missing:
            raise UserError(
                f"WORLD_SIZE is {ranks} in the environment, but not {', '.join(missing)}; start "
                "with torchrun, which sets them all, or for one process alone unset WORLD_SIZE"
            )
        _variable("MASTER_PORT", 0, least=1)
        if _variable("RANK", 0) >= ranks:
            raise UserError(
                f"RANK is {os.environ['RANK']} in the environment, but WORLD_SIZE is "
                f"{ranks}; start with torchrun, which sets both"
            )
    return ranks


def _variable(name: str, default: int, *, least: int = 0) -> int:
    """Return an integer that a launcher has set in the environment.

    An empty variable counts as missing. Raise UserError if it is no integer of `least` or more.
    """
    text = os.environ.get(name, "").strip()
    try:
        value = int(text or default)
    except ValueError:
        value = least - 1
    if value < least:
        raise UserError(
            f"{name} is {text!r} in the environment, which must be an integer of {least} "
            "or more; unset it, or start with torchrun"
        )
    return value


def local_device(device: torch.device) -> torch.device:
    """Return this rank's device.

    It is GPU number LOCAL_RANK (default 0) if this process is one of several and `device` is a GPU,
    else `device` unchanged. Raise UserError if the machine has no such GPU, if all ranks are told
    to use the same one, and as `launched` does.
    """
    if launched() == 1 or device.type != "cuda":
        return device
    ranks, gpus = ranks_here(), torch.cuda.device_count()
    if ranks > 1 and device.index is not None:
        raise UserError(f"--run.device: {device} can't be that of {ranks} processes; leave it auto")
    if ranks > gpus:
        raise UserError(
            f"{ranks} processes on this machine, which has {gpus} GPUs: start torchrun "
            f"with --nproc_per_node={gpus}"
        )
    if device.index is None:
        number = _variable("LOCAL_RANK", 0)
        if number >= gpus:
            raise UserError(
                f"LOCAL_RANK is {number}, but this machine has {gpus} GPUs, counted from "
                "0; start with torchrun, which sets it"
            )
        device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def ranks_here() -> int:
    """Return the number of ranks on this machine."""
    return _variable("LOCAL_WORLD_SIZE", 1, least=1)


def cores_per_rank() -> int:
    """Return this process's share of the machine's usable cores."""
    return max(len(os.sched_getaffinity(0)) // ranks_here(), 1)


def can_share(batch_size: int, ranks: int, parts: int) -> bool:
    """Return whether a batch divides equally into ranks * parts parts of two images or more."""
    share, rest = divmod(batch_size, ranks * parts)
    return not rest and share >= 2


def check_batch(batch_size: int, parts: int) -> None:
    """Raise UserError if a batch does not divide equally among the ranks.

    parts: parts of each rank, computed one after the other.
    """
    if not can_share(batch_size, world_size(), parts):
        each = f"{parts * world_size()} ({world_size()} processes, --training.accumulate={parts})"
        raise UserError(
            f"--training.batch_size: {batch_size} is no multiple, or less than twice, of {each}"
        )


@contextlib.contextmanager
def errors_on_all_ranks() -> Iterator[None]:
    """Raise a UserError of one rank on every rank when the block ends.

    So no rank waits for a rank that has gone.
    """
    message = None
    try:
        yield
    except UserError as error:
        message = str(error)
    messages = gather_objects(message)
    if any(messages):
        raised = next(filter(None, messages))
        where = "" if len(set(messages)) == 1 else f" (rank {messages.index(raised)})"
        raise UserError(f"{raised}{where}")


def require_same(facts: dict[str, object]) -> None:
    """Raise UserError on all ranks if a fact differs between a rank and rank 0.

    The message names the fact. Facts that only one of the two has do not count.
    """
    first, *others = gather_objects(facts)
    for other, theirs in enumerate(others, start=1):
        for name, value in first.items():
            if theirs.get(name, value) != value:
                raise UserError(
                    f"{name}: {value!r} on rank 0, but {theirs[name]!r} on rank {other}; "
                    "all ranks need the same"
                )


def gather_objects(value: object) -> list:
    """Return the values of all ranks, by rank.

    They are pickled: use it for small values, and rarely.
    """
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def gather(tensor: Tensor) -> Tensor:
    """Concatenate the ranks' tensors (n, ...), by rank: (world size * n, ...), without gradient."""
    tensor = tensor.detach()
    if world_size() == 1:
        return tensor
    everyones = tensor.new_empty(world_size() * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(everyones, tensor.contiguous())
    return everyones


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Concatenate the ranks' tensors as `gather`, with gradient.

    The gradient of a row is summed over all ranks, on the rank that the row came from.
    """
    return tensor if world_size() == 1 else _Gather.apply(tensor)


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Return the mean of the ranks' tensors, which have one shape, with gradient."""
    return tensor if world_size() == 1 else _Sum.apply(tensor) / world_size()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return gather(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient).chunk(world_size())[rank()]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return sum_over_ranks(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of the ranks' tensors, which have one shape, without gradient."""
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total
