"""How a run was started, and on what machine.

`run.json` in the run's folder has one entry for each start or continuation.
"""

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ffssl.config.command_line import typed_command
from ffssl.errors import UserError
from ffssl.files import write_json
from ffssl.run_folder.machine import describe_machine

if TYPE_CHECKING:
    import torch

NAME = "run.json"
PACKAGES = ("ffssl", "torch", "torchvision", "timm", "numba", "numpy", "ffcv")
ROOT = Path(__file__).resolve().parents[2]


def record_start(
    folder: Path, device: "torch.device", weights: Mapping[str, object] | None = None
) -> None:
    """Add this process's start to the folder's record.

    weights: the file that the run started from, see `ffssl.training.build.first_backbone`.

    A damaged record is reported on stderr and renamed to NAME.damaged. Raise UserError on a full
    disk.
    """
    import torch  # takes seconds, which programs that only read the record need not spend

    from ffssl.parallel.ranks import world_size

    start = {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": typed_command(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "ranks": world_size(),
        "machine": describe_machine(PACKAGES),
        "git": git_revision(),
    }
    if weights:
        start["weights"] = dict(weights)
    path = folder / NAME
    try:
        try:
            before = read_starts(folder)
        except UserError as error:
            os.replace(path, path.with_name(f"{NAME}.damaged"))
            print(f"warning: {error}; kept as {NAME}.damaged", file=sys.stderr, flush=True)
            before = []
        write_json(path, [*before, start])
    except OSError as error:
        raise UserError(
            f"{path}: the record of the run can't be written: {error.strerror}"
        ) from error


def read_starts(folder: Path) -> list[dict]:
    """Return the starts of a run, oldest first; empty if an older version kept no record.

    Raise UserError for a damaged record.
    """
    path = folder / NAME
    try:
        return json.loads(path.read_text()) if path.exists() else []
    except ValueError as error:
        raise UserError(f"{path}: not a readable record of the run's starts ({error})") from error


def git_revision(root: Path = ROOT) -> str | None:
    """Return the commit that `root` is a checkout of, or None if it is no checkout.

    The commit ends in -dirty if files have changed since. Return "unknown" if git can't tell: it is
    not installed, or the checkout belongs to another user.
    """
    # git would take an installed package for a part of a repository around it.
    if not (root / ".git").exists():
        return None
    try:
        words = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        words += ["--abbrev=12", "--exclude=*"]
        told = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
        return told.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
