import itertools
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.options import NETWORK, QUIET, of_method
from support.printed_tables import rows_of

from ffssl import train
from ffssl.benchmark import speedup, step, timing
from ffssl.benchmark.speedup_report import table_of
from ffssl.benchmark.timing import Stopwatch
from ffssl.config import read_options
from ffssl.cost import count_flops, count_run_step
from ffssl.errors import UserError
from ffssl.methods.base import Method
from ffssl.schedules import resolution
from ffssl.training.build import build
from ffssl.training.run_schedule import RunSchedule, StepShape
from ffssl.training.totals import StepResult

ROOT = Path(__file__).resolve().parent.parent
SMALL = [*NETWORK, *of_method("byol"), *QUIET, "--training.batch_size=16"]
HARD = ["--augment.views=4", "--hard_augment.select=hard", "--hard_augment.resolution=16"]
SPL = [
    "--training.warmup_epochs=1",
    "--resolution.schedule=spl",
    "--resolution.max=48",
    "--resolution.min=32",
    "--resolution.step=16",
    "--training.epochs=5",
]


@pytest.fixture
def configs(tmp_path):
    paths = tmp_path / "standard.yaml", tmp_path / "quick.yaml"
    paths[0].write_text("training: {epochs: 6}\nresolution: {max: 48, step: 16}\n")
    paths[1].write_text(
        "training: {epochs: 4, schedule: f1-clr, warmup_epochs: 1}\nresolution: {schedule: spl, "
        "max: 48, min: 32, step: 16}\n"
        "augment: {views: 4}\nhard_augment: {select: hard, resolution: 16}\n"
    )
    return paths


# The step


def test_the_step_is_timed_at_every_resolution_of_the_schedule(tmp_path, capsys):
    step.main([*SMALL, *HARD, *SPL, "--steps=2", "--rounds=2", f"--json={tmp_path / 'step.json'}"])
    assert (
        "byol, resnet-small, 16 images of 4 views, hard pairs at 16 px" in capsys.readouterr().out
    )
    found = json.loads((tmp_path / "step.json").read_text())
    shapes = [StepShape(row["resolution"], row["views"]) for row in found["rows"]]
    assert shapes == [StepShape(32, 4), StepShape(48, 2), StepShape(48, 4)]
    options = read_options([*SMALL, *HARD, *SPL, "--data.train=x", "--run.folder=x"])
    flops = count_flops(RunSchedule(options, 10), build(options, torch.device("cpu")))
    for row in found["rows"]:
        parts = [row[f"{part}_ms"] for part in step.PARTS]
        assert min(parts) > 0 and 0.2 < sum(parts) / row["step_ms"] < 5  # medians of few steps
        assert row["flops"] == flops[StepShape(row["resolution"], row["views"])]
        assert row["flops_per_second"] == pytest.approx(row["flops"] / row["step_ms"] * 1000)


def test_the_two_ratios_of_a_step(tmp_path, monkeypatch):
    """With times of our own: of the first step, then of two steps of training and two of the
    ceiling in turns.
    """
    times = itertools.cycle([7.0, 0.4, 0.2, 0.8, 0.5])
    monkeypatch.setattr(step, "seconds_of", lambda work, device: next(times))
    parts = {
        "selection": 30.0,
        "forward": 40.0,
        "backward": 80.0,
        "optimiser": 10.0,
        "teacher": 5.0,
    }
    monkeypatch.setattr(Stopwatch, "milliseconds", lambda watch: parts)
    step.main([*SMALL, *HARD, *SPL, "--steps=2", "--rounds=2", f"--json={tmp_path / 'step.json'}"])
    options = read_options([*SMALL, *HARD, *SPL, "--data.train=x", "--run.folder=x"])
    method = build(options, torch.device("cpu"))
    for row in json.loads((tmp_path / "step.json").read_text())["rows"]:
        assert (row["first_step_s"], row["step_ms"], row["ceiling_ms"]) == pytest.approx(
            (7, 300, 175)
        )
        shape = StepShape(row["resolution"], row["views"])
        flops = count_run_step(RunSchedule(options, 10), method, shape)
        # 0.2 s over 0.1, and 0.4 over 0.25: 1.8 in the median; more FLOPs than the ceiling's may
        # take more time
        assert row["over_ceiling"] == pytest.approx(
            1.8 * step.supervised_flops(options, row["resolution"]) / flops.total()
        )
        if shape.views == 2:
            assert row["over_equation_11"] is None
            continue
        assert row["over_equation_11"] == pytest.approx(
            (30 / flops.selection) / (135 / (flops.total() - flops.selection))
        )


