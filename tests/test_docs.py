"""The documents' code, run as it stands on a small file."""

import difflib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ffssl.data.convert.conversion import convert
from ffssl.data.convert.sources.embedded import Embedded

ROOT = Path(__file__).resolve().parent.parent
STEPS = 5  # in an epoch of 8 images a batch


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


BLOCKS = blocks((ROOT / "docs/loader.md").read_text())
_, *SECTIONS = re.split(r"^## ", (ROOT / "docs/levers.md").read_text(), flags=re.MULTILINE)
LEVERS = {section.splitlines()[0]: blocks(section) for section in SECTIONS if blocks(section)}


def test_the_document_has_its_examples():
    assert len(BLOCKS) == 4 and all("ViewLoader" in block for block in BLOCKS)
    assert {title: len(parts) for title, parts in LEVERS.items()} == {
        "What each saves": 1,
        "A PyTorch loop": 4,
        "lightly": 4,
        "Lightning": 5,
    }


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


@pytest.mark.parametrize("title", LEVERS)
@pytest.mark.filterwarnings("ignore")
def test_examples_of_the_levers_run(tmp_path, monkeypatch, capsys, title):
    source = Embedded("train", 8)  # one batch
    convert(source, tmp_path / "train.beton")
    (tmp_path / "photos").mkdir()
    for number in range(8):
        Image.new("RGB", (70, 70), (number * 30, 99, 9)).save(tmp_path / f"photos/{number}.png")
    (tmp_path / "example.py").write_text("".join(LEVERS[title]))
    monkeypatch.chdir(tmp_path)
    # In this process, which has torch already.
    runpy.run_path("example.py")
    if title == "What each saves":
        [section] = (text for text in SECTIONS if text.startswith(title))
        for line in capsys.readouterr().out.splitlines():
            assert f"    {line}\n" in section


def test_all_levers_change_fewer_than_forty_lines_of_lightlys_example():
    before, *_, after = LEVERS["Lightning"]
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0)
    changed = [line for line in lines if re.match(r"[+-](?![+-]{2})", line)]
    assert 10 < len(changed) < 40, "\n".join(changed)
