"""The energy that a GPU has used, from its own counter."""

from collections.abc import Callable

import torch

JOULES_PER_KWH = 3.6e6


def energy_counter(device: torch.device) -> Callable[[], float | None]:
    """Return a function that reads the joules used by the GPU since its driver was loaded.

    The function returns None if there is no counter. NVML counts the energy of the whole board, on
    Volta and later.
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
    # Without the package, the driver's library or a counter, NVML's binding raises various errors.
    except Exception:
        return lambda: None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(board) / 1000
