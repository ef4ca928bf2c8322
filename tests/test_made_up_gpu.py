"""The tests of GPUs that ask for no numbers, on a GPU that is made up: torch's own code over a
runtime whose kernels do nothing.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_up_gpu.build import NotHere, build

TESTS = Path(__file__).resolve().parent
FILES = [TESTS / "gpu", TESTS / "test_step.py"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: these tests run on it")
    try:
        return build(tmp_path_factory.mktemp("made-up-gpu"))
    except NotHere as reason:
        pytest.skip(f"no made-up GPU: {reason}")


def run(environment, tmp_path, *words) -> None:
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "made_up_gpu.plugin",
        "-p",
        "no:cacheprovider",
        *words,
        *FILES,
    ]
    ran = subprocess.run(
        list(map(str, command)),
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        env=os.environ
        | environment
        | caches
        | {"PYTHONPATH": paths, "MADE_UP_GPUS": "2", "PYTEST_ADDOPTS": ""},
    )
    told = ran.stdout + ran.stderr
    assert ran.returncode == 0 and int(re.search(r"(\d+) passed", told)[1]) > 0, told[-8000:]


def test_what_asks_a_gpu_for_no_numbers(environment, tmp_path):
    run(environment, tmp_path, "-m", "gpu and not values and not slow")


@pytest.mark.slow
def test_what_is_compiled_for_a_gpu(environment, tmp_path):
    run(environment, tmp_path, "-m", "gpu and not values and slow", "--slow")
