"""The documents' code, run as it stands on a small file."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ffssl.data.convert.conversion import convert
from ffssl.data.convert.sources.embedded import Embedded

ROOT = Path(__file__).resolve().parent.parent
STEPS = 5  # in an epoch of 8 images a batch
BLOCKS = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "docs/loader.md").read_text(), re.MULTILINE | re.DOTALL
)


def test_the_document_has_its_examples():
    assert len(BLOCKS) == 4 and all("ViewLoader" in block for block in BLOCKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    convert(Embedded("train", 8 * STEPS), folder / "train.beton")
    return folder


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_examples_of_the_loader_run(folder, block):
    (folder / "example.py").write_text(
        block + "\nassert views.shape[0] == 8 and len(loader) == 5\n"
    )
    # Their threads would contend with the loader's.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "example.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