def test_the_ceiling_does_the_arithmetic_of_a_supervised_step():
    options = read_options(
        [*SMALL, "--data.train=x", "--run.folder=x", "--model.backbone=resnet50"]
    )
    # 4.09 GMAC, published.
    assert step.supervised_flops(options, 224) == pytest.approx(16 * 2 * 3 * 8.18e9, rel=0.01)


def test_without_a_gpu_the_first_lines_say_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    step.main([*SMALL, "--resolutions=16", "--steps=1", "--rounds=1"])
    assert "on the CPU, there being no GPU" in capsys.readouterr().out.splitlines()[0]


def test_a_resolution_that_does_not_fit_is_named_with_what_would(monkeypatch, capsys, tmp_path):
    real = Method.forward

    def forward(self, first, *rest):
        if first.shape[0] * first.shape[-1] > 8 * 48:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, first, *rest)

    monkeypatch.setattr(Method, "forward", forward)
    step.main(
        [
            *SMALL,
            "--resolutions",
            "16",
            "48",
            "--steps=1",
            "--rounds=1",
            f"--json={tmp_path / 'step.json'}",
        ]
    )
    told = capsys.readouterr().out
    assert "48 px, 2 views: --training.batch_size: a step with 16 images of 2 views" in told
    assert "8 images fit: take --training.batch_size=8, or --training.accumulate=2" in told
    assert [
        row["resolution"] for row in json.loads((tmp_path / "step.json").read_text())["rows"]
    ] == [16]


