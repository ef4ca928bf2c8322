"""Write checkpoints in the background, while the next steps are computed."""

import copy
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ffssl.parallel.device import mark_work, wait_in_thread
from ffssl.run_folder import checkpoint


class Saver:
    """Write a folder's checkpoints in a thread, at most one at a time.

    `save` takes as long as copying the state to the host's memory.

    device: of the run's tensors.
    keep: number of checkpoints to keep, see `checkpoint.save`.
    minutes: age at which the last checkpoint makes the next one `due`; 0: never.

    An error in the thread is raised by the next call of any method: UserError for a full disk,
    FloatingPointError for weights (the state's "method") that are not finite. Such weights are not
    written.
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
        """Write the state as it is now, after the checkpoint before is written."""
        self.wait()
        self._copy = copy_to_host(state, self._copy)
        copied = mark_work(self._device) if self._device.type == "cuda" else None
        self._writing = self._thread.submit(self._write, self._copy, copied)
        self._last = time.monotonic()

    def _write(self, state: dict, copied: "torch.cuda.Event | None") -> None:
        if copied is not None:
            wait_in_thread(copied)
        # Check the weights too: the gradient of a finite loss may be infinite.
        # Use NumPy. A reduction by torch would start OpenMP threads in this thread, too. With more
        # threads than cores those of the training would no longer spin between operations: a step
        # of small images took 1.35 times as long.
        for name, tensor in state.get("method", {}).items():
            if tensor.is_floating_point() and not np.isfinite(tensor.float().numpy()).all():
                raise FloatingPointError(
                    f"{name} is no longer finite, {state['epoch']} epochs done; the last "
                    f"checkpoint in {self._folder} is untouched. Try a smaller "
                    "--training.learning_rate or a longer --training.warmup_epochs"
                )
        checkpoint.save(self._folder, state, keep=self._keep)

    def wait(self) -> None:
        """Wait until the last save is on the disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def copy_to_host(value: Any, earlier: Any = None) -> Any:
    """Copy a state to the host's memory, into an `earlier` copy if its tensors are alike.

    Tensors of a GPU go to pinned memory, and arrive when the work queued so far is done.
    """
    if isinstance(value, torch.Tensor):
        if not (isinstance(earlier, torch.Tensor) and _layout(earlier) == _layout(value)):
            earlier = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return earlier.copy_(value, non_blocking=True)
    if isinstance(value, dict):
        before = earlier if isinstance(earlier, dict) else {}
        copied = copy.copy(value)  # keeps the type, and the version in a module's state
        for key, item in value.items():
            copied[key] = copy_to_host(item, before.get(key))
        return copied
    if isinstance(value, (list, tuple)):
        alike = isinstance(earlier, (list, tuple)) and len(earlier) == len(value)
        olds = earlier if alike else [None] * len(value)
        return type(value)(copy_to_host(item, old) for item, old in zip(value, olds))
    return value


def _layout(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype, tuple[int, ...]]:
    return tensor.shape, tensor.dtype, tensor.stride()
