import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
import yaml

from ffssl.config import read_options
from ffssl.config.command_line import exit_status
from ffssl.errors import UserError
from ffssl.files import exclusive_folder
from ffssl.run_folder.log import NAME as LOG_NAME
from ffssl.run_folder.log import read_log
from ffssl.study import __main__ as program
from ffssl.study.__main__ import check_unchanged, comparable, finished, write_record
from ffssl.study.recipes import Run, read_study
from ffssl.study.table_and_picture import (
    draw,
    first_reached,
    format_table,
    mean_curve,
    summarise,
    write_report,
)

ROOT = Path(__file__).resolve().parents[2]
TOY = {
    "title": "Toy",
    "embedded": {"train": 100, "validation": 20},
    "seeds": [0, 1],
    "options": {
        "model": {"backbone": "resnet-small"},
        "method": {"name": "simclr", "hidden": 32, "projection": 16},
        "resolution": {"max": 32, "min": 16, "step": 16},
        "training": {"epochs": 2, "batch_size": 32},
        "evaluate": {"k": 5, "every": 1},
        "run": {"tensorboard": False, "device": "cpu"},
    },
    "runs": {
        "baseline": None,
        "small": {"against": "baseline", "options": {"resolution": {"schedule": "progressive"}}},
    },
}


def write(folder: Path, **changes) -> Path:
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(TOY | changes, sort_keys=False))
    return path


def start(path: Path, folder: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "ffssl.study", str(path), "--folder", str(folder), *words]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


class InThisProcess:
    """In place of subprocess.Popen, runs a Python program here: to import torch takes a process of
    its own longer than its training.
    """

    def __init__(self, command: list[str], **_):
        self.words = command[1:]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait(self) -> int:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "argv", self.words)
            runpy.run_path(self.words[0], run_name="__main__")
        return end.value.code


def conduct(path: Path, folder: Path, *words: str) -> tuple[int, str, str]:
    """Conduct a study, and all that it runs, in this process: status, standard output, standard
    error.
    """
    on_termination = signal.getsignal(signal.SIGTERM)
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(StringIO()) as out,
        redirect_stderr(StringIO()) as err,
    ):
        patch.setattr(sys, "argv", ["study", str(path), "--folder", str(folder), *words])
        patch.setattr(program, "subprocess", SimpleNamespace(Popen=InThisProcess))
        status = exit_status(program.main)
    signal.signal(signal.SIGTERM, on_termination)
    return status, out.getvalue(), err.getvalue()


def changed_at(folder: Path) -> dict[Path, int]:
    return {log: log.stat().st_mtime_ns for log in sorted(folder.rglob(LOG_NAME))}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> SimpleNamespace:
    """A study that has been conducted once.

    Other tests go on in its folder, so its table is kept here.
    """
    folder = tmp_path_factory.mktemp("toy")
    path = write(folder)
    status, out, err = conduct(path, folder / "study")
    assert status == 0, err
    tables = {name: (folder / "study" / name).read_text() for name in ("table.md", "table.json")}
    return SimpleNamespace(path=path, folder=folder / "study", out=out, tables=tables)


def test_study_trains_every_run_with_every_seed_and_shows_the_commands(toy):
    for seed, run in (
        (seed, run) for seed in (0, 1) for run in read_study(toy.path, toy.folder, []).runs
    ):
        assert [row["epoch"] for row in read_log(run.folder(toy.folder, seed))] == [0, 1, 2]
        assert f"--run.folder={run.folder(toy.folder, seed)} --run.seed={seed}" in toy.out
        assert finished(run.folder(toy.folder, seed))
    assert toy.out.count("$ ffssl train ") == 4 and toy.out.count("$ ffssl convert ") == 2


