import json
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import PIL.Image
import pytest
import torch
from support.options import SMALL

from ffssl.config import read_options
from ffssl.data.convert.conversion import convert
from ffssl.data.convert.sources.embedded import Embedded
from ffssl.errors import UserError
from ffssl.evaluate.results import add_result
from ffssl.report import write
from ffssl.report.charts import training_charts
from ffssl.report.page import compose
from ffssl.report.runs import describe_data, read_runs
from ffssl.report.write import write_report
from ffssl.run_folder import checkpoint
from ffssl.run_folder.log import NAME as LOG_NAME
from ffssl.train import train

OPTIONS = [*SMALL, "--training.epochs=2", "--data.workers=1"]
HARD = ["--augment.views=3", "--hard_augment.select=hard", "--resolution.schedule=progressive"]
SECTIONS = (
    "cost",
    "schedules",
    "training",
    "views",
    "choice",
    "embeddings",
    "neighbours",
    "config",
    "started",
)
VOID = {"meta", "img", "br", "path", "use"}


class Page(HTMLParser):
    """A page's elements as (tag, attributes), its text by section, and the elements that are not
    closed in their order.
    """

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.misnested, self.text = [], [], {}
        self._open, self._section = [], ""
        self.feed(html)
        self.close()
        self.misnested += self._open

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "section":
            self._section = dict(attributes)["id"]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID and (not self._open or self._open.pop() != tag):
            self.misnested.append(tag)

    def handle_data(self, data):
        self.text[self._section] = self.text.get(self._section, "") + data

    def count(self, tag: str, **attributes) -> int:
        return sum(name == tag and attributes.items() <= own.items() for name, own in self.elements)


