"""docs/reproduce.md: its commands are commands, and the costs in it are those that are counted."""

import re
import sys
from pathlib import Path

import pytest

from ffssl.config import read_options

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import costs  # noqa: E402

TEXT = costs.DOCUMENT.read_text()
COMMANDS = costs.commands(TEXT)
ROWS = {match["run"]: match[0] for match in costs.ROW.finditer(TEXT)}


def test_the_documents_commands_are_all_found():
    assert len(COMMANDS) == len({*COMMANDS}) > 80
    loops = len(re.findall(r"^ *ffssl train", TEXT, flags=re.MULTILINE))
    assert len(COMMANDS) > loops
    tables = {run.split("/")[0] for run in COMMANDS}
    numbered = {f"table{n}" for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12)}
    assert tables == numbered | {"figure3", "beyond", "vit"}
    assert all(f"Table {n}" in TEXT for n in range(1, 13)) and all(
        f"Figure {n}" in TEXT or f"Figures {n}" in TEXT for n in (1, 2, 4)
    )


@pytest.mark.parametrize("run", COMMANDS)
def test_every_command_reads(run, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = read_options(COMMANDS[run])
    assert options.run.folder == f"runs/{run}" and options.data.train in (
        "imagenet-train.beton",
        "imagenette-train.beton",
    )
    if run.startswith("table2"):
        assert options.method.name == run.split("/")[1].rpartition("-")[0]


def test_every_row_is_about_a_command_and_every_table_has_rows():
    assert ROWS.keys() <= COMMANDS.keys()
    assert {run.split("/")[0] for run in ROWS} == {run.split("/")[0] for run in COMMANDS}


def counted(runs, monkeypatch):
    monkeypatch.chdir(ROOT)
    ours = costs.RunCosts()
    for run in runs:
        options = read_options(COMMANDS[run])
        cells = [cell.strip() for cell in ROWS[run].strip("|").split("|")]
        assert (cells[2], cells[3], cells[5], cells[6]) == costs.cells(options, ours), run


def test_the_costs_in_the_document_are_those_counted(monkeypatch):
    counted(["table2/byol-efficient", "table3/f1-clr-spl-ha", "table6/64"], monkeypatch)


@pytest.mark.slow
def test_all_costs_in_the_document_are_those_counted(monkeypatch):
    counted(ROWS, monkeypatch)


def test_the_figures_are_drawn(tmp_path, monkeypatch):
    [script] = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "rn50_configs").symlink_to(ROOT / "rn50_configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    exec(script, {})
    assert (tmp_path / "schedules.png").stat().st_size > 10_000
