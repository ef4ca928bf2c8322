import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.options import SMALL

from ffssl import lr_range
from ffssl.config import read_options
from ffssl.config.command_line import exit_status
from ffssl.data.convert.conversion import convert
from ffssl.data.convert.sources.embedded import Embedded
from ffssl.errors import UserError
from ffssl.lr_range import (
    Sweep,
    held_out,
    range_test,
    suggest_limits,
    validation_loss,
    validation_views,
)
from ffssl.methods.base import Method
from ffssl.training.build import build
from ffssl.training.loader import open_loader
from ffssl.training.run import start_run
from ffssl.training.step import train_step

TOY = [*SMALL, "--method.name=simsiam", "--resolution.max=16"]
RATES = np.geomspace(1e-3, 1, 200)


@pytest.fixture(scope="module")
def beton(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("beton") / "train.beton"
    convert(Embedded("train", 80), path)
    return path


def options_of(beton, *words):
    return read_options([*TOY, f"--data.train={beton}", *words], defaults={"run.folder": "unused"})


def curve(*, falls=(0.01, 0.1), rises=0.5, depth=1.0, noise=0.0, seed=0):
    """A loss that falls linearly in the logarithm of the rate between two rates, stays, and rises
    steeply from a third.
    """
    x = np.log10(RATES)
    start, end = np.log10(falls)
    loss = (
        5
        - depth * np.clip((x - start) / (end - start), 0, 1)
        + np.clip(30 * (x - np.log10(rises)), 0, None)
    )
    return loss + noise * np.random.default_rng(seed).standard_normal(len(x))


def test_limits_are_a_tenth_and_nine_tenths_of_the_fall():
    limits = suggest_limits(RATES, curve())
    assert limits.low == pytest.approx(10**-1.9, rel=0.04) and limits.high == pytest.approx(
        10**-1.1, rel=0.04
    )
    assert limits.rises


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("depth, noise", [(1, 0.05), (1, 0.1), (0.02, 0.001)])
def test_noise_moves_the_limits_little(depth, noise, seed):
    limits = suggest_limits(RATES, curve(depth=depth, noise=noise, seed=seed))
    assert abs(math.log10(limits.low) + 1.9) < 0.2 and abs(math.log10(limits.high) + 1.1) < 0.2


def test_outliers_and_a_divergence_do_not_move_the_limits():
    losses = curve()
    losses[[20, 60, 110, 150]] += [-3, 4, -5, 1e6]
    losses[-10:] = 1e12
    assert suggest_limits(RATES, losses) == suggest_limits(RATES, curve())


def test_a_rise_before_the_fall_does_not_count():
    losses = curve() - 0.5 * np.clip(1 - np.arange(200) / 30, 0, 1)
    assert suggest_limits(RATES, losses) == suggest_limits(RATES, curve())


def test_whether_the_loss_rises_again_is_said():
    assert not suggest_limits(RATES, curve(rises=10)).rises
    assert suggest_limits(RATES, curve(rises=10), complete=False).rises


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_gives_no_limits(seed):
    noise = np.random.default_rng(seed).standard_normal(200)
    assert suggest_limits(RATES, noise) is None
    assert suggest_limits(RATES, np.linspace(0, 5, 200) + noise) is None


def test_constant_or_hardly_any_losses_give_no_limits():
    assert suggest_limits(RATES, np.ones(200)) is None
    assert suggest_limits(RATES[:2], np.array([2.0, 1.0])) is None
    assert suggest_limits(RATES[:0], np.array([])) is None


def test_the_learning_rate_rises_exponentially_at_the_configs_momentum(beton):
    schedule = Sweep(
        options_of(
            beton, "--training.momentum=0.8", "--training.schedule=f1-clr", "--training.epochs=1"
        ),
        5,
        1e-3,
        1.0,
        200,
    )
    rates, momenta = zip(*(schedule.learning_rate_and_momentum(step) for step in range(200)))
    assert rates == pytest.approx(RATES) and set(momenta) == {0.8}
    # The paper: "close to step 135 and learning rate .1".
    assert rates[135] == pytest.approx(0.1, rel=0.1)
    assert schedule.total_steps == 200


def start(options, loader):
    device = torch.device("cpu")
    torch.manual_seed(0)
    return start_run(
        options, build(options, device), Sweep(options, len(loader), 1e-3, 1.0, 10), device
    )


@pytest.mark.parametrize(
    "method",
    [
        "simsiam",
        "byol",
        "mocov2plus --method.queue=64",
        "dino --method.prototypes=32",
        "barlow_twins",
    ],
)
def test_validating_leaves_no_trace_and_always_finds_the_same(beton, method):
    name, *more = method.split()
    options = options_of(
        beton, f"--method.name={name}", *more, "--hard_augment.select=hard", "--augment.views=3"
    )
    with open_loader(options) as loader:
        run = start(options, loader)
        validation = validation_views(options, run.method, loader, 32)
        assert [tuple(views.shape) for views in validation] == [(16, 2, 3, 16, 16)] * 2
        before, random_state = (
            {key: value.clone() for key, value in run.method.state_dict().items()},
            torch.get_rng_state(),
        )
        losses = [validation_loss(run, validation) for _ in range(2)]
        assert losses[0] == losses[1] and math.isfinite(losses[0])
        assert torch.equal(torch.get_rng_state(), random_state) and run.method.training
        assert all(
            torch.equal(before[key], value) for key, value in run.method.state_dict().items()
        )
        assert all(parameter.grad is None for parameter in run.method.parameters())
        for step, (views, _, _) in enumerate(loader):
            train_step(run, views, step)
        assert validation_loss(run, validation) != losses[0]


def test_the_validation_loss_is_of_parts_as_large_as_those_trained_on(beton):
    options = options_of(beton, "--training.accumulate=2")
    with open_loader(options) as loader:
        run = start(options, loader)
        validation = validation_views(options, run.method, loader, 16)
        by_parts = validation_loss(run, validation)
        run.options = options.changed(training={"accumulate": 1})
        assert (
            by_parts
            == validation_loss(run, [half for views in validation for half in views.chunk(2)])
            != validation_loss(run, validation)
        )


def test_validation_images_are_not_trained_on(beton):
    options = options_of(beton)
    with open_loader(options) as loader:
        validation, training = held_out(loader, 32, seed=0)
        assert len(validation) == 32 and sorted([*validation, *training]) == list(range(80))
        validation_views(options, build(options, torch.device("cpu")), loader, 32)
        assert list(loader.samples) == list(training)
        assert {int(i) for _, _, indices in loader for i in indices} <= {*training}
        with pytest.raises(
            UserError, match="of 48 images, 48 can't be held out and batches of 16 be trained on"
        ):
            held_out(loader, 48, seed=0)


def test_training_is_that_of_a_run_at_those_learning_rates(beton):
    """Neither the validation nor the sweep changes what the steps do: the same steps by hand give
    the same losses.
    """
    options = options_of(
        beton,
        "--method.name=simsiam",
        "--method.predictor=8",
        f"--data.validation={beton}",
        "--method.constant_predictor_lr=true",
    )
    rows = range_test(options, low=1e-3, high=1.0, steps=12, images=1)
    with open_loader(options) as loader:
        run = start(options, loader)
        losses = []
        for epoch in range(3):
            loader.set_epoch(epoch)
            for views, _, _ in loader:
                if len(losses) < 12:
                    for group in run.optimizer.param_groups:
                        group["constant_lr"] = False
                    run.schedule = Sweep(options, len(loader), 1e-3, 1.0, 12)
                    losses.append(train_step(run, views, len(losses))[0].item())
    assert [row["training_loss"] for row in rows] == losses
    assert [row["learning_rate"] for row in rows] == pytest.approx(np.geomspace(1e-3, 1, 12))


def program(monkeypatch, beton, folder, *words):
    monkeypatch.setattr(
        "sys.argv", ["lr_range", *TOY, f"--data.train={beton}", f"--run.folder={folder}", *words]
    )
    return exit_status(lr_range.main)


def test_a_loss_that_is_not_finite_ends_the_sweep(beton, tmp_path, monkeypatch, capsys):
    status = program(
        monkeypatch, beton, tmp_path, "--high=1e30", "--steps=20", "--training.momentum=0"
    )
    found = json.loads((tmp_path / lr_range.CURVE).read_text())
    assert status == 0 and 1 < len(found["curve"]) < 20
    assert all(
        math.isfinite(row["training_loss"]) and math.isfinite(row["validation_loss"])
        for row in found["curve"]
    )
    assert f"the loss was not finite at step {len(found['curve'])} of 20" in capsys.readouterr().out


def test_the_program_leaves_a_curve_and_a_picture_and_no_run(beton, tmp_path, monkeypatch, capsys):
    assert program(monkeypatch, beton, tmp_path / "range", "--steps=20") == 0
    assert sorted(path.name for path in (tmp_path / "range").iterdir()) == [
        lr_range.CURVE,
        lr_range.PICTURE,
    ]
    found = json.loads((tmp_path / "range" / lr_range.CURVE).read_text())
    assert len(found["curve"]) == 20 and found["options"]["training"]["batch_size"] == 16
    assert (tmp_path / "range" / lr_range.PICTURE).stat().st_size > 10_000
    assert "the validation loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, wanted", [(["--validation-images=100"], 96), (["--training.batch_size=20"], 20)]
)
def test_too_few_validation_images_are_told(beton, tmp_path, monkeypatch, capsys, words, wanted):
    convert(Embedded("val", 18), tmp_path / "val.beton")
    assert (
        program(
            monkeypatch,
            beton,
            tmp_path / "range",
            f"--data.validation={tmp_path / 'val.beton'}",
            *words,
        )
        == 2
    )
    error = capsys.readouterr().err
    assert (
        f"--data.validation: {tmp_path / 'val.beton'} has 18 images, of which {wanted} are "
        "to be taken"
    ) in error and error.count("\n") == 1