def test_table_states_the_results_and_their_provenance(toy):
    finals = {
        name: [read_log(toy.folder / f"seed{seed}" / name)[-1] for seed in (0, 1)]
        for name in ("baseline", "small")
    }
    rows = json.loads(toy.tables["table.json"])["runs"]
    for row in rows:
        for key in ("knn", "flops", "seconds"):
            a, b = (final[key] for final in finals[row["run"]])
            assert row[key] == pytest.approx((a + b) / 2)
            # Of a sample of two.
            assert row[f"{key}_sd"] == pytest.approx(abs(a - b) / math.sqrt(2), abs=1e-12)
    assert rows[1]["speed_up_flops"] == pytest.approx(
        finals["baseline"][0]["flops"] / finals["small"][0]["flops"]
    )
    assert rows[1]["speed_up_flops"] > 1.3
    table = toy.tables["table.md"]
    assert table.startswith("# Toy\n") and f"ffssl study {toy.path} --folder {toy.folder}" in table
    for part in (
        "cores; Python",
        "torch",
        "; on cpu",
        "seeds: 0, 1",
        "100 from Embedded, sha256",
        "k = 5, T = 0.1",
    ):
        assert part in table
    assert all(line in table for line in toy.out.splitlines() if line.startswith("|"))
    with PIL.Image.open(toy.folder / "picture.png") as picture:
        assert min(picture.size) > 600
    assert not list(toy.folder.rglob("*partial*"))


def test_what_has_finished_is_not_run_again(toy):
    before = changed_at(toy.folder)
    status, out, _ = conduct(toy.path, toy.folder)
    assert (status, changed_at(toy.folder)) == (0, before) and "$ ffssl" not in out


def test_changed_options_of_a_started_run_are_refused_by_name_before_anything_runs(toy):
    before = changed_at(toy.folder)
    status, out, err = conduct(toy.path, toy.folder, "--training.epochs=3")
    assert (status, out) == (2, "")
    assert re.search(
        (
            r"^error: .*toy.yaml: run baseline: training.epochs is 3, .* started with 2; "
            r".*delete .*/seed\*/baseline"
        ),
        err,
    )
    assert err.count("\n") == 1 and changed_at(toy.folder) == before


def test_other_images_under_the_same_name_are_refused_before_anything_runs(toy):
    train = toy.folder / "data" / "train-100.beton"
    before = {path: path.read_bytes() for path in (train, Path(f"{train}.json"))}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()):
        patch.setattr(
            sys,
            "argv",
            ["write", *f"embedded --split val --size 100 --output {train} --overwrite".split()],
        )
        assert runpy.run_path(str(ROOT / "write_datasets.py"))["main"]() == 0
    status, out, err = conduct(toy.path, toy.folder)
    assert (
        (status, out) == (2, "")
        and f"{train} holds other images than those that the run in {toy.folder}/seed0/baseline"
        in err
    )
    for path, content in before.items():
        path.write_bytes(content)


def test_an_ended_study_goes_on_where_it_stopped(toy, tmp_path):
    long = {"against": "baseline", "options": {"training": {"epochs": 16}}}
    path, before = (
        write(tmp_path, runs=TOY["runs"] | {"long": long}, seeds=[0]),
        changed_at(toy.folder),
    )
    folder = toy.folder / "seed0" / "long"
    done: list[dict] = []
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = start(path, toy.folder)
        while len(read_log(folder)) < len(done) + 4:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=600)
        assert process.returncode == status and "Traceback" not in err
        assert ("the same command goes on where it stopped" in err) == (number == signal.SIGINT)
        assert read_log(folder)[: len(done)] == done  # seconds too: these epochs were not run again
        done = read_log(folder)[:-1]  # the checkpoint of the last may not have been written
    assert conduct(path, toy.folder)[0] == 0
    assert read_log(folder)[: len(done)] == done and [
        row["epoch"] for row in read_log(folder)
    ] == list(range(17))
    assert {log: time for log, time in changed_at(toy.folder).items() if log in before} == before


