"""Checkpoints: complete or absent, the last few kept, loaded without running code from the file."""

import contextlib
import functools
import os
import sys
from pathlib import Path

import torch

from ffssl.errors import UserError
from ffssl.files import replacing, sync_folder
from ffssl.run_folder.machine import describe_machine
from ffssl.weights import disk_failure, require_whole

NAME = "checkpoint.pt"
_PACKAGES = ("ffssl", "torch", "torchvision", "timm", "ffcv")


class Damaged(UserError):
    """A file that is not, or no longer, a checkpoint."""


def save(folder: Path, state: dict, name: str = NAME, *, keep: int = 1) -> None:
    """Write `state` as the folder's checkpoint, in place of the one before.

    state: tensors, numbers and strings, in dicts and lists. "written_on", the machine and the
        versions, is added.
    keep: how many checkpoints to keep. Earlier ones are called checkpoint.1.pt (the one before),
        checkpoint.2.pt and so on.

    A process killed at any moment leaves either the old checkpoint or the new one. Raise UserError
    if the file can't be written.
    """
    path = folder / name
    try:
        with replacing(path) as partial:
            with open(partial, "wb") as file:
                torch.save(state | {"written_on": _written_on()}, file)
                file.flush()
                os.fsync(file.fileno())
            _make_earlier(path, keep)
        for old in _earlier(path)[keep - 1 :]:
            old.unlink()
        sync_folder(folder)
    except (OSError, RuntimeError) as error:
        # After a failed write torch raises a RuntimeError about its position in the file.
        failure = error if isinstance(error, OSError) else error.__context__
        if not isinstance(failure, OSError):
            raise
        raise UserError(
            f"{path}: the checkpoint can't be written: {failure.strerror}; the one before "
            "is untouched"
        ) from error


@functools.cache
def _written_on() -> str:
    return describe_machine(_PACKAGES)  # cached, since it runs a program


def exists(folder: Path, name: str = NAME) -> bool:
    """Return whether the folder holds a checkpoint, damaged or not."""
    latest = folder / name
    return latest.exists() or bool(_earlier(latest))


def load(
    folder: Path, device: torch.device | str = "cpu", name: str = NAME, *, mend: bool = True
) -> dict | None:
    """Load the folder's latest undamaged checkpoint. Return None if there is none.

    Newer checkpoints that are damaged are reported on stderr and renamed to NAME.damaged.

    mend: whether files may be renamed. If not, raise Damaged for a damaged checkpoint.

    Raise UserError if all checkpoints are damaged, and if one can't be read.
    """
    latest, damaged = folder / name, []
    for path in [*([latest] if latest.exists() else []), *_earlier(latest)]:
        try:
            state = read(path, device)
        except Damaged as error:
            if not mend:
                raise
            damaged.append((path, error))
            continue
        for bad, reason in damaged:
            os.replace(bad, bad.with_name(f"{bad.name}.damaged"))
            told = (
                f"warning: {reason}; kept as {bad.name}.damaged, the one before it, "
                f"{path.name}, takes its place"
            )
            print(told, file=sys.stderr, flush=True)
        if mend:
            os.replace(path, latest)
        return state
    if damaged:
        raise UserError(f"{damaged[0][1]}; delete it to start anew")
    return None


def read(path: Path, device: torch.device | str = "cpu") -> dict:
    """Load a checkpoint file.

    Code in the file is refused, not run. Raise Damaged if a byte has changed, or for a file of
    another kind; UserError if the disk fails.
    """
    try:
        with open(path, "rb") as file:
            require_whole(file)
            file.seek(0)
            return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # a damaged archive may raise anything
        if failure := disk_failure(error):
            raise UserError(f"{path}: the checkpoint can't be read: {failure}") from error
        raise Damaged(f"{path}: not a readable checkpoint ({type(error).__name__})") from error


def _make_earlier(path: Path, keep: int) -> None:
    """Rename the existing checkpoints to earlier ones. The latest keeps its name too."""
    for age in range(keep - 2, 0, -1):
        with contextlib.suppress(FileNotFoundError):
            os.replace(_aged(path, age), _aged(path, age + 1))
    if keep > 1 and path.exists():
        try:
            with replacing(_aged(path, 1)) as link:
                link.unlink(missing_ok=True)  # a process may have been killed here
                os.link(path, link)
        except OSError:
            # This file system has no hard links. For a moment there is only the earlier name,
            # which `load` copes with.
            os.replace(path, _aged(path, 1))


def _aged(path: Path, age: int) -> Path:
    return path.with_name(f"{path.stem}.{age}{path.suffix}")


def _earlier(path: Path) -> list[Path]:
    """Return the checkpoints before the one at `path`, latest first."""
    middle = {
        other: other.name.removeprefix(f"{path.stem}.").removesuffix(path.suffix)
        for other in path.parent.glob(f"{path.stem}.*{path.suffix}")
    }
    return sorted(
        (other for other in middle if middle[other].isdecimal()),
        key=lambda other: int(middle[other]),
    )
