"""What a figure was measured on."""

import importlib.metadata
import os
import platform
import subprocess
from collections import Counter


def describe_machine(packages: tuple[str, ...]) -> str:
    """Processor, usable cores, GPUs, Python and the versions of those of `packages` that are
    installed, on one line.
    """
    versions = []
    for name in packages:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    hardware = [_processor(), f"{len(os.sched_getaffinity(0))} cores", *_gpus()]
    return f"{', '.join(hardware)}; Python {platform.python_version()}, {', '.join(versions)}"


def _gpus() -> list[str]:
    """The NVIDIA GPUs, as in "2 x NVIDIA A100"; asked of the driver, since to import torch takes
    seconds.
    """
    try:
        words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(
            words, capture_output=True, text=True, timeout=20, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    return [f"{count} x {name.strip()}" for name, count in Counter(names).items()]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            lines = dict(
                line.split(":", 1)
                for line in file.read().split("\n\n")[0].splitlines()
                if ":" in line
            )
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    name = fields.get("model name", platform.machine())
    return (
        f"{name} (family {fields['cpu family']}, model {fields['model']})"
        if "cpu family" in fields
        else name
    )
