"""Which device to use, and in which precision."""

import contextlib
import ctypes
import re
from collections.abc import Iterator

import torch

from ffssl.errors import UserError

# As the driver and its libraries tell it, which have no class for it.
_OUT_OF_MEMORY = re.compile("CUDA(?: error:)? out of memory|CU[A-Z]+_STATUS_ALLOC_FAILED")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> None:
    """Have malloc keep what is freed for the next tensor: on a CPU a step frees and takes all its
    activations anew, and the system, given them back, clears each page again. A step takes 5 to
    10 % less time. Does nothing where the C library is not glibc.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        # Bytes from which a block has pages of its own, and gives them back.
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, -1)  # of free memory at the end that are given back: never


def mark_work(device: torch.device | None = None) -> torch.cuda.Event:
    """An event at the end of the work that a GPU, by default the current one, has been given on its
    current stream. Whoever waits for it sleeps: events of the usual kind are waited for by
    asking all the time, which holds a core.
    """
    return torch.cuda.current_stream(device).record_event(torch.cuda.Event(blocking=True))


def wait_in_thread(event: torch.cuda.Event) -> None:
    """Until the GPU has come to an event, in a thread of the package's own, for which the event's
    GPU becomes the current one: a thread begins with the first of the machine, and waiting there
    would make a context on it, of half a GB for each process.
    """
    torch.cuda.set_device(event.device)
    event.synchronize()


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`: to a GPU by way of pinned memory, so that the host need not wait for
    what the GPU still computes.
    """
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it comes from, tells that a device's memory does not suffice.
    torch.compile wraps what is raised while it compiles; libraries have no class for it.
    """
    seen: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is None or one in seen:
            continue
        seen.append(one)
        if isinstance(one, torch.OutOfMemoryError) or (
            isinstance(one, RuntimeError) and _OUT_OF_MEMORY.search(str(one))
        ):
            return True
        pending += [one.__cause__, one.__context__, getattr(one, "inner_exception", None)]
    return False


@contextlib.contextmanager
def until_out_of_memory() -> Iterator[None]:
    """Leaves what is inside where a device's memory does not suffice, without an error; its tensors
    are free again then.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise


def choose_device(name: str, option: str = "--run.device") -> torch.device:
    """The device called `name`; "auto" is the GPU where there is one.

    Raises UserError, naming the `option`, where it can't be had.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            # For pinned memory and events, which are the current GPU's.
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"{option}: {name} can't be used here: {str(error).splitlines()[0]}"
        ) from error
    return device


def autocast_dtype(device: torch.device) -> torch.dtype:
    """What autocast, as it is now, computes convolutions in on `device`; float32 where it is off."""
    on = device.type in ("cuda", "cpu") and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else torch.float32


def precision(amp: str, device: torch.device) -> str:
    """ "bf16", "fp16" or "off", float32.

    amp: one of these, or "auto": bf16 where the GPU has it, else fp16; on CPU, off.
    """
    if amp != "auto":
        return amp
    return "off" if device.type != "cuda" else "bf16" if has_bf16(device) else "fp16"


def has_bf16(gpu: torch.device) -> bool:
    """Whether a GPU computes in bf16 itself: where it is emulated, nothing is gained by it."""
    with torch.cuda.device(gpu):  # torch asks the current one
        return torch.cuda.is_bf16_supported(including_emulation=False)


def describe_precision(amp: str, device: torch.device) -> str:
    chosen = precision(amp, device)
    why = ", since this GPU has no bf16" if (amp, chosen) == ("auto", "fp16") else ""
    if chosen == "off" and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        why = ", convolutions in TF32 where the GPU has it"
    return f"mixed precision {chosen}{why}"


def mixed_precision(
    amp: str, device: torch.device, option: str = "--training.amp"
) -> tuple[contextlib.AbstractContextManager, torch.amp.GradScaler]:
    """The autocast context, which may be entered again and again, and the gradient scaler, which
    does nothing but for fp16.

    amp: as `precision` takes it. Raises UserError, naming the `option`, where the device has no
    such thing.
    """
    amp = precision(amp, device)
    if amp == "fp16" and device.type == "cpu":
        raise UserError(f"{option}: fp16 needs a GPU; use bf16 or off")
    if amp == "bf16" and device.type == "cuda" and not has_bf16(device):
        raise UserError(f"{option}: {device} has no bf16; use fp16 or off")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    return autocast, torch.amp.GradScaler(device.type, enabled=amp == "fp16")
