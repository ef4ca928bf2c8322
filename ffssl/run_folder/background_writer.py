"""Checkpoints written in the background, while the next steps are computed."""

import copy
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ffssl.parallel.device import mark_work, wait_in_thread
from ffssl.run_folder import checkpoint


class Saver:
    """Writes a folder's checkpoints in a thread, at most one at a time.

    `save` takes as long as copying the state to the host's memory.

    device: of the run's tensors. keep: how many there are to be, see `checkpoint.save`. minutes:
    after which one is `due`; 0: never. What goes wrong in the thread is raised by the next call of
    any method: UserError for a full disk, FloatingPointError for weights (the state's "method")
    that are not finite, and not written.
    """

    def __init__(self, folder: Path, device: torch.device, *, keep: int, minutes: float):
        self._folder, self._device, self._keep, self._minutes = folder, device, keep, minutes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ffssl-checkpoint")
        self._writing: Future | None = None
        self._copy: dict = {}
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether the last checkpoint is old enough for another one."""
        if self._writing is not None:
            if not self._writing.done():
                return False
            self.wait()
        return self._minutes > 0 and time.monotonic() - self._last >= 60 * self._minutes

    def save(self, state: dict) -> None:
        """Write the state as it is now, once the checkpoint before it is written."""
        self.wait()
        self._copy = copy_to_host(state, self._copy)
        copied = mark_work(self._device) if self._device.type == "cuda" else None
        self._writing = self._thread.submit(self._write, self._copy, copied)
        self._last = time.monotonic()

    def _write(self, state: dict, copied: "torch.cuda.Event | None") -> None:
        if copied is not None:
            wait_in_thread(copied)
        # By NumPy: for a reduction of torch this thread would start OpenMP threads of its own, and
        # with more of them than cores those of the training would no longer spin between
        # operations, in all that follows: a step of small images then took 1.35 times as long. A
        # gradient may be infinite where the loss that it is of is not.
        for name, tensor in state.get("method", {}).items():
            if tensor.is_floating_point() and not np.isfinite(tensor.float().numpy()).all():
                raise FloatingPointError(
                    f"{name} is no longer finite, {state['epoch']} epochs done; the last checkpoint in {self._folder} is untouched. Try a smaller "
                    "--training.learning_rate or a longer --training.warmup_epochs"
                )
        checkpoint.save(self._folder, state, keep=self._keep)

    def wait(self) -> None:
        """Until what has been saved is on the disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def copy_to_host(value: object, earlier: object = None) -> object:
    """A copy of a state in the host's memory, in place of an `earlier` copy where its tensors are
    like these.

    Those of a GPU arrive, in pinned memory, when the work queued so far is done.
    """
    if isinstance(value, torch.Tensor):
        alike = isinstance(earlier, torch.Tensor) and (
            earlier.shape,
            earlier.dtype,
            earlier.stride(),
        ) == (value.shape, value.dtype, value.stride())
        target = (
            earlier if alike else torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        )
        return target.copy_(value, non_blocking=True)
    if isinstance(value, dict):
        # Of the same type, with what a module's state says of its version.
        copied = copy.copy(value)
        for key, item in value.items():
            copied[key] = copy_to_host(
                item, earlier.get(key) if isinstance(earlier, dict) else None
            )
        return copied
    if isinstance(value, (list, tuple)):
        before = (
            earlier
            if isinstance(earlier, (list, tuple)) and len(earlier) == len(value)
            else [None] * len(value)
        )
        return type(value)(copy_to_host(item, old) for item, old in zip(value, before))
    return value
