import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from support.options import SMALL

from ffssl import train as train_module
from ffssl.config import read_options
from ffssl.cost import count_flops, count_step
from ffssl.data.beton.description import description_path
from ffssl.data.beton.read import read_beton
from ffssl.data.convert.conversion import ConvertOptions, convert
from ffssl.data.convert.sources.embedded import Embedded
from ffssl.errors import Stopped, UserError
from ffssl.run_folder import checkpoint
from ffssl.run_folder.background_writer import Saver
from ffssl.run_folder.log import RunLog, read_log
from ffssl.train import train
from ffssl.training.build import build
from ffssl.training.run_schedule import RunSchedule, StepShape

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = [*SMALL, "--training.batch_size=32", "--training.learning_rate=0.05"]
EFFICIENT = [
    "--training.schedule=f1-clr",
    "--training.warmup_epochs=1",
    "--resolution.schedule=spl",
    "--hard_augment.select=hard",
    "--hard_augment.resolution=16",
    "--augment.views=3",
    "--augment.magnitude_min=4",
    "--augment.magnitude_max=6",
]


def arguments(betons, folder, *more) -> list[str]:
    return [*OPTIONS, f"--data.train={betons['train']}", f"--run.folder={folder}", *more]


def weights(folder) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder)["method"]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_efficient_run_follows_its_schedules_and_logs_them(betons, tmp_path):
    train(
        read_options(
            arguments(
                betons,
                tmp_path,
                *EFFICIENT,
                "--training.epochs=5",
                f"--data.validation={betons['val']}",
            )
        )
    )
    rows = read_log(tmp_path)
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["resolution"] for row in rows[1:]] == [32, 16, 16, 32, 32]
    assert [row["magnitude"] for row in rows[1:]] == [4, 4.5, 5, 5.5, 6]
    assert [("knn" in row) for row in rows] == [True, False, False, False, False, True]
    # Of eight classes; none before it has learned.
    assert [("linear_top1" in row) for row in rows] == [False] * 5 + [True]
    assert 0 <= rows[-1]["linear_top1"] <= rows[-1]["linear_top5"] <= 1
    flops = [b["flops"] - a["flops"] for a, b in zip(rows, rows[1:])]
    assert flops[1] == flops[2] < flops[0] < flops[3] == flops[4]  # no pass in the warm-up
    assert rows[-1]["loss"] < rows[1]["loss"]
    assert all(0 <= row["data_wait"] <= 1 and row["embedding_std"] > 0 for row in rows[1:])


def test_a_run_watches_its_pairs_its_predictor_and_the_rank_of_its_embeddings(betons, tmp_path):
    simsiam = ["--method.name=simsiam", "--method.predictor=8", *EFFICIENT]
    train(read_options(arguments(betons, tmp_path, *simsiam, "--training.epochs=3")))
    rows = read_log(tmp_path)
    assert ["hardness" in row for row in rows] == [False, True, True]  # after the warm-up
    assert all(-1 <= row["predictor_cosine"] <= 1 for row in rows)
    assert all(1 <= row["effective_rank"] <= 16 for row in rows)  # dimensions of a projection
    flops = [b - a for a, b in zip([0, rows[0]["flops"]], (row["flops"] for row in rows))]
    options = read_options(arguments(betons, tmp_path, *simsiam, "--training.epochs=3"))
    schedule, method = RunSchedule(options, 5), build(options, torch.device("cpu"))
    assert flops[0] == 5 * count_step(method, StepShape(32, 2), batch_size=32).total()
    assert flops[1] == 5 * count_flops(schedule, method)[StepShape(16, 3)]


LITERALLY = ["--hard_augment.loss=cosine", "--hard_augment.share_min=1"]  # Algorithm 1


