"""The training program, killed, stopped and starved: it must end in the weights of a run that was
left alone, and lose nothing it has saved.
"""

import functools
import os
import shutil
import signal
import time

import pytest
from support.harmed import (
    Program,
    hang_while_saving,
    kill_while_saving,
    limit_files,
    signal_itself,
)
from test_train import arguments, assert_equal, weights

from ffssl.config import read_options
from ffssl.errors import UserError
from ffssl.run_folder import checkpoint
from ffssl.run_folder.log import read_log
from ffssl.train import train

OPTIONS = [
    "--training.epochs=2",
    "--training.batch_size=16",
    "--method.name=mocov2plus",
    "--method.queue=64",
    "--resolution.max=16",
    "--evaluate.every=1",
]
EVERY_STEP = "--run.checkpoint_minutes=1e-9"
MEASURED = {"seconds", "images_per_second", "data_wait"}


def command(betons, folder, *more) -> list[str]:
    return arguments(betons, folder, f"--data.validation={betons['val']}", *OPTIONS, *more)


def rows(folder) -> list[dict]:
    """Of the log, without what a clock measures."""
    return [
        {name: value for name, value in row.items() if name not in MEASURED}
        for row in read_log(folder)
    ]


def position(folder) -> tuple[int, int]:
    """Epochs and steps of the checkpoint; (-1, 0) before the first."""
    state = checkpoint.load(folder)
    return (state["epoch"], len(state["totals"]["losses"])) if state else (-1, 0)


def train_undisturbed(betons, folder, *more):
    """In a process of the same kind: sums come out the same to the last bit in one, not in any
    process that has done other things before.
    """
    program = Program(command(betons, folder, *more), folder / "undisturbed.txt")
    assert program.status() == 0, program.output
    (folder / "undisturbed.txt").unlink()


@pytest.fixture(scope="module")
def unbroken(betons, tmp_path_factory):
    """The folder of a run that was left alone."""
    folder = tmp_path_factory.mktemp("unbroken")
    train_undisturbed(betons, folder)
    return folder


def assert_ends_as(unbroken, betons, folder, *more) -> None:
    """Once the run in `folder` has been continued to its end."""
    train_undisturbed(betons, folder, *more)
    assert_equal(weights(unbroken), weights(folder))
    assert rows(unbroken) == rows(folder)
    assert not [
        path.name for path in folder.iterdir() if path.name.endswith((".partial", ".damaged"))
    ]


def kill_at_random(moments, betons, folder, kills: int, *more, within: float) -> int:
    """Kill a run that saves all the time, again and again, within so many seconds after its start,
    or after its next checkpoint.

    Returns how often that was while it was writing.
    """
    path, while_writing, before = folder / checkpoint.NAME, 0, (-1, 0)
    for number in range(kills):
        start = path.stat().st_mtime_ns if path.exists() else None
        program = Program(command(betons, folder, EVERY_STEP, *more), folder / "output.txt")
        if number % 3:
            program.wait_until(lambda: path.exists() and path.stat().st_mtime_ns != start)
        time.sleep(moments.uniform(0, within))
        program.signal(signal.SIGKILL)
        assert program.status() == -signal.SIGKILL, program.output
        while_writing += (folder / f".{checkpoint.NAME}.partial").exists()
        assert before <= position(folder)
        assert not (folder / f"{checkpoint.NAME}.damaged").exists()
        before = position(folder)
    return while_writing


def test_a_run_killed_at_random_moments_loses_nothing(unbroken, betons, tmp_path, moments):
    kill_at_random(moments, betons, tmp_path, 2, within=0.2)
    assert_ends_as(unbroken, betons, tmp_path)


@pytest.mark.slow
def test_a_run_killed_at_thirty_moments_loses_nothing(betons, tmp_path, moments):
    longer = "--training.epochs=40", "--evaluate.every=5"
    for folder in ("unbroken", "killed"):
        (tmp_path / folder).mkdir()
    train_undisturbed(betons, tmp_path / "unbroken", *longer)
    while_writing = kill_at_random(moments, betons, tmp_path / "killed", 30, *longer, within=0.5)
    print("killed while writing:", while_writing, "of 30, up to", position(tmp_path / "killed"))
    assert_ends_as(tmp_path / "unbroken", betons, tmp_path / "killed", *longer)


