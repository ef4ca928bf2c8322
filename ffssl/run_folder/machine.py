"""Describe the machine that a figure was measured on."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from collections import Counter


def describe_machine(packages: tuple[str, ...]) -> str:
    """Describe processor, usable cores, GPUs, Python and installed packages on one line.

    packages: names; those that are not installed are left out.
    """
    versions = []
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    hardware = [_processor(), f"{len(os.sched_getaffinity(0))} cores", *_gpus()]
    return f"{', '.join(hardware)}; Python {platform.python_version()}, {', '.join(versions)}"


def _gpus() -> list[str]:
    """Return the NVIDIA GPUs, as in "2 x NVIDIA A100".

    The driver is asked, since importing torch takes seconds.
    """
    try:
        words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        told = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    names = Counter(told.stdout.splitlines())
    return [f"{count} x {name.strip()}" for name, count in names.items()]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            first = file.read().split("\n\n")[0]
            lines = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    name = fields.get("model name", platform.machine())
    if "cpu family" not in fields:
        return name
    return f"{name} (family {fields['cpu family']}, model {fields['model']})"