def test_a_failed_run_is_marked_the_others_go_on_and_it_is_tried_again(toy, tmp_path):
    diverging = {"options": {"training": {"learning_rate": 1e30, "momentum": 0}}}
    path = write(
        tmp_path, seeds=[0], runs={"diverging": diverging, "baseline": {"against": "diverging"}}
    )
    for _ in range(2):
        status, out, err = conduct(path, toy.folder)
        assert status == 1 and out.count("$ ffssl train ") == 1 and "[1 of 2] diverging" in out
        assert (
            "not finite" in err
            and "diverging, seed 0: failed with status 1; the others go on" in err
        )
    assert re.search(r"\| diverging +\| +0 of 1, seed 0 failed \(status 1\) +\| +- ", out)
    assert re.search(r"\| baseline +\| +1 +\| +\d+\.\d +\|", out)


def test_a_second_study_in_the_same_folder_is_refused(toy):
    with exclusive_folder(toy.folder, "study", "--folder"):
        status, out, err = conduct(toy.path, toy.folder)
    assert (status, out) == (2, "") and err.startswith(
        f"error: --folder: a study is under way in {toy.folder} already"
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"runs": {"a": {"options": {"training": {"epoch": 3}}}}},
            "run a: --training.epoch: unknown option; did you mean training.epochs?",
        ),
        (
            {"runs": {"a": {"options": {"training": {"epochs": "many"}}}}},
            "run a: --training.epochs: expected an integer",
        ),
        (
            {"runs": {"a": {"options": {"training": 3}}}},
            "run a: training: expected names with values",
        ),
        (
            {"runs": {"a": {"options": {"training": {"epochs": [3, 4]}}}}},
            "run a: training.epochs: expected one value",
        ),
        (
            {"runs": {"a": {"config": "missing.yaml"}}},
            "run a: .*missing.yaml: the config can't be read",
        ),
        ({"runs": {"a": {"option": {}}}}, "run a: unknown key 'option'; did you mean options?"),
        ({"runs": {"a": {"options": {"run": {"seed": 3}}}}}, "run a: run.seed is set by the study"),
        (
            {"runs": {"a": None, "b": {"options": {"training": {"epochs": "2"}}}}},
            "run b has the same options as run a",
        ),
        (
            {"runs": {"a": None, "b": {"against": "c"}}},
            "run b: against must name another run of the study, got 'c'; there are a, b",
        ),
        ({"runs": {"a": {"against": "a"}}}, "run a: against must name another run"),
        ({"runs": {"../a": None}}, "'../a' can't name a folder"),
        ({"runs": None}, "the study holds no runs"),
        ({"runs": ["a", "b"]}, "runs: expected names with values"),
        (
            {"groups": {"g": {"runs": {"small-er": {}}}}},
            "group g: runs: unknown key 'small-er'; did you mean small?",
        ),
        (
            {"groups": {"g": {"options": {"method": {"names": "byol"}}}}},
            "run g/baseline: --method.names: unknown option",
        ),
        (
            {"groups": {"g": {"leave_out": ["small-er"]}}},
            "group g: leave_out must be a list of runs, of .*; got .'small-er'.",
        ),
        ({"groups": {"g": {"leave_out": "small"}}}, "group g: leave_out must be a list of runs"),
        (
            {"groups": {"g": {"leave_out": ["baseline"]}}},
            "group g: leave_out: baseline is what small is compared with",
        ),
        ({"run": {}}, "unknown key 'run'; did you mean runs?"),
        ({"seeds": []}, "seeds must be a list"),
        ({"seeds": [0, -1]}, "seeds must be a list of integers of 0 or more"),
        ({"seeds": [0, 1, 0]}, "seeds: one is there twice"),
        ({"embedded": None}, "no train images; give data"),
        (
            {"embedded": None, "data": {"train": "a.beton", "validation": "b.beton"}},
            "data.train: a.beton not found; make it with",
        ),
        ({"embedded": {"train": 100}}, "no validation images"),
        (
            {"embedded": {"train": "all", "validation": 20}},
            "train must be a number of images, got 'all'",
        ),
        ({"embedded": None, "data": {"train": [["a.beton"]]}}, "data.train: expected one value"),
        (
            {"embedded": None, "data": {"train": "none-*.beton", "validation": "b.beton"}},
            "data.train: none-.*.beton: no file matches this pattern",
        ),
        (
            {"embedded": None, "data": {"train": ["b.beton", "a.beton"], "validation": "b.beton"}},
            "data.train: b.beton: cannot be read",
        ),
        ({"config": {"training": {}}}, "run baseline: config: expected one value"),
        ({"runs": {"a": {"against": ["b"]}}}, "run a: against must name another run"),
        ({"data": {"train": "a.beton"}}, "give either data or embedded"),
    ],
)
def test_mistakes_in_a_study_are_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=f"toy.yaml: .*{message}"):
        read_study(write(tmp_path, **changes), tmp_path / "study", [])