def test_a_part_lasts_from_the_mark_before_it(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 4.0, 6.0, 10.0, 11.0, 12.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        watch.start()
        for part in ("forward", "backward", "forward"):
            watch.mark(part)
    assert watch.milliseconds() == {
        "forward": pytest.approx((2000 + 5000) / 2),
        "backward": pytest.approx((2000 + 1000) / 2),
    }


def test_the_peak_is_that_of_the_quickest_product(monkeypatch):
    seconds = iter([9.0, 0.5, *[1.0] * 8])
    monkeypatch.setattr(timing, "seconds_of", lambda work, device: next(seconds))
    assert timing.peak_flops(torch.device("cpu"), torch.float32) == 2 * 1536**3 / 0.5


# The speed-up


def test_stages_are_added_up_over_the_schedules(configs, betons, tmp_path, monkeypatch, capsys):
    """With a clock of our own, where a step takes its resolution in milliseconds, loading twice as
    long at 32 px and half as long at 48.
    """

    def time_stage(trial, stage):
        stage.times["start"].append(0.5)
        stage.times["step"].append(stage.shape.resolution / 1000)
        stage.times["loader"].append(
            stage.shape.resolution / 1000 * (2 if stage.shape.resolution == 32 else 0.5)
        )
        stage.times["together"].append(
            stage.shape.resolution / 1000 * (2 if stage.shape.resolution == 32 else 1)
        )
        stage.times["joules"].append(100.0)

    monkeypatch.setattr(speedup, "time_stage", time_stage)
    speedup.main(
        [
            "--configs",
            *map(str, configs),
            f"--data={betons['train']}",
            f"--output={tmp_path}",
            *SMALL,
            "--data.workers=3",
        ]
    )
    found = json.loads((tmp_path / "speedup.json").read_text())
    standard, quick = found["configs"]
    steps = 160 // 16
    assert standard["seconds"] == pytest.approx(6 * (0.5 + steps * 0.048))
    sides = [
        resolution(e, schedule="spl", epochs=4, warmup=1, low=32, high=48, step=16)
        for e in range(4)
    ]
    assert sorted(sides) == [32, 32, 48, 48]
    assert quick["seconds"] == pytest.approx(2 * (0.5 + steps * 0.064) + 2 * (0.5 + steps * 0.048))
    assert standard["joules"] == pytest.approx(6 * steps * 100)
    assert [(stage["resolution"], stage["views"]) for stage in quick["stages"]] == [
        (48, 2),
        (32, 4),
        (48, 4),
    ]
    by_side = {stage["resolution"]: stage for stage in quick["stages"]}
    assert [by_side[side]["bound"] for side in (32, 48)] == ["loader", "training"]
    assert [by_side[side]["cores_needed"] for side in (32, 48)] == pytest.approx([6, 1.5])
    assert by_side[32]["loader_images_per_second_per_core"] == pytest.approx(16 / 0.064 / 3)
    table = (tmp_path / "speedup.md").read_text()
    assert (
        "quick: the loader bounds the training at 32 px, where 6 cores would keep up, "
        "of which it has 3." in table
    )
    assert table.count("the loader bounds") == 1
    assert table in capsys.readouterr().out
    assert (
        f" {standard['seconds'] / quick['seconds']:.2f}x |" in table
        and f" {standard['flops'] / quick['flops']:.2f}x |" in table
    )
    assert (tmp_path / "speedup.png").read_bytes().startswith(b"\x89PNG")


def test_every_stage_is_timed_with_the_loader_and_without(configs, betons, tmp_path):
    speedup.main(
        [
            "--configs",
            *map(str, configs),
            f"--data={betons['train']}",
            f"--output={tmp_path}",
            "--rounds=1",
            "--seconds=0.1",
            *SMALL,
        ]
    )
    for config in json.loads((tmp_path / "speedup.json").read_text())["configs"]:
        for stage in config["stages"]:
            assert (
                min(
                    stage["step_ms"],
                    stage["loader_ms"],
                    stage["together_ms"],
                    stage["start_ms"],
                    stage["first_step_s"],
                )
                > 0
            )


def test_what_full_runs_took_stands_beside_the_prediction():
    stage = {
        "resolution": 32,
        "views": 2,
        "epochs": 1,
        "steps": 10,
        "batch_size": 4,
        "step_ms": 1,
        "loader_ms": 1,
        "together_ms": 1,
        "start_ms": 1,
        "first_step_s": 1,
        "bound": "training",
        "cores_needed": 1,
        "seconds": 90,
        "flops": 1e12,
        "joules": None,
    }
    configs = [
        {
            "name": name,
            "seconds": 85.0,
            "first_step_s": 5.0,
            "flops": 1e12,
            "joules": None,
            "full_seconds": full,
            "stages": [stage],
        }
        for name, full in (("a", 100.0), ("b", 80.0))
    ]
    table = table_of({"machine": "m", "device": "cpu", "images": 40, "configs": configs})
    assert [" ".join(row) for row in rows_of(table)[-2:]] == [
        "a 85 1.00x 1 1.00x – – 100 -10.0% 1.00x",
        "b 85 1.00x 1 1.00x – – 80 +12.5% 1.25x",
    ]


def test_the_prediction_is_what_full_runs_take(configs, betons, tmp_path, monkeypatch):
    """By a clock of our own: a step lasts as long as its resolution says, and reading it 0.1 ms."""
    now = 0.0

    def perf_counter():
        nonlocal now
        now += 0.0001
        return now

    def paced(run, views, step, labels=None):
        nonlocal now
        now += views.shape[-1] / 1000
        return StepResult(torch.ones(()), torch.ones(()), torch.ones(len(views), 2), None)

    def train_here(words, env):
        train.train(read_options(words[3:]))
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr("time.perf_counter", perf_counter)
    monkeypatch.setattr(speedup, "train_step", paced)
    monkeypatch.setattr(train, "train_step", paced)
    monkeypatch.setattr(speedup, "subprocess", SimpleNamespace(run=train_here))
    speedup.main(
        [
            "--configs",
            *map(str, configs),
            f"--data={betons['train']}",
            f"--output={tmp_path}",
            "--full",
            "--rounds=1",
            *SMALL,
        ]
    )
    standard, quick = json.loads((tmp_path / "speedup.json").read_text())["configs"]
    for config, of_steps in ((standard, 6 * 10 * 0.048), (quick, 2 * 10 * (0.048 + 0.032))):
        assert config["full_seconds"] == pytest.approx(of_steps, rel=0.05)
        assert config["seconds"] == pytest.approx(config["full_seconds"], rel=0.02)


def test_before_full_runs_each_config_compiles_with_caches_of_its_own(
    configs, betons, tmp_path, monkeypatch
):
    """As each full run does: what one has compiled the other does not find."""
    variables = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_CACHE_DIR", "the user's")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    used = defaultdict(set)

    def train_step(run, views, number):
        caches = tuple(map(os.environ.get, variables))
        if caches not in used[id(run)]:
            assert not list(Path(caches[0]).iterdir())
            (Path(caches[0]) / "compiled").touch()
        used[id(run)].add(caches)

    def run_training(words, env):
        full.append([env[name] for name in variables])
        assert not any(map(os.path.exists, full[-1]))
        return subprocess.CompletedProcess(words, 0)

    def time_stage(trial, stage):
        assert tuple(map(os.environ.get, variables)) == (None, "the user's")
        for kind in ("start", "step", "loader", "together"):
            stage.times[kind].append(1.0)

    full = []
    monkeypatch.setattr(speedup, "train_step", train_step)
    monkeypatch.setattr(speedup, "time_stage", time_stage)
    monkeypatch.setattr(speedup, "subprocess", SimpleNamespace(run=run_training))
    monkeypatch.setattr(speedup, "read_log", lambda folder: [{"seconds": 1.0}])
    speedup.main(
        [
            "--configs",
            *map(str, configs),
            f"--data={betons['train']}",
            f"--output={tmp_path}",
            "--full",
            "--rounds=1",
            *SMALL,
        ]
    )
    (first,), (second,) = used.values()
    assert len({*first, *second, *full[0], *full[1], "the user's"}) == 9


def test_without_data_and_photographs_drawings_are_taken_and_told(
    configs, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "skimage", None)  # as if it were not installed
    monkeypatch.setattr(
        speedup,
        "time_stage",
        lambda trial, stage: [
            stage.times[kind].append(1.0) for kind in ("start", "step", "loader", "together")
        ],
    )
    speedup.main(["--configs", *map(str, configs), f"--output={tmp_path}", "--rounds=1", *SMALL])
    assert (
        "16 JPEG images drawn, since there is no scikit-image to cut photographs from, median "
        "500x375 and" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (["--full"], "--full: trains on all images of --data FILE"),
        (["--images=7"], "--images: 7 are fewer than standard's --training.batch_size=16"),
        (["--images=many"], "--images: expected a number"),
        (
            ["--training.batchsize=4"],
            "--training.batchsize: unknown option; did you mean training.batch_size?",
        ),
        (["--rounds=0"], "argument --rounds: expected an integer of 1 or more, got '0'"),
    ],
)
def test_mistakes_are_named(configs, betons, words, message, tmp_path):
    data = [] if "--full" in words else [f"--data={betons['train']}"]
    with pytest.raises(UserError, match=message.split("?")[0]):
        speedup.main(
            ["--configs", *map(str, configs), *data, f"--output={tmp_path}", *SMALL, *words]
        )


def test_configs_of_one_name_are_refused(configs):
    with pytest.raises(UserError, match="do not all have names of their own"):
        speedup.main(["--configs", str(configs[0]), str(configs[0])])


def test_benchmarks_are_listed_and_unknown_ones_named():
    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "ffssl.benchmark", *words],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )

    assert all(name in run("--help").stdout for name in ("loader", "step", "speedup"))
    wrong = run("sped")
    assert wrong.returncode == 2 and wrong.stderr.startswith(
        "error: 'sped': unknown benchmark; did you mean speedup? (known: loader, step, "
        "agreement, speedup)"
    )