STAGES = [
    "write",
    "replace first",
    "replace",
    "folder",
    *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("fsync", "link")),
]


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_while_it_saves_loses_at_most_that_checkpoint(
    unbroken, betons, tmp_path, stage
):
    program = Program(
        command(betons, tmp_path, EVERY_STEP),
        tmp_path / "output.txt",
        functools.partial(kill_while_saving, stage, 5),
    )
    assert program.status() == -signal.SIGKILL, program.output
    assert (tmp_path / f".{checkpoint.NAME}.partial").exists() == (stage != "folder")
    # The first is of step 0. While one is written, steps pass without: more where the disk is slow.
    assert position(tmp_path) >= (0, 3)
    assert_ends_as(unbroken, betons, tmp_path)


@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_a_signal_saves_within_the_epoch_and_leaves(unbroken, betons, tmp_path, number, status):
    program = Program(
        command(betons, tmp_path, "--run.checkpoint_minutes=0"),
        tmp_path / "output.txt",
        functools.partial(signal_itself, number, 3),
    )
    assert program.status() == status, program.output
    assert (
        program.output.endswith(
            f"stopped by {number.name}; the same command continues where it was\n"
        )
        and "Traceback" not in program.output
    )
    assert position(tmp_path) == (0, 3)
    assert_ends_as(unbroken, betons, tmp_path)


def test_a_second_signal_leaves_at_once_and_a_folder_has_one_run_at_a_time(betons, tmp_path):
    program = Program(command(betons, tmp_path), tmp_path / "output.txt", hang_while_saving)
    program.wait_until(lambda: read_log(tmp_path))
    with pytest.raises(UserError, match=f"--run.folder: a run is under way in {tmp_path} already"):
        train(read_options(command(betons, tmp_path)))
    for pause in (0.1, 1.2):  # the first two are one request
        program.signal(signal.SIGTERM)
        time.sleep(pause)
    assert program.alive
    program.signal(signal.SIGTERM)
    assert program.status() == -signal.SIGTERM
    train(read_options(arguments(betons, tmp_path, "--training.epochs=1")))  # the lock went with it


def test_a_beton_cut_short_under_a_run_ends_it_and_put_back_it_continues(
    unbroken, betons, tmp_path
):
    own = betons | {"train": tmp_path / "train.beton"}
    shutil.copyfile(betons["train"], own["train"])
    program = Program(command(own, tmp_path, EVERY_STEP), tmp_path / "output.txt")
    program.wait_until(lambda: position(tmp_path)[1] > 0)
    os.truncate(own["train"], 4096)
    status = program.status()
    # It looks before it reads on; a read that is under way the kernel ends by a signal, and nobody
    # can keep it from that.
    assert status == -signal.SIGBUS or (
        status == 2 and "was cut short or written over while in use" in program.output
    ), program.output
    shutil.copyfile(betons["train"], own["train"])
    assert_ends_as(unbroken, own, tmp_path)


def test_a_full_disk_stops_the_run_and_leaves_its_checkpoints(unbroken, betons, tmp_path):
    program = Program(command(betons, tmp_path), tmp_path / "output.txt")
    program.wait_until(lambda: len(read_log(tmp_path)) > 1)
    program.signal(signal.SIGTERM)
    assert program.status() == 75
    before = {path: path.read_bytes() for path in tmp_path.glob("checkpoint*")}
    assert len(before) == 2
    # Found in the midst of an epoch, and at its end.
    for minutes in (EVERY_STEP, "--run.checkpoint_minutes=0"):
        program = Program(
            command(betons, tmp_path, minutes),
            tmp_path / "output.txt",
            functools.partial(limit_files, 100_000),
        )
        assert program.status() == 2
        assert (
            f"error: {tmp_path / checkpoint.NAME}: the checkpoint can't be written: File "
            "too large; the one before is"
        ) in program.output
        assert "Traceback" not in program.output
        assert {path: path.read_bytes() for path in tmp_path.glob("checkpoint*")} == before
    assert_ends_as(unbroken, betons, tmp_path)
