"""The soak, short, and what it calls flat."""

import _thread
import importlib.util
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.printed_tables import rows_of

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "soak.py"


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_hundred_and_twenty_epochs_are_flat():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, SCRIPT, "--epochs", "120", "--batch-size", "16"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    titles, *rows = rows_of(result.stdout)
    assert titles == ["epochs", "memory, MB", "threads", "descriptors"] and len(rows) == 8
    assert result.stdout.splitlines()[-1] == "flat"
    assert all(50 < float(memory) < 5000 for _, memory, _, _ in rows)


@pytest.mark.parametrize(
    "megabytes, threads, descriptors, flat",
    [
        # Warms up.
        (lambda e: 500 if e < 10 else 600, lambda e: 2 if e < 10 else 4, lambda e: 9, True),
        (lambda e: 600 + 9 * (e % 7), lambda e: 4, lambda e: 9, True),  # varies
        (lambda e: 600 + 0.3 * e, lambda e: 4, lambda e: 9, False),  # leaks
        (lambda e: 600, lambda e: 4 + (e == 30), lambda e: 9, False),
        (lambda e: 600, lambda e: 4, lambda e: 9 + e // 10, False),
    ],
)
def test_what_is_called_flat(soak, megabytes, threads, descriptors, flat):
    usages = [soak.Usage(int(1e6 * megabytes(e)), threads(e), descriptors(e)) for e in range(40)]
    assert soak.is_flat(usages) == flat


def test_threads_of_libraries_count(soak):
    """Those that Python knows nothing of."""
    before, stop = soak.Usage.now().threads, threading.Event()
    thread = _thread.start_new_thread(stop.wait, ())
    assert (
        thread
        and threading.active_count() < soak.Usage.now().threads
        and soak.Usage.now().threads == before + 1
    )
    stop.set()


def test_an_epoch_that_leaks_is_not_called_flat(soak, beton_of_drawings):
    kept = []
    usages = []
    for usage in soak.soak(beton_of_drawings, 40, 8):
        kept.append(mmap.mmap(-1, 400_000))  # of pages that no heap has to give
        kept[-1].write(b"\1" * 400_000)
        usages.append(usage)
    assert not soak.is_flat(usages)


@pytest.fixture
def beton_of_drawings(tmp_path):
    from ffssl.data.convert.conversion import ConvertOptions, convert
    from ffssl.data.convert.sources.embedded import Embedded

    convert(Embedded("train", 32), tmp_path / "images.beton", ConvertOptions(progress=False))
    return tmp_path / "images.beton"