@pytest.mark.parametrize(
    "text, message",
    [
        ("runs: {a: , b: }\nseeds: [0]\nruns: {c: }", "toy.yaml, line 3: runs is there already"),
        (
            (
                "runs:\n  a: {options: {training: {epochs: 1}}}\n  a: {options: {training: "
                "{epochs: 2}}}"
            ),
            "line 3: a is there already",
        ),
        ("runs: [", "not a YAML file"),
        ("", "holds no runs|no train images"),
        ("- runs", "expected names with values"),
    ],
)
def test_a_file_that_is_no_study_is_named(tmp_path, text, message):
    (tmp_path / "toy.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_study(tmp_path / "toy.yaml", tmp_path / "study", [])
    with pytest.raises(UserError, match="gone.yaml: the study can't be read"):
        read_study(tmp_path / "gone.yaml", tmp_path / "study", [])


def test_a_study_takes_several_files_as_one_set_and_compares_them_by_their_places(tmp_path):
    for name in ("part-9.beton", "part-10.beton", "val.beton"):
        (tmp_path / name).touch()
    parts = [str(tmp_path / f"part-{k}.beton") for k in (9, 10)]
    compared = []
    for train in (str(tmp_path / "part-*.beton"), parts):
        data = {"train": train, "validation": str(tmp_path / "val.beton")}
        study = read_study(write(tmp_path, embedded=None, data=data), tmp_path / "study", [])
        command = study.runs[0].command(tmp_path / "study", 0)
        compared.append(comparable(read_options(command))["data"]["train"])
    assert compared == 2 * [",".join(parts)]


@pytest.mark.parametrize(
    "word, message",
    [
        ("--training.epoch=3", "run baseline: --training.epoch: unknown option"),
        ("training.epochs=3", "expected --section.option=value"),
        ("--training.epochs", "expected --section.option=value"),
        ("--run.seed=3", "run.seed is set by the study"),
        ("--data.train=gone.beton", "gone.beton not found"),
    ],
)
def test_mistyped_overrides_are_named(tmp_path, word, message):
    with pytest.raises(UserError, match=message):
        read_study(write(tmp_path), tmp_path / "study", [word])


def test_options_come_from_the_nearest_place(tmp_path):
    (tmp_path / "common.yaml").write_text(
        "training: {epochs: 1, learning_rate: 1, momentum: 0.1, weight_decay: 0.1, "
        "batch_size: 16, amp: off}"
    )
    path = write(
        tmp_path,
        config="common.yaml",
        options={
            "training": {"epochs": 2, "learning_rate": 2, "momentum": 0.2, "weight_decay": 0.2}
        },
        runs={
            "a": {"options": {"training": {"epochs": 3, "learning_rate": 3, "momentum": 0.3}}},
            "b": {"against": "a"},
        },
        groups={
            "g": {
                "options": {"training": {"epochs": 4, "learning_rate": 4}},
                "runs": {"a": {"training": {"epochs": 5}}},
            },
            "h": None,
        },
    )
    runs = {run.name: run for run in read_study(path, tmp_path, ["--model.backbone=resnet18"]).runs}
    assert {name: (run.group, run.against) for name, run in runs.items()} == {
        "g/a": ("g", None),
        "g/b": ("g", "g/a"),
        "h/a": ("h", None),
        "h/b": ("h", "h/a"),
    }
    options = read_options(runs["g/a"].command(tmp_path, 7))
    t = options.training
    assert (t.epochs, t.learning_rate, t.momentum, t.weight_decay, t.batch_size, t.amp) == (
        5,
        4,
        0.3,
        0.2,
        16,
        "off",
    )
    assert (options.model.backbone, options.run.seed, options.run.folder) == (
        "resnet18",
        7,
        str(tmp_path / "seed7" / "g" / "a"),
    )
    assert read_options(runs["h/b"].command(tmp_path, 0)).training.epochs == 2
    assert {read_options(run.command(tmp_path, 0)).data.train for run in runs.values()} == {
        str(tmp_path / "data" / "train-100.beton")
    }


def test_a_group_leaves_runs_out(tmp_path):
    path = write(
        tmp_path,
        runs={"a": None, "b": {"against": "a", "options": {"model": {"backbone": "resnet18"}}}},
        groups={"g": {"leave_out": ["b"]}, "h": {"options": {"training": {"batch_size": 4}}}},
    )
    assert [run.name for run in read_study(path, tmp_path, []).runs] == ["g/a", "h/a", "h/b"]


def test_threads_and_places_may_change_between_two_calls(tmp_path):
    study = read_study(write(tmp_path), tmp_path, [])
    run = study.runs[0]
    write_record(
        run.folder(tmp_path, 0), {"options": comparable(read_options(run.command(tmp_path, 0)))}
    )
    for word in ("--data.workers=1", "--run.device=cuda"):
        changed = read_study(study.path, tmp_path, [word])
        check_unchanged(changed, changed.runs[0], 0, tmp_path, {})
    for word, message in (
        ("--evaluate.k=6", "evaluate.k is 6, .* started with 5"),
        ("--data.label_field=class", "data.label_field is class, .* started with None"),
    ):
        changed = read_study(study.path, tmp_path, [word])
        with pytest.raises(UserError, match=message):
            check_unchanged(changed, changed.runs[0], 0, tmp_path, {})


def log(*accuracies: float, cost: float) -> list[dict]:
    """The log of a run that is evaluated after each epoch, each of `cost` FLOPs and of twice as
    many seconds.
    """
    return [
        {"epoch": e, "flops": e * cost, "seconds": 2 * e * cost, "knn": accuracy}
        for e, accuracy in enumerate(accuracies)
    ]


RUNS = [
    Run(name, None, None if name == "base" else "base", [])
    for name in ("base", "quick", "lucky", "poor", "absent")
]
LOGS = {
    # 0.4, 0.75 and, in the end, 0.7 on average.
    "base": {0: log(0.9, 0.2, 0.5, 0.7, 0.8, cost=10), 1: log(0.1, 0.2, 0.3, 0.8, 0.6, cost=10)},
    # 0.65, then 0.75 twice.
    "quick": {0: log(0.9, 0.5, 0.9, 0.8, cost=5), 1: log(0.9, 0.8, 0.6, 0.7, cost=5)},
    # 0.65, then 0.75, then 0.6.
    "lucky": {0: log(0.9, 0.5, 0.9, 0.6, cost=5), 1: log(0.9, 0.8, 0.6, 0.6, cost=5)},
    "poor": {0: log(0.1, 0.2, 0.3, cost=5)},
    "absent": {},
}


def test_speed_up_to_the_baselines_accuracy_is_read_off_the_mean_curve():
    base, quick, lucky, poor, absent = summarise(RUNS, LOGS)
    assert base["knn"] == pytest.approx(0.7) and base["knn_sd"] == pytest.approx(0.1 * math.sqrt(2))
    assert quick["speed_up_flops"] == quick["speed_up_seconds"] == pytest.approx(40 / 15)
    assert (
        quick["speed_up_to_accuracy_flops"]
        == quick["speed_up_to_accuracy_seconds"]
        == pytest.approx(30 / 10)
    )
    assert (
        lucky["speed_up_to_accuracy_flops"] is None
        and lucky["speed_up_flops"] == quick["speed_up_flops"]
    )
    assert base["speed_up_to_accuracy_flops"] == 1
    assert (
        poor["speed_up_to_accuracy_flops"] is None
        and poor["knn_sd"] is None
        and poor["speed_up_flops"] == 4
    )
    assert absent["knn"] is None and absent["speed_up_flops"] is None
    table = format_table(
        [
            row | {"failed": failed}
            for row, failed in ((quick, {}), (poor, {1: 2}), (absent, {0: -9}))
        ],
        2,
    )
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert lines[0][:3] == ["quick", "2", "75.0 ± 7.1"] and lines[0][-2:] == ["3.00x", "3.00x"]
    assert lines[1][:3] == ["poor", "1 of 2, seed 1 failed (status 2)", "30.0"] and lines[1][
        -2:
    ] == ["-", "-"]
    assert lines[2] == ["absent", "0 of 2, seed 0 failed (signal 9)", *["-"] * 7]


def test_the_linear_classifiers_accuracies_are_in_the_table_where_runs_have_them():
    logs = {
        name: {
            seed: [*rows[:-1], rows[-1] | {"linear_top1": 0.5 + seed / 5, "linear_top5": 0.9}]
            for seed, rows in by_seed.items()
            if name != "poor"
        }
        for name, by_seed in LOGS.items()
    }
    rows = summarise(RUNS, logs | {"poor": LOGS["poor"]})
    assert rows[0]["linear_top1_by_seed"] == [0.5, 0.7] and rows[3]["linear_top1"] is None
    table = format_table([row | {"failed": {}} for row in rows], 2).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert cells[0][2:5] == ["kNN (%)", "linear (%)", "top-5 (%)"]
    assert cells[2][3:5] == ["60.0 ± 14.1", "90.0 ± 0.0"] and cells[5][3:5] == ["-", "-"]
    without = format_table([row | {"failed": {}} for row in summarise(RUNS, LOGS)], 2)
    assert "linear" not in without


def test_an_untrained_network_reaches_nothing():
    assert first_reached(mean_curve({0: log(0.9, 0.1, cost=1)}), 0.5) is None
    assert mean_curve({}) == []


def test_what_is_not_known_of_a_study_has_no_line(tmp_path):
    study = read_study(write(tmp_path), tmp_path, [])
    write_report(study, tmp_path, {}, {}, command="ffssl study toy.yaml")
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert "- seeds: 0, 1" in lines
    assert not [line for line in lines if line.startswith("- ") and line.endswith(": ")]


def test_picture_of_an_unfinished_study_is_drawn(tmp_path):
    study = read_study(write(tmp_path), tmp_path, [])
    for logs in (LOGS, dict.fromkeys(LOGS, {})):
        study.runs[:] = RUNS
        draw(study, summarise(RUNS, logs), logs, tmp_path / "picture.png")
        with PIL.Image.open(tmp_path / "picture.png") as picture:
            colours = picture.convert("RGB").getcolors(1 << 24)
        drawn = {(0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)} & {colour for _, colour in colours}
        # The marks of quick and poor, in their colours.
        assert len(drawn) == (2 if logs is LOGS else 0)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "rn50_configs" / "studies").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_study_reads(path, tmp_path):
    data = [tmp_path / f"{split}.beton" for split in ("train", "validation")]
    for file in data:
        file.touch()
    study = read_study(path, tmp_path, [f"--data.{file.stem}={file}" for file in data])
    assert {run.against for run in study.runs} - {None} <= {run.name for run in study.runs}
