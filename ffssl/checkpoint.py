"""Checkpoints: whole or absent, and loaded without running code from the file."""

import functools
import os
from pathlib import Path

import torch

from ffssl.benchmark.machine import describe_machine
from ffssl.errors import UserError
from ffssl.files import replacing

NAME = "checkpoint.pt"
_PACKAGES = ("ffssl", "torch", "torchvision", "timm", "ffcv")


def save(folder: Path, state: dict, name: str = NAME) -> None:
    """Write `state` (tensors, numbers, strings, in dicts and lists) as the folder's checkpoint, replacing the one before.

    "written_on", the machine and the versions, is added. A process killed at any moment leaves either the old checkpoint or the new one.
    """
    try:
        with replacing(folder / name) as partial, open(partial, "wb") as file:
            torch.save(state | {"written_on": _written_on()}, file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{folder / name}: the checkpoint can't be written: {error.strerror}; the one before is untouched") from error


@functools.cache
def _written_on() -> str:
    return describe_machine(_PACKAGES)  # runs a program, which is not for every epoch


def load(folder: Path, device: torch.device | str = "cpu", name: str = NAME) -> dict | None:
    """The folder's checkpoint, or None where there is none."""
    path = folder / name
    if not path.exists():
        return None
    try:
        return read(path, device)
    except UserError as error:
        raise UserError(f"{error}; delete it to start anew") from error


def read(path: Path, device: torch.device | str = "cpu") -> dict:
    """A checkpoint file. Code that it may hold is refused, not run."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged archive raises whatever the part hit raises
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__})") from error
