"""The energy that a GPU has used, by its own counter."""

from collections.abc import Callable

import torch

JOULES_PER_KWH = 3.6e6


def energy_counter(device: torch.device) -> Callable[[], float | None]:
    """A function that returns the joules that the GPU has used since its driver was loaded, or None
    where nothing counts them.

    NVML counts for the whole board, from Volta on.
    """
    if device.type != "cuda":
        return lambda: None
    try:
        import pynvml

        pynvml.nvmlInit()
        board = pynvml.nvmlDeviceGetHandleByUUID(
            f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        )
        pynvml.nvmlDeviceGetTotalEnergyConsumption(board)
    # No such package, no driver's library, no counter; whichever error NVML's binding makes of it.
    except Exception:
        return lambda: None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(board) / 1000