def options_of(folder: Path, run: str, *words: str):
    data = [f"--data.train={folder / 'train.beton'}", f"--data.validation={folder / 'val.beton'}"]
    return read_options([*OPTIONS, *data, f"--run.folder={folder / run}", *words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs, one with a name that would be markup, and their images."""
    folder = tmp_path_factory.mktemp("report")
    convert(Embedded("train", 48), folder / "train.beton")
    convert(Embedded("val", 20), folder / "val.beton")
    train(options_of(folder, "<b>"))
    train(options_of(folder, "hard", *HARD))
    return folder


@pytest.fixture(scope="module")
def page(folder):
    write_report([folder / "<b>", folder / "hard"], folder / "report.html", "cpu")
    return Page((folder / "report.html").read_text())


def test_every_section_is_there_and_shows_its_pictures(folder, page):
    assert [own["id"] for tag, own in page.elements if tag == "section"] == list(SECTIONS)
    assert page.misnested == []
    assert "Not shown" not in "".join(page.text.values())
    assert page.count("svg") == 2 + 5 + 9 + 2 + 2
    views = 2 * 4 * 2 + 2 * 4 * 3  # epochs, images, views, of both runs
    assert page.count("img", **{"class": "chosen"}) == 2 * 4 * 2
    assert page.count("img") == views + 2 * 6 * (1 + 8)
    pngs = sorted((folder / "report_pictures").iterdir())
    assert len(pngs) == page.count("svg") + 4
    for png in pngs:
        with PIL.Image.open(png) as picture:
            assert min(picture.size) > 60 and len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_the_page_loads_nothing(folder, page):
    assert not [
        tag for tag, _ in page.elements if tag in ("script", "link", "iframe", "object", "embed")
    ]
    addresses = [
        value
        for _, own in page.elements
        for name, value in own.items()
        if name in ("src", "href", "xlink:href", "srcset")
    ]
    assert all(address.startswith(("#", "data:image/jpeg;base64,")) for address in addresses)
    html = (folder / "report.html").read_text()
    assert "://" not in html and "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_ids_are_unique_and_what_refers_to_them_finds_them(folder, page):
    ids = [own["id"] for _, own in page.elements if "id" in own]
    assert len(ids) == len(set(ids))
    html = (folder / "report.html").read_text()
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', html)) <= set(ids)


def test_names_and_values_are_text_not_markup(page):
    assert page.count("b") == 2 * 2  # the epochs of the views
    assert "<b>" in page.text["cost"] and "<b>" in page.text["config"]


def test_the_config_shows_what_differs_apart_from_what_does_not(folder, page):
    differing = re.findall(
        r'<tr class="differs"><th scope="row">([^<]*)<', (folder / "report.html").read_text()
    )
    assert set(differing) == {
        "hard_augment.select",
        "resolution.schedule",
        "augment.views",
        "run.folder",
    }
    assert "training.epochs2" in page.text["config"]


def test_the_record_of_the_start_is_shown(folder, page):
    (start,) = json.loads((folder / "hard" / "run.json").read_text())
    assert all(
        start[name] in page.text["started"] for name in ("started", "command", "machine", "device")
    )


def test_costs_are_stated_as_the_logs_have_them(folder, page):
    last = {
        run: json.loads((folder / run / LOG_NAME).read_text().splitlines()[-1])
        for run in ("<b>", "hard")
    }
    assert f"{last['hard']['knn']:.1%}" in page.text["cost"]
    assert f"{last['<b>']['flops'] / last['hard']['flops']:.2f}× less than <b>" in page.text["cost"]
    assert "unfinished" not in page.text["cost"]


@pytest.fixture
def unfinished(folder, tmp_path):
    """The hard run as it was after its first epoch."""
    shutil.copytree(folder / "hard", tmp_path / "hard")
    log = tmp_path / "hard" / LOG_NAME
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))
    return tmp_path / "hard"


def test_an_unfinished_run_is_marked(folder, unfinished):
    write_report([folder / "<b>", unfinished], unfinished / "report.html", "cpu")
    page = Page((unfinished / "report.html").read_text())
    assert page.count("span", **{"class": "chip"}) == 1 and "1 of 2" in page.text["cost"]
    assert (
        "less than" not in page.text["cost"]
        and "still to come" in page.text["schedules"]
        and "to come" in page.text["views"]
    )


def test_what_can_not_be_computed_says_why_and_the_rest_is_there(folder, unfinished, tmp_path):
    log = unfinished / LOG_NAME
    # Only the accuracy of the untrained network.
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    (unfinished / "checkpoint.pt").unlink()
    (unfinished / "run.json").unlink()
    write_report([unfinished], tmp_path / "report.html", "cpu")
    page = Page((tmp_path / "report.html").read_text())
    for section in ("views", "embeddings", "neighbours"):
        assert "holds no checkpoint" in page.text[section]
    assert "kept no record" in page.text["started"]


def test_without_its_images_a_run_is_still_reported(folder, tmp_path):
    hidden = folder / "hidden.beton"
    (folder / "train.beton").rename(hidden)
    try:
        write_report([folder / "hard"], tmp_path / "report.html", "cpu")
    finally:
        hidden.rename(folder / "train.beton")
    page = Page((tmp_path / "report.html").read_text())
    assert all(
        "train.beton: no such file" in page.text[section]
        for section in ("views", "choice", "neighbours")
    )
    assert "Not shown" not in page.text["embeddings"]


def cost_of(*runs) -> str:
    """The text of the section, of runs without their pictures."""
    return Page(
        compose([replace(run, method=UserError("left out")) for run in runs], torch.device("cpu"))[
            0
        ]
    ).text["cost"]


def with_last_row(run, **values):
    return replace(run, rows=[*run.rows[:-1], {**run.rows[-1], **values}])


def test_costs_are_multiples_of_the_first_runs(folder):
    first, run = read_runs([folder / "<b>", folder / "hard"])
    costs = first.rows[-1]
    without_accuracy = replace(
        run, rows=[{name: value for name, value in run.rows[-1].items() if name != "knn"}]
    )
    text = cost_of(
        first,
        with_last_row(run, flops=costs["flops"] * 3, seconds=costs["seconds"] / 4),
        without_accuracy,
    )
    assert (
        "3.00× more than <b>" in text
        and "4.00× less than <b>" in text
        and text.count("than <b>") == 2
    )


def test_the_linear_classifiers_accuracies_are_shown_where_there_are_some(folder):
    first, run = read_runs([folder / "<b>", folder / "hard"])
    assert 0 <= first.rows[-1]["linear_top1"] <= first.rows[-1]["linear_top5"] <= 1
    text = cost_of(with_last_row(first, linear_top1=0.4321, linear_top5=0.9), run)
    assert "linear accuracy" in text and "43.2%" in text and "top-5 90.0%" in text
    rows = [
        {name: value for name, value in row.items() if not name.startswith("linear")}
        for row in run.rows
    ]
    assert "linear" not in cost_of(replace(run, rows=rows))
    assert any(chart.name == "linear-epochs" for chart in training_charts([first]))
    assert all(
        chart.name != "linear-epochs" for chart in training_charts([replace(run, rows=rows)])
    )


def test_times_are_compared_on_the_same_hardware_alone(folder):
    first, run = read_runs([folder / "<b>", folder / "hard"])
    costs = first.rows[-1]
    (start,) = run.starts
    run = with_last_row(run, flops=costs["flops"] * 2, seconds=costs["seconds"] * 5)
    others = (
        [{**start, "ranks": 8}],
        [{**start, "device": "another"}],
        [start, {**start, "ranks": 2}],
        [],
    )
    text = cost_of(first, *(replace(run, starts=starts) for starts in others))
    assert text.count("2.00× more than <b>") == len(others) and "5.00×" not in text


def test_several_processes_are_shown(folder):
    (run,) = read_runs([folder / "hard"])
    (start,) = run.starts
    run = replace(run, method=UserError("left out"), starts=[start, {**start, "ranks": 8}])
    text = Page(compose([run], torch.device("cpu"))[0]).text["started"]
    assert "processes8" in text and text.count("processes") == 1


@pytest.mark.parametrize(
    "section, name, value",
    [
        ("resolution", "max", 48),
        ("evaluate", "bank_samples", 30),
        ("evaluate", "k", 6),
        ("evaluate", "temperature", 0.2),
    ],
)
def test_what_decides_an_accuracy_decides_whether_it_is_comparable(folder, section, name, value):
    first, run = read_runs([folder / "<b>", folder / "hard"])
    assert first.evaluation == run.evaluation
    run = replace(run, options=run.options.changed(**{section: {name: value}}))
    assert first.evaluation != run.evaluation


def test_the_training_images_are_those_that_the_checkpoint_tells(folder, tmp_path):
    """Not those that lie at the path today, and whatever their path was."""

    def changed(name, change):
        shutil.copytree(folder / "hard", tmp_path / name)
        state = checkpoint.load(tmp_path / name)
        change(state)
        checkpoint.save(tmp_path / name, state)
        return tmp_path / name

    moved = changed(
        "moved", lambda state: state["options"]["data"].update(train=str(tmp_path / "gone.beton"))
    )
    overwritten = changed("overwritten", lambda state: state["data"].update(digest="of others"))
    first, moved, overwritten = read_runs([folder / "<b>", moved, overwritten])
    assert first.evaluation == moved.evaluation != overwritten.evaluation
    assert "of others" in cost_of(first, overwritten)


def test_without_its_checkpoint_a_run_is_not_said_to_be_unfinished(folder, tmp_path):
    shutil.copytree(folder / "hard", tmp_path / "hard")
    (tmp_path / "hard" / "checkpoint.pt").unlink()
    text = cost_of(*read_runs([tmp_path / "hard"]))
    assert "options unknown" in text and "unfinished" not in text


def test_recorded_evaluations_are_shown(folder, tmp_path):
    (run,) = read_runs([folder / "hard"])
    run = replace(run, folder=tmp_path, rows=[{**row} for row in run.rows])
    for row in run.rows:
        row.pop("knn", None)
    assert "No accuracy has been measured" in cost_of(run)
    settings = {"k": 20, "temperature": 0.07, "resolution": 32, "precision": "<float32>"}
    record = {
        "evaluation": "knn",
        "checkpoint": "",
        "epoch": 2,
        "steps": 7,
        "network": "teacher",
        "weights": "",
        "settings": settings,
    }
    add_result(
        tmp_path, {**record, "data": {"validation": {"images": 4321}}, "scores": {"top1": 0.8765}}
    )
    text = cost_of(run)
    assert all(
        fact in text
        for fact in (
            "teacher",
            "2 + 7 steps",
            "k = 20, T = 0.07; 32 px, <float32>",
            "4321",
            "87.65%",
        )
    )
    assert "No accuracy" not in text
    (tmp_path / "evaluation.json").write_text("[")
    assert "evaluation.json: not readable" in cost_of(run)


@pytest.mark.parametrize("damage", [Path.mkdir, lambda path: path.write_text("{")])
def test_a_description_that_can_not_be_read_is_unknown(tmp_path, damage):
    path = tmp_path / "a.beton"
    damage(tmp_path / "a.beton.json")
    assert describe_data(str(path)).class_names == [] and describe_data(str(path)).identity == str(
        path
    )


def test_a_disk_that_fills_leaves_the_page_that_was_there(tmp_path, monkeypatch):
    def fill(path, content):
        with open(path, "wb") as file:
            file.write(content[:1])
        raise OSError(28, "No space left on device")

    (tmp_path / "report.html").write_text("before")
    monkeypatch.setattr(write, "read_runs", lambda *_: [])
    monkeypatch.setattr(write, "compose", lambda *_: ("after", {}))
    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(UserError, match="--output: .*report.html.* No space left"):
        write_report([], tmp_path / "report.html", "cpu")
    assert (tmp_path / "report.html").read_text() == "before"


def test_accuracies_of_different_data_are_said_to_be_different(folder, tmp_path):
    convert(Embedded("val", 16, seed=1), folder / "other.beton")
    train(
        options_of(
            folder, "other", "--training.epochs=1", f"--data.validation={folder / 'other.beton'}"
        )
    )
    write_report([folder / "<b>", folder / "other"], tmp_path / "report.html", "cpu")
    text = Page((tmp_path / "report.html").read_text()).text["cost"]
    assert (
        "of different data" in text
        and str(folder / "other.beton") in text
        and "less than" not in text
    )


def test_a_folder_without_a_run_is_refused_in_a_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match=f"has no {re.escape(LOG_NAME)}"):
        write_report([tmp_path], tmp_path / "report.html")
    monkeypatch.setattr(
        sys,
        "argv",
        ["report", str(tmp_path / "nothing"), "--output", str(tmp_path / "report.html")],
    )
    with pytest.raises(SystemExit, match="^2$"):
        runpy.run_module("ffssl.report", run_name="__main__")
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "nothing: no such folder" in error
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_can_not_be_written_is_told_before_it_is_composed(
    folder, tmp_path, monkeypatch
):
    def computed(*arguments):
        raise AssertionError("the page was composed")

    monkeypatch.setattr("ffssl.report.write.compose", computed)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output: .*can't be written"):
        write_report([folder / "hard"], tmp_path / "file" / "report.html", "cpu")
    with pytest.raises(UserError, match="--output: .* is a folder; name the page"):
        write_report([folder / "hard"], tmp_path, "cpu")


def test_a_picture_that_can_not_be_written_is_an_error(folder, tmp_path, monkeypatch):
    # Composing takes seconds, and here only the writing matters.
    monkeypatch.setattr("ffssl.report.write.compose", lambda *_: ("page", {"a.png": b"picture"}))
    (tmp_path / "report_pictures" / ".a.png.partial").mkdir(parents=True)
    with pytest.raises(UserError, match="--output: .*can't be written"):
        write_report([folder / "hard"], tmp_path / "report.html", "cpu")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_complaint(folder, page, tmp_path, width):
    chromium = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if not chromium:
        pytest.skip("no chromium on this machine")
    # A page of this width in a frame, since a window is never narrower than 500 pixels; its title
    # tells what overflows.
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe src="file://{folder}/report.html" style="width: {width}px; height: 4000px; '
        'border: 0"></iframe>'
        "<script>onload = () => { const page = "
        "document.querySelector('iframe').contentDocument.documentElement;"
        "document.title = `overflow ${page.scrollWidth - page.clientWidth}, height "
        "${page.scrollHeight}` }</script>"
    )
    command = [
        chromium,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
        f"--window-size={width},4000",
        "--dump-dom",
        f"file://{frame}",
    ]
    # Files, not pipes: its helpers would keep pipes open after it has been killed, and the test
    # would wait for them for ever.
    with open(tmp_path / "dom", "w+") as dom, open(tmp_path / "messages", "w+") as messages:
        subprocess.run(command, stdout=dom, stderr=messages, timeout=600, check=True)
        dom.seek(0), messages.seek(0)
        text, complaints = dom.read(), messages.read()
    assert "CONSOLE" not in complaints, complaints
    overflow, height = map(int, re.search(r"<title>overflow (-?\d+), height (\d+)", text).groups())
    assert overflow == 0 and height > 4000
