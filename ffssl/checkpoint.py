"""Checkpoints: whole or absent, and loaded without running code from the file."""

import os
from pathlib import Path

import torch

from ffssl.errors import UserError

NAME = "checkpoint.pt"


def save(folder: Path, state: dict) -> None:
    """Write `state` (tensors, numbers, strings, in dicts and lists) as the folder's checkpoint, replacing the one before.

    A process killed at any moment leaves either the old checkpoint or the new one.
    """
    temporary = folder / f".{NAME}.partial"
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / NAME)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{folder / NAME}: the checkpoint can't be written: {error.strerror}; the one before is untouched") from error


def load(folder: Path, device: torch.device | str = "cpu") -> dict | None:
    """The folder's checkpoint, or None where there is none."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged archive raises whatever the part hit raises
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__}); delete it to start anew") from error
