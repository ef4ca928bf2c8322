"""How a run was started, and on what: `run.json` in its folder, one entry for each time that it was
started or continued.
"""

import datetime
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ffssl.errors import UserError
from ffssl.files import write_json
from ffssl.run_folder.machine import describe_machine

if TYPE_CHECKING:
    import torch

NAME = "run.json"
PACKAGES = ("ffssl", "torch", "torchvision", "timm", "numba", "numpy", "ffcv")
ROOT = Path(__file__).resolve().parents[2]


def record_start(folder: Path, device: "torch.device") -> None:
    """Add this process's start to the folder's record.

    One that is damaged is told, and kept as NAME.damaged. Raises UserError on a full disk.
    """
    import torch  # takes seconds, which those who only read the record are spared

    from ffssl.parallel.ranks import world_size

    start = {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "ranks": world_size(),
        "machine": describe_machine(PACKAGES),
        "git": git_revision(),
    }
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
    """The starts of a run, oldest first; none of a run of a version that kept no record.

    Raises UserError for a damaged record.
    """
    path = folder / NAME
    try:
        return json.loads(path.read_text()) if path.exists() else []
    except ValueError as error:
        raise UserError(f"{path}: not a readable record of the run's starts ({error})") from error


def git_revision(root: Path = ROOT) -> str | None:
    """The commit that `root` is a checkout of, with -dirty after it if files have changed since;
    None if it is no checkout.

    "unknown" if git can't tell: where there is none, or the checkout is another user's.
    """
    # Asked of git, an installed package would be taken for a part of the repository around it.
    if not (root / ".git").exists():
        return None
    try:
        words = [
            "git",
            "-C",
            str(root),
            "describe",
            "--always",
            "--dirty",
            "--abbrev=12",
            "--exclude=*",
        ]
        return subprocess.run(
            words, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