def test_the_cosine_turns_simsiams_predictor_round_and_the_default_does_not(tmp_path, capsys):
    convert(Embedded("train", 640), tmp_path / "train.beton", ConvertOptions(progress=False))
    options = [
        *OPTIONS,
        f"--data.train={tmp_path / 'train.beton'}",
        "--method.name=simsiam",
        "--method.hidden=64",
        "--method.projection=64",
        "--method.predictor=16",
        "--augment.policy=simsiam",
        "--augment.blur=0",
        "--augment.views=4",
        "--hard_augment.select=hard",
        "--hard_augment.resolution=16",
        "--hard_augment.start_epoch=0",
        "--training.optimizer=adamw",
        "--training.learning_rate=0.004",
        "--training.epochs=4",
    ]
    rows = {}
    for name, more in {"cosine": LITERALLY, "default": []}.items():
        train(read_options([*options, *more, f"--run.folder={tmp_path / name}"]))
        rows[name], told = read_log(tmp_path / name)[-1], capsys.readouterr().err
        warned = "warning: epoch 3: the loss of the chosen pairs" in told
        assert warned == (name == "cosine")
        assert told.count("--hard_augment.loss=method") == told.count("warning")
    assert rows["cosine"]["predictor_cosine"] < -0.2 < 0 < rows["default"]["predictor_cosine"]
    assert rows["cosine"]["hardness"] < 0 < rows["default"]["hardness"]


def test_steps_are_shown_live(betons, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(
        RunLog, "write_step", lambda log, step, values: shown.append((step, values))
    )
    options = read_options(arguments(betons, tmp_path, "--training.epochs=2"))
    train(options)
    schedule = RunSchedule(options, steps_per_epoch=5)
    # On a CPU each of them, since there is nothing to wait for.
    assert [step for step, _ in shown] == list(range(1, 11))
    assert [values["learning_rate"] for _, values in shown] == [
        schedule.learning_rate_and_momentum(step)[0] for step in range(10)
    ]
    for epoch, row in enumerate(read_log(tmp_path)):
        assert sum(
            values["loss"] for _, values in shown[5 * epoch : 5 * epoch + 5]
        ) / 5 == pytest.approx(row["loss"])


def test_a_missing_wandb_is_told_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed"):
        train(
            read_options(
                [
                    *OPTIONS,
                    "--data.train=missing.beton",
                    f"--run.folder={tmp_path / 'run'}",
                    "--run.wandb=mine",
                ]
            )
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "method",
    [
        "simsiam --method.predictor=8",
        "byol --method.predictor=32",
        "mocov2plus --method.queue=128",
        "dino --method.prototypes=64",
        (
            "dino --method.prototypes=64 --augment.local_views=2 --training.clip_gradient=0.1 "
            "--training.weight_decay_end=0.1"
        ),
        (
            "mocov2plus --method.queue=128 --model.backbone=test_vit "
            "--model.patch_drop=0.5 --training.optimizer=adamw --training.learning_rate=1e-3"
        ),
        "barlow_twins",
        "vicreg",
    ],
)
def test_every_method_trains_and_goes_on_from_its_checkpoint_with_the_same_weights(
    betons, tmp_path, method
):
    name, *heads = method.split()
    options = [
        f"--method.name={name}",
        *heads,
        "--hard_augment.select=hard",
        "--hard_augment.resolution=16",
        "--augment.views=3",
    ]
    # The selection begins in the epoch that is interrupted.
    options += ["--hard_augment.start_epoch=1", "--hard_augment.share_min=0.5"]
    if name not in ("barlow_twins", "vicreg"):
        options += ["--hard_augment.loss=method", "--hard_augment.extra_targets=true"]
    if name == "simsiam":
        options += [f"--data.validation={betons['val']}"]
    unbroken = arguments(betons, tmp_path / "unbroken", *options, "--training.epochs=2")
    train(read_options(unbroken))

    class Stop(Exception):
        pass

    def stop_within_the_second_epoch(folder, new, **settings):
        save(folder, new, **settings)
        if new["epoch"] == 1 and len(new["totals"]["losses"]) == 3:
            raise Stop

    save = checkpoint.save
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(checkpoint, "save", stop_within_the_second_epoch)
        patch.setattr(Saver, "due", lambda saver: True)
        train(
            read_options(arguments(betons, tmp_path / "stopped", *options, "--training.epochs=2"))
        )
    train(read_options(arguments(betons, tmp_path / "stopped", *options, "--training.epochs=2")))
    assert_equal(weights(tmp_path / "unbroken"), weights(tmp_path / "stopped"))
    if name == "simsiam":
        one, other = (checkpoint.load(tmp_path / run) for run in ("unbroken", "stopped"))
        assert_equal(one["classifier"]["layer"], other["classifier"]["layer"])
        assert one["classifier"]["layer"]["weight"].any()
    ours, theirs = (read_log(tmp_path / name)[-1] for name in ("stopped", "unbroken"))
    watched = ("hardness", "hardness_error", "predictor_cosine", "effective_rank", "linear_top1")
    for gauge in watched:
        assert ours.get(gauge) == theirs.get(gauge)
    assert "hardness" in ours
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "stopped").values())


