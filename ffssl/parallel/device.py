"""Choose the device and the precision; handle a device's memory."""

import contextlib
import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from ffssl.errors import UserError

CPU_INFO = Path("/proc/cpuinfo")
# A CPU's flag of bf16 instructions: on x86 one of the first two, on ARM the last.
_CPU_BF16 = re.compile(r"^(?:flags|Features)\s*:.*\b(?:avx512_bf16|amx_bf16|bf16)\b", re.M)
# Messages of the driver and its libraries, which have no class for this error.
_OUT_OF_MEMORY = re.compile("CUDA(?: error:)? out of memory|CU[A-Z]+_STATUS_ALLOC_FAILED")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h


def keep_freed_memory() -> None:
    """Make malloc keep freed memory for the next tensor.

    On a CPU each step frees and allocates all its activations. If the memory goes back to the
    system in between, the system clears each page again. Keeping it saves 5 to 10 % of a step. Does
    nothing if the C library is not glibc.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        # Blocks below this size in bytes do not get pages of their own, which free gives back.
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        # Never give back free memory at the heap's end.
        mallopt(_M_TRIM_THRESHOLD, -1)


def mark_work(device: torch.device | None = None) -> torch.cuda.Event:
    """Return an event at the end of the work queued so far on the GPU's current stream.

    device: a GPU; by default the current one.

    A thread that waits for the event sleeps. The usual kind of event is polled, which keeps a core
    busy.
    """
    return torch.cuda.current_stream(device).record_event(torch.cuda.Event(blocking=True))


def wait_in_thread(event: torch.cuda.Event) -> None:
    """Wait for an event in a thread of the package's own.

    The event's GPU becomes the thread's current one. A thread starts with the machine's first GPU
    as the current one, and waiting there would create a context on it: half a GB for each process.
    """
    torch.cuda.set_device(event.device)
    event.synchronize()


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the tensor on `device`.

    It goes to a GPU through pinned memory, so that the host need not wait for the GPU's queued
    work.
    """
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or one of its causes, says that a device is out of memory.

    torch.compile wraps errors that occur while it compiles, and libraries have no class for this
    one.
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
    """Leave the block silently if a device runs out of memory.

    The tensors of the block are free again after it.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise


def choose_device(name: str, option: str = "--run.device") -> torch.device:
    """Return the device called `name`; "auto" is the GPU if there is one, else the CPU.

    Raise UserError, naming the `option`, if the device can't be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            torch.cuda.init()  # takes no memory on GPU 0, which may be another rank's
        else:
            torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            # Pinned memory and events belong to the current GPU.
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"{option}: {name} can't be used here: {str(error).splitlines()[0]}"
        ) from error
    return device


def full_precision(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Return a context that turns autocast off on the tensor's device.

    Half precision can't tell views that look alike apart, and temperatures magnify its errors.
    """
    return torch.autocast("cuda" if tensor.is_cuda else "cpu", enabled=False)


def autocast_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of convolutions on `device` under the current autocast.

    It is float32 if autocast is off.
    """
    on = device.type in ("cuda", "cpu") and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else torch.float32


def precision(amp: str, device: torch.device) -> str:
    """Return the mixed precision to use: "bf16", "fp16" or "off" (float32).

    amp: one of these, or "auto": bf16 if the GPU has it, else fp16; off on a CPU.
    """
    if amp != "auto":
        return amp
    return "off" if device.type != "cuda" else "bf16" if has_bf16(device) else "fp16"


def has_bf16(device: torch.device) -> bool:
    """Return whether a device computes in bf16 natively: an emulation gains nothing."""
    if device.type == "cpu":
        try:
            return _CPU_BF16.search(CPU_INFO.read_text()) is not None
        except OSError:
            return False
    with torch.cuda.device(device):  # torch asks the current one
        return torch.cuda.is_bf16_supported(including_emulation=False)


def describe_precision(amp: str, device: torch.device) -> str:
    chosen = precision(amp, device)
    why = ", since this GPU has no bf16" if (amp, chosen) == ("auto", "fp16") else ""
    if chosen == "off" and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        why = ", convolutions in TF32 where the GPU has it"
    return f"mixed precision {chosen}{why}"


def mixed_precision(
    amp: str, device: torch.device, option: str = "--training.amp"
) -> tuple[torch.autocast, torch.amp.GradScaler]:
    """Return the autocast context, which can be entered repeatedly, and the gradient scaler.

    amp: as in `precision`.

    The scaler does nothing except for fp16. Raise UserError, naming the `option`, if the device
    does not have this precision.
    """
    amp = precision(amp, device)
    if amp == "fp16" and device.type == "cpu":
        raise UserError(f"{option}: fp16 needs a GPU; use bf16 or off")
    if amp == "bf16" and device.type == "cuda" and not has_bf16(device):
        raise UserError(f"{option}: {device} has no bf16; use fp16 or off")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    return autocast, torch.amp.GradScaler(device.type, enabled=amp == "fp16")
