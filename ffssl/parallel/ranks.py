"""What the processes of a run, its ranks, share.

In one process these functions give back what they are given.

Gradients follow the convention of DistributedDataParallel, which averages them over the ranks:
where a loss is a mean over its own rank's images, that average is the gradient of the loss of the
joint batch.
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from ffssl.errors import Stopped, UserError

# More than rank 0 needs to evaluate and to write a checkpoint, and than torch.compile needs
# anywhere.
TIMEOUT = timedelta(minutes=30)


@contextlib.contextmanager
def process_group(device: torch.device, timeout: timedelta = TIMEOUT) -> Iterator[None]:
    """Joins the processes that torchrun has started, over NCCL where `device` is a GPU, else gloo.

    A process alone joins nothing.

    All leave together, after Stopped too, which all must raise. timeout: after which a rank no
    longer waits for the others. Raises ConnectionError where another rank is lost, and UserError
    where some ranks have a GPU and others none, and where the environment does not say how to join.
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
        # Rank 0 may be writing still, and a rank that leaves before it makes torchrun end it.
        dist.barrier()
        together = True
    except RuntimeError as error:
        # Whose errors have no class of their own.
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        reason = str(error).splitlines()[0]
        raise ConnectionError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} has lost another "
            f"rank ({reason})"
        ) from error
    finally:
        # NCCL would wait for the others, which may be waiting for this rank.
        if dist.is_initialized() and (together or not on_gpu):
            dist.destroy_process_group()
    if stopped:
        raise stopped


def _require_one_kind(store: "dist.Store", number: int, ranks: int, kind: str) -> None:
    """Before they join: one over NCCL and one over gloo would wait for each other."""
    store.set(f"device/{number}", kind)
    kinds = [store.get(f"device/{other}").decode() for other in range(ranks)]
    if len(set(kinds)) > 1:
        store.set(f"told/{number}", "")
        if number == 0:  # which may be the one that holds the store
            store.wait([f"told/{other}" for other in range(ranks)])
        other = next(other for other in range(ranks) if kinds[other] != kinds[0])
        raise UserError(
            f"--run.device: {kinds[0]} on rank 0, but {kinds[other]} on rank {other}; all "
            "ranks need the same"
        )


def launched() -> int:
    """How many processes have been started as this one's ranks.

    Raises UserError where the environment says that in part only.
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
    """A number that a launcher has set in the environment; one that is empty is as one that is not
    there. Raises UserError.
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
    """The GPU of this rank where `device` is a GPU and this process is one of several: that of its
    number on the machine, 0 if it has none.

    Raises UserError where the machine has no such GPU, where all are told to use the same, and as
    `launched` does.
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
    """How many of the ranks are on this machine."""
    return _variable("LOCAL_WORLD_SIZE", 1, least=1)


def cores_per_rank() -> int:
    """This process's share of the cores that it and the others on its machine may use."""
    return max(len(os.sched_getaffinity(0)) // ranks_here(), 1)


def can_share(batch_size: int, ranks: int, parts: int) -> bool:
    """Whether ranks can deal a batch out equally, each in so many parts, of two images or more."""
    share, rest = divmod(batch_size, ranks * parts)
    return not rest and share >= 2


def check_batch(batch_size: int, parts: int) -> None:
    """Raise UserError where the ranks can't deal a batch out, in so many parts that are computed
    one after the other.
    """
    if not can_share(batch_size, world_size(), parts):
        each = f"{parts * world_size()} ({world_size()} processes, --training.accumulate={parts})"
        raise UserError(
            f"--training.batch_size: {batch_size} is no multiple, or less than twice, of {each}"
        )


@contextlib.contextmanager
def errors_on_all_ranks() -> Iterator[None]:
    """A UserError that one rank raises inside, all ranks raise at its end: none goes on to wait for
    one that has left.
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
    """Raises UserError on all ranks, naming the first of `facts` that a rank and rank 0 both know,
    and in which they differ.
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
    """The values of all ranks, by rank. They are pickled: for what is small, and seldom."""
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
    """The tensors (n, ...) of all ranks, by rank, as one (world size * n, ...), without gradient."""
    tensor = tensor.detach()
    if world_size() == 1:
        return tensor
    everyones = tensor.new_empty(world_size() * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(everyones, tensor.contiguous())
    return everyones


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """As `gather`; the gradients of all ranks reach the rank that a row came from, and are summed
    there.
    """
    return tensor if world_size() == 1 else _Gather.apply(tensor)


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean over the ranks of tensors of one shape, with gradient."""
    return tensor if world_size() == 1 else _Sum.apply(tensor) / world_size()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        return gather(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient).chunk(world_size())[rank()]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        return sum_over_ranks(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of the ranks' tensors of one shape, without gradient."""
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total