def test_a_run_goes_on_with_the_very_next_batch_and_its_sums_and_random_numbers(
    betons, tmp_path, monkeypatch, capsys
):
    steps, shown = [], []

    def recorded_step(run, views, step, labels):
        # Of the views themselves, and of what dropout would draw.
        steps.append((step, views.sum().item(), torch.rand(1).item()))
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(run, views, step, labels)

    train_step, joules = train_module.train_step, itertools.count(0, 3600)
    monkeypatch.setattr(train_module, "train_step", recorded_step)
    monkeypatch.setattr("ffssl.training.run.energy_counter", lambda device: lambda: next(joules))
    monkeypatch.setattr(
        RunLog, "write_step", lambda log, step, values: shown.append((step, values))
    )
    runs = {}
    # 4: after the last step of an epoch, before its row.
    for name, stops in (("unbroken", [None]), ("stopped", [1, 4, 5, None])):
        steps.clear()
        shown.clear()
        for stop_at in stops:
            with pytest.raises(Stopped) if stop_at is not None else contextlib.nullcontext():
                train(read_options(arguments(betons, tmp_path / name, "--training.epochs=2")))
        rows = read_log(tmp_path / name)
        assert all(
            row["seconds"] > 0 and row["images_per_second"] > 0 and 0 <= row["data_wait"] <= 1
            for row in rows
        )
        timed = ("seconds", "images_per_second", "data_wait")
        runs[name] = (
            [*steps],
            [*shown],
            [{key: value for key, value in row.items() if key not in timed} for row in rows],
        )
    assert (
        [step for step, *_ in runs["unbroken"][0]]
        == list(range(10))
        == [step - 1 for step, _ in runs["unbroken"][1]]
    )
    assert runs["stopped"] == runs["unbroken"]
    assert re.findall("continues after .*", capsys.readouterr().out) == [
        "continues after epoch 0 of 2 and step 2 of the next",
        "continues after epoch 0 of 2 and step 5 of the next",
        "continues after epoch 1 of 2 and step 1 of the next",
    ]
    # 3600 J from each of 10 charges to the next.
    assert runs["unbroken"][2][-1]["kwh"] == pytest.approx(0.01)


