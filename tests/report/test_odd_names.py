"""Class and run names that are no UTF-8, of other scripts, and that mean something to markup or
mathematics.
"""

import json
import os
import shutil
import sys
import warnings

import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from support.small_runs import save_run

from ffssl.config.command_line import exit_status
from ffssl.data.beton.description import description_path
from ffssl.export.__main__ import main as export
from ffssl.plots import _fonts_for, any_script, drawable
from ffssl.printable import printable
from ffssl.report.charts import draw_points, render
from ffssl.report.write import write_report

LATIN_1 = os.fsdecode(b"caf\xe9")
NAMES = [LATIN_1, "中文类", "한국어", "a\nb", "$x_", "<i>&", "\U0001f600", "plain"]


@pytest.fixture
def run(betons, tmp_path):
    """A run in a folder named so, of files named so with classes named so."""
    paths = {split: tmp_path / f"{split} {LATIN_1}.beton" for split in betons}
    for split, path in paths.items():
        shutil.copy(betons[split], path)
        description = json.loads(description_path(betons[split]).read_text())
        description_path(path).write_text(json.dumps(description | {"class_names": NAMES}))
    folder = tmp_path / f"run 中 {LATIN_1}"
    save_run(folder, f"--data.train={paths['train']}", f"--data.validation={paths['val']}")
    rows = [
        {
            "epoch": epoch,
            "knn": 0.5,
            "seconds": 9.0 * epoch,
            "flops": 1e12 * epoch,
            "loss": 1.0,
            "data_wait": 0.0,
        }
        for epoch in range(4)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_report_shows_them_all_without_a_word(run, tmp_path, capfd):
    output = tmp_path / f"{LATIN_1}.html"
    with warnings.catch_warnings(action="error", category=UserWarning):
        write_report([run], output, "cpu")
    page = output.read_text(encoding="utf-8")
    for name in (
        "caf\\udce9",
        "中文类",
        "한국어",
        "a\\nb",
        "$x_",
        "&lt;i&gt;&amp;",
        "\U0001f600",
        "run 中 caf\\udce9",
    ):
        assert name in page, name
    assert "Not shown" not in page
    assert capfd.readouterr().err == ""


def test_an_export_names_them_in_its_card(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "export",
            str(run),
            "--to",
            "safetensors",
            "--output",
            str(tmp_path / f"{LATIN_1}.safetensors"),
        ],
    )
    assert exit_status(export) == 0
    assert "train caf\\udce9.beton" in (tmp_path / f"{LATIN_1}.safetensors.md").read_text(
        encoding="utf-8"
    )


def test_what_can_not_be_printed_is_escaped_and_nothing_else():
    assert [printable(name) for name in NAMES] == [
        "caf\\udce9",
        "中文类",
        "한국어",
        "a\\nb",
        "$x_",
        "<i>&",
        "\U0001f600",
        "plain",
    ]


def pixels(text: str) -> np.ndarray:
    with any_script(text):
        figure = Figure((1, 1), dpi=100)
        figure.text(0.1, 0.4, text, fontsize=30, parse_math=False)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., 0]


@pytest.fixture
def without_other_fonts(monkeypatch):
    """Only matplotlib's own, so that the outcome doesn't depend on the machine."""
    own = [font for font in font_manager.fontManager.ttflist if "mpl-data" in font.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    _fonts_for.cache_clear()
    yield
    _fonts_for.cache_clear()


def test_texts_are_drawn_in_fonts_that_have_them_and_escaped_where_none_has(without_other_fonts):
    in_another = "\U0001d608"  # an A that STIX has, and DejaVu has not
    box = pixels("\uffff")
    assert drawable(in_another) == in_another and drawable("Ä中1") == "Ä\\u4e2d1"
    with warnings.catch_warnings(action="error", category=UserWarning):
        drawn = pixels(in_another)
    assert (drawn != box).any() and (drawn < 128).sum() > 50


def test_a_png_escapes_what_an_svg_leaves_to_the_reader(without_other_fonts):
    points, labels = np.random.default_rng(0).normal(size=(20, 2)), np.arange(20) % 2

    def drawn(name):
        return render(draw_points(points, labels, {0: "a", 1: name}, "title"), "points", "title")

    (svg, png), (_, escaped) = drawn("中"), drawn("\\u4e2d")
    assert "中" in svg and "4e2d" not in svg
    assert png == escaped
