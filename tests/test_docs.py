"""The documents' code, run as it stands on a small file."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ffssl.data.convert.conversion import convert
from ffssl.data.convert.sources.embedded import Embedded

ROOT = Path(__file__).resolve().parent.parent
STEPS = 5  # in an epoch of 8 images a batch
# How many blocks of Python each document has.
DOCUMENTS = {"loader.md": 4, "coming-from.md": 3}
BLOCKS = {
    f"{name}-{number}": block
    for name in DOCUMENTS
    for number, block in enumerate(
        re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / name).read_text(), re.M | re.S)
    )
}


def test_the_documents_have_their_examples():
    assert Counter(name.rpartition("-")[0] for name in BLOCKS) == DOCUMENTS
    assert all("ViewLoader" in block or "ViewDecoder" in block for block in BLOCKS.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    convert(Embedded("train", 8 * STEPS), folder / "train.beton")
    return folder


@pytest.mark.parametrize("name", BLOCKS)
def test_examples_run(folder, name):
    (folder / "example.py").write_text(
        BLOCKS[name] + "\nassert views.shape[0] == 8 and len(loader) == 5\n"
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


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")])
TO_COME = {ROOT / "docs" / "levers.md"}


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists() or target in TO_COME, link
            assert not anchor or target.suffix != ".md" or anchor in anchors(target), link


def test_the_index_names_every_document_and_the_readme_is_short():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in ROOT.glob("docs/*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