@pytest.fixture
def one_thread(monkeypatch):
    """For torch here and in the processes that are started, so that their sums are the same."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_run_killed_at_a_random_moment_ends_in_the_same_weights(
    betons, tmp_path, one_thread, moments
):
    unbroken, killed = (
        arguments(betons, tmp_path / name, *EFFICIENT, "--training.epochs=4")
        for name in ("unbroken", "killed")
    )
    train(read_options(unbroken))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "ffssl" / "train.py"), *killed], stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 600
    while not (tmp_path / "killed" / checkpoint.NAME).exists():
        assert process.poll() is None and time.monotonic() < deadline, (
            process.stderr.read().decode()
        )
        time.sleep(0.01)
    time.sleep(moments.uniform(0, 1.5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    train(read_options(killed))
    assert_equal(weights(tmp_path / "unbroken"), weights(tmp_path / "killed"))
    assert [row["epoch"] for row in read_log(tmp_path / "killed")] == [1, 2, 3, 4]


def test_weights_do_not_depend_on_the_number_of_workers(betons, tmp_path):
    for workers in (1, 3):
        train(
            read_options(
                arguments(
                    betons,
                    tmp_path / str(workers),
                    "--training.epochs=1",
                    f"--data.workers={workers}",
                )
            )
        )
    assert_equal(weights(tmp_path / "1"), weights(tmp_path / "3"))


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(betons, tmp_path):
    options = arguments(
        betons,
        tmp_path,
        "--training.epochs=3",
        "--training.learning_rate=1e30",
        "--training.momentum=0",
    )
    with pytest.raises(FloatingPointError, match="not finite at step .*learning_rate"):
        train(read_options(options))
    state = checkpoint.load(tmp_path)
    assert state["epoch"] == 0
    assert all(torch.isfinite(tensor).all() for tensor in state["method"].values())


def test_a_checkpoint_in_an_epoch_is_written_while_the_steps_go_on(betons, tmp_path, monkeypatch):
    """Writing takes until the next step has been done: training that waited for it would wait for
    ever.
    """
    stepped, in_an_epoch, step, save, done = (
        threading.Condition(),
        [],
        train_module.train_step,
        checkpoint.save,
        0,
    )

    def told_step(run, views, number, labels):
        nonlocal done
        result = step(run, views, number, labels)
        with stepped:
            done = number + 1
            stepped.notify()
        return result

    def slow_save(folder, state, *words, **settings):
        steps = len(state["totals"]["losses"])
        if 1 <= steps < 5:  # after the last, training does wait
            with stepped:
                in_an_epoch.append(
                    stepped.wait_for(lambda: done > 5 * state["epoch"] + steps, timeout=600)
                )
        save(folder, state, *words, **settings)

    monkeypatch.setattr(checkpoint, "save", slow_save)
    monkeypatch.setattr(train_module, "train_step", told_step)
    train(
        read_options(
            arguments(betons, tmp_path, "--training.epochs=2", "--run.checkpoint_minutes=1e-9")
        )
    )
    assert in_an_epoch and all(in_an_epoch)


def test_a_finished_run_is_not_trained_again(betons, tmp_path, capsys):
    options = arguments(betons, tmp_path, "--training.epochs=1")
    train(read_options(options))
    before = (tmp_path / checkpoint.NAME).stat().st_mtime_ns
    assert "finished already" not in capsys.readouterr().out
    train(read_options(options))
    assert "the run has finished already, with epoch 1 of 1\n" in capsys.readouterr().out
    assert (tmp_path / checkpoint.NAME).stat().st_mtime_ns == before


def test_what_a_folder_holds_is_not_mixed_with_another_experiment(betons, tmp_path):
    train(read_options(arguments(betons, tmp_path, "--training.epochs=1")))
    with pytest.raises(
        UserError, match="--training.learning_rate: the run in .* has 0.05, not 0.1"
    ):
        train(
            read_options(
                arguments(betons, tmp_path, "--training.epochs=1", "--training.learning_rate=0.1")
            )
        )
    with pytest.raises(UserError, match="holds a run already"):
        train(
            read_options(arguments(betons, tmp_path, "--training.epochs=1", "--run.resume=never"))
        )
    with pytest.raises(UserError, match="--run.seed: the run in .* has 0, not 1"):
        train(read_options(arguments(betons, tmp_path, "--training.epochs=1", "--run.seed=1")))
    with pytest.raises(
        UserError,
        match=(
            f"--data.train: {betons['val']} does not hold the images .* has 40 others; put "
            "back the file of 160"
        ),
    ):
        train(
            read_options(
                arguments(betons | {"train": betons["val"]}, tmp_path, "--training.epochs=1")
            )
        )


def test_a_file_of_other_pixels_is_refused_where_both_are_described(betons, tmp_path):
    own = betons | {"train": tmp_path / "train.beton"}
    description = description_path(own["train"])
    shutil.copyfile(betons["train"], own["train"])
    told = json.loads(description_path(betons["train"]).read_text())
    for sha256, refused in ((told["sha256"], False), ("0" * 64, True), (None, False)):
        description.write_text(
            json.dumps(told | {"sha256": sha256})
        ) if sha256 else description.unlink()
        with (
            pytest.raises(UserError, match="does not hold the images")
            if refused
            else contextlib.nullcontext()
        ):
            train(read_options(arguments(own, tmp_path / "run", "--training.epochs=1")))


def test_a_run_on_the_parts_of_a_set_is_that_on_the_whole(betons, tmp_path):
    for k in (1, 2, 3):
        options = ConvertOptions(part=(k, 3), progress=False)
        convert(Embedded("train", 160), tmp_path / f"train-{k}.beton", options)
    parts = betons | {"train": tmp_path / "train-*.beton"}
    more = ["--training.epochs=1", f"--data.validation={betons['val']}"]
    train(read_options(arguments(betons, tmp_path / "whole", *more)))
    train(read_options(arguments(parts, tmp_path / "parts", *more)))
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    last = [read_log(tmp_path / name)[-1] for name in ("whole", "parts")]
    assert last[0]["knn"] == last[1]["knn"] and last[0]["linear_top1"] == last[1]["linear_top1"]

    (tmp_path / "train-3.beton").unlink()  # the run is trained on three
    with pytest.raises(UserError, match=r"train-\*.beton does not hold the images"):
        train(read_options(arguments(parts, tmp_path / "parts", *more)))
    for path in tmp_path.glob("train-*.beton"):
        path.unlink()
    with pytest.raises(UserError, match=r"train-\*.beton: no file matches this pattern"):
        train(read_options(arguments(parts, tmp_path / "none", *more)))


def test_a_damaged_checkpoint_costs_no_more_than_the_steps_since_the_one_before(
    betons, tmp_path, capsys
):
    unbroken, damaged = (
        arguments(betons, tmp_path / name, "--training.epochs=2")
        for name in ("unbroken", "damaged")
    )
    train(read_options(unbroken))
    train(read_options(damaged))
    path = tmp_path / "damaged" / checkpoint.NAME
    path.write_bytes(path.read_bytes()[:-1000])
    train(read_options(damaged))
    assert "checkpoint.pt: not a readable checkpoint" in capsys.readouterr().err
    assert_equal(weights(tmp_path / "unbroken"), weights(tmp_path / "damaged"))


def test_broken_images_end_a_run_by_name_or_are_replaced_and_counted(betons, tmp_path):
    path, beton = tmp_path / "broken.beton", read_beton(betons["train"])
    data = bytearray(betons["train"].read_bytes())
    for i in (3, 77):
        begin = int(beton.images["data_ptr"][i])
        data[begin : begin + 20] = bytes(20)
    path.write_bytes(data)
    broken = arguments(
        betons | {"train": path},
        tmp_path / "run",
        "--training.epochs=2",
        f"--data.validation={betons['val']}",
    )
    with pytest.raises(UserError, match="broken.beton: image (3|77) does not decode"):
        train(read_options(broken))
    train(read_options([*broken, "--data.broken=replace"]))
    assert [row.get("replaced") for row in read_log(tmp_path / "run")] == [None, 2, 2]


@pytest.mark.parametrize(
    "override, message",
    [
        ("--data.train=missing.beton", "missing.beton"),
        ("--training.batch_size=1000", "fewer than one batch of 1000"),
        ("--model.backbone=resnet19", "unknown backbone 'resnet19'; known are"),
        ("--method.name=simclrr", "unknown method 'simclrr'; known are .*simclr, simsiam"),
        ("--method.predictor=8", "simclr has no such option"),
        (
            "--method.name=mocov2plus --method.queue=60",
            "--method.queue: 60 must be at least twice --training.batch_size=32",
        ),
        (
            (
                "--method.name=barlow_twins --hard_augment.loss=method "
                "--hard_augment.select=hard --augment.views=3"
            ),
            "--hard_augment.loss: barlow_twins has no loss",
        ),
        (
            "--hard_augment.across_policies=true --hard_augment.select=hard --augment.views=3",
            "--hard_augment.across_policies: the views have one policy",
        ),
        (
            "--hard_augment.extra_targets=true --hard_augment.select=hard --augment.views=3",
            "--hard_augment.extra_targets: simclr does not predict",
        ),
        ("--augment.policy=none", "unknown policy 'none'"),
        (
            "--augment.local_views=2 --method.name=vicreg",
            "--augment.local_views: vicreg has no use for local views.* byol, dino, mocov2plus,",
        ),
        (
            (
                "--augment.local_views=2 --augment.local_share=0.25 --resolution.step=8 "
                "--model.backbone=vit_tiny_patch16_224"
            ),
            "--augment.local_share: vit_tiny.* can't take views of 8 px: its patches of 16 px",
        ),
        ("--model.drop_path=0.1", "model.drop_path: resnet-small has no stochastic depth"),
        (
            "--model.patch_drop=0.5 --data.train=missing.beton",
            "^model.patch_drop: resnet-small can't drop patches; leave it 0, or take a vision",
        ),
        (
            "--model.patch_drop=1.5 --data.train=missing.beton",
            "^--model.patch_drop: expected a number from 0 to 0.99, got '1.5'",
        ),
        ("--run.device=cuda:99", "cuda:99 can't be used here"),
        ("--run.folder=/dev/null/run", "/dev/null/run can't be made"),
    ],
)
def test_mistakes_are_named_before_training(betons, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        train(read_options(arguments(betons, tmp_path, *override.split())))


def test_knn_needs_labels(betons, tmp_path):
    flat = tmp_path / "images"
    flat.mkdir()
    from PIL import Image

    from ffssl.data.convert.sources.folder import ImageFolder

    for i in range(40):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(flat / f"{i}.jpg")
    convert(ImageFolder(flat), tmp_path / "flat.beton")
    with pytest.raises(UserError, match="flat.beton: an evaluation needs labels, and 40 of 40"):
        train(
            read_options(
                arguments(betons, tmp_path / "run", f"--data.validation={tmp_path / 'flat.beton'}")
            )
        )
    train(
        read_options(
            [
                *OPTIONS,
                f"--data.train={tmp_path / 'flat.beton'}",
                f"--run.folder={tmp_path / 'run'}",
                "--training.epochs=1",
            ]
        )
    )


def run_program(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "ffssl" / "train.py"), *words], capture_output=True, text=True
    )


def test_mistyped_option_costs_one_line_and_status_2():
    result = run_program("--training.epoch=3")
    assert result.returncode == 2
    assert (
        result.stderr == "error: --training.epoch: unknown option; did you mean training.epochs?\n"
    )


def test_help_comes_without_importing_torch():
    code = (
        "import sys, runpy; sys.argv = ['train.py', '--help']\ntry: "
        f"runpy.run_path({str(ROOT / 'ffssl' / 'train.py')!r}, run_name='__main__')\nfinally: "
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--hard_augment.select" in result.stdout
    assert result.stdout.rstrip().endswith("False")


def test_a_run_whose_output_nobody_reads_any_more_ends_in_a_line(betons, tmp_path):
    program = [sys.executable, str(ROOT / "ffssl" / "train.py")]
    words = shlex.join([*program, *arguments(betons, tmp_path, "--training.epochs=500")])
    result = subprocess.run(
        ["bash", "-c", f"{words} | true; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True
    )
    told = "interrupted; the same command continues after the last checkpoint\n"
    assert (result.returncode, result.stderr) == (141, told)


def test_interrupt_leaves_with_status_130_and_a_checkpoint(betons, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "ffssl" / "train.py"),
        *arguments(betons, tmp_path, "--training.epochs=500"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / checkpoint.NAME).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr and "the same command continues" in stderr
    assert len(checkpoint.load(tmp_path)["totals"]["losses"]) > 0


def configs() -> list[Path]:
    return sorted((ROOT / "rn50_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", configs(), ids=lambda path: path.stem)
def test_every_config_reads(path):
    options = read_options(["--config", str(path), "--data.train=train.beton", "--run.folder=run"])
    assert json.dumps({section: vars(values) for section, values in vars(options).items()})