def test_what_fits_into_the_memory_is_told(beton, tmp_path, monkeypatch, capsys):
    def forward(method, first, second):
        if len(first) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return method.loss(first, second)

    monkeypatch.setattr(Method, "forward", forward)
    assert program(monkeypatch, beton, tmp_path) == 2
    error = capsys.readouterr().err
    assert (
        "error: --training.batch_size: a step with 16 images of 2 views at 16 px needs "
        "more memory than cpu has"
    ) in error
    assert (
        "take --training.batch_size=8, or --training.accumulate=2" in error
        and "Traceback" not in error
    )


@pytest.mark.parametrize("name", ["checkpoint.pt", "log.jsonl"])
def test_a_runs_folder_is_left_alone(beton, tmp_path, monkeypatch, capsys, name):
    (tmp_path / name).write_text("")
    assert program(monkeypatch, beton, tmp_path) == 2
    assert "holds a run" in capsys.readouterr().err and [
        path.name for path in tmp_path.iterdir()
    ] == [name]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--low=2"], "0 < low < high, got 2 and 1"),
        (["--steps=3"], "--steps: 3"),
        (["--hihg=3"], "--hihg: unknown option; did you mean --high?"),
    ],
)
def test_mistakes_cost_one_line(beton, tmp_path, monkeypatch, capsys, words, message):
    assert program(monkeypatch, beton, tmp_path / "range", *words) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "range").exists()
