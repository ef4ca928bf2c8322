"""The documents' code, run as it stands on a small file."""

import difflib
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from ffssl.__main__ import COMMANDS
from ffssl.config import named, read_options
from ffssl.data.convert.conversion import ConvertOptions, convert
from ffssl.data.convert.sources.embedded import Embedded

ROOT = Path(__file__).resolve().parent.parent
STEPS = 5  # in an epoch of 8 images a batch
# How many blocks of Python each document has, those of docs/levers.md by section.
DOCUMENTS = {"loader.md": 5, "coming-from.md": 3}
SECTIONS = {"What each saves": 1, "A PyTorch loop": 4, "lightly": 4, "Lightning": 5}


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


BLOCKS = {
    f"{name}-{number}": block
    for name in DOCUMENTS
    for number, block in enumerate(blocks((ROOT / "docs" / name).read_text()))
}
PARTS = re.split(r"^## ", (ROOT / "docs" / "levers.md").read_text(), flags=re.MULTILINE)[1:]
LEVERS = {part.splitlines()[0]: blocks(part) for part in PARTS if blocks(part)}


def test_the_documents_have_their_examples():
    assert Counter(name.rpartition("-")[0] for name in BLOCKS) == DOCUMENTS
    assert all("ViewLoader" in block or "ViewDecoder" in block for block in BLOCKS.values())
    assert {title: len(parts) for title, parts in LEVERS.items()} == SECTIONS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    source = Embedded("train", 8 * STEPS)
    convert(source, folder / "train.beton")
    for k in (1, 2):
        convert(source, folder / f"part-{k}.beton", ConvertOptions(part=(k, 2)))
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
        [section] = (text for text in PARTS if text.startswith(title))
        for line in capsys.readouterr().out.splitlines():
            assert f"    {line}\n" in section


def test_all_levers_change_fewer_than_forty_lines_of_lightlys_example():
    before, *_, after = LEVERS["Lightning"]
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0)
    changed = [line for line in lines if re.match(r"[+-](?![+-]{2})", line)]
    assert 10 < len(changed) < 40, "\n".join(changed)


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")])


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
            assert target.exists(), link
            assert not anchor or target.suffix != ".md" or anchor in anchors(target), link


def commands(page: Path) -> list[list[str]]:
    """Return the words of a page's `ffssl` commands, each on lines of its own, as bash has them."""
    text = re.sub(r"\\\n\s*", "", page.read_text())
    lines = re.findall(r"^(?: {4}|#   )(?:torchrun .*-m )?ffssl (.*[^.\n])$", text, re.M)
    return [shlex.split(line, comments=True) for line in lines]


# docs/reproduce.md has loops, which tests/test_reproduce.py expands.
TYPED = {
    f"{page.name}: {' '.join(words)}": words
    for page in [*PAGES, *named.FOLDER.glob("**/*.yaml")]
    if page.name != "reproduce.md"
    for words in commands(page)
}


def test_the_commands_are_found():
    assert len(TYPED) > 40 and {words[0] for words in TYPED.values()} == {*COMMANDS}


@pytest.mark.parametrize("typed", TYPED)
def test_commands_name_what_there_is(typed, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, *words = TYPED[typed]
    if name == "train":
        with_files = {"data.train": "train.beton", "run.folder": "runs/a"}
        assert read_options(words, with_files).run.folder
        return
    module = ROOT / (COMMANDS[name][0].replace(".", "/"))
    sources = module.rglob("*.py") if module.is_dir() else [module.with_suffix(".py")]
    source = "\n".join(path.read_text() for path in sources)
    for word in words:
        option = word.partition("=")[0]
        if option.startswith("--") and "." not in option and option != "--config":
            assert f'"{option}"' in source, word
        if word.endswith(".yaml"):
            assert named.find("study" if name == "study" else "config", word)


def test_the_index_names_every_document_and_the_readme_is_short():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in ROOT.glob("docs/*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
