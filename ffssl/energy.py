"""The energy that a GPU has used, by its own counter."""

from collections.abc import Callable

import torch

JOULES_PER_KWH = 3.6e6


def energy_counter(device: torch.device) -> Callable[[], float] | None:
    """A function that returns the joules that the GPU has used since its driver was loaded; None where nothing counts them.

    NVML counts for the whole board, since Volta.
    """
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        board = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(board)
    except (pynvml.NVMLError, AttributeError):  # no driver's library, no counter, a torch without UUIDs
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(board) / 1000
