import json
import os
import sys
from types import SimpleNamespace

import pytest

from ffssl.errors import UserError
from ffssl.run_folder.log import NAME, RunLog, read_log


def rows(*epochs):
    return [{"epoch": epoch, "loss": -epoch / 3} for epoch in epochs]


def write(folder, written, *, last_epoch):
    log = RunLog(folder, last_epoch=last_epoch, tensorboard=False)
    for row in written:
        log.write(row)
    log.close()


def test_rows_are_read_back_as_they_were_written(tmp_path):
    assert read_log(tmp_path) == []
    write(tmp_path, rows(0, 1, 2), last_epoch=-1)
    assert read_log(tmp_path) == rows(0, 1, 2)


def test_a_row_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    log = RunLog(tmp_path, last_epoch=-1, tensorboard=False)
    log.write(rows(0)[0])
    assert read_log(tmp_path) == rows(0)
    log.close()


def test_rows_after_the_checkpoint_are_dropped_and_the_log_goes_on(tmp_path):
    write(tmp_path, rows(0, 1, 2, 3), last_epoch=-1)
    write(tmp_path, [{"epoch": 2, "loss": 9.0}], last_epoch=1)
    assert read_log(tmp_path) == [*rows(0, 1), {"epoch": 2, "loss": 9.0}]


def test_a_new_run_starts_with_an_empty_log(tmp_path):
    write(tmp_path, rows(0, 1), last_epoch=-1)
    write(tmp_path, [], last_epoch=-1)
    assert read_log(tmp_path) == []


def test_a_last_line_cut_anywhere_is_no_row(tmp_path):
    whole = "".join(json.dumps(row) + "\n" for row in rows(0, 1, 2))
    for end in range(whole.index('{"epoch": 2') + 1, len(whole) - 1):
        (tmp_path / NAME).write_text(whole[:end])
        write(tmp_path, rows(2), last_epoch=2)
        assert read_log(tmp_path) == rows(0, 1, 2)


def test_the_log_of_a_run_that_is_writing_can_be_read(tmp_path):
    whole = "".join(json.dumps(row) + "\n" for row in rows(0, 1, 2))
    (tmp_path / NAME).write_text(whole[:-5])
    assert read_log(tmp_path) == rows(0, 1)


def test_a_last_line_that_lacks_only_its_end_is_a_row(tmp_path):
    (tmp_path / NAME).write_text("\n".join(json.dumps(row) for row in rows(0, 1)))
    write(tmp_path, rows(2), last_epoch=1)
    assert read_log(tmp_path) == rows(0, 1, 2)


def test_a_full_disk_is_told_in_a_line(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    log = RunLog(tmp_path, last_epoch=-1, tensorboard=False)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError, match=f"{tmp_path}: the log can't be written: No space left on device"
    ):
        log.write(rows(0)[0])
    log.close()


def test_a_disk_that_is_full_when_tensorboard_starts_is_told_in_a_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", full)
    with pytest.raises(
        UserError, match=f"{tmp_path}: the log can't be written: No space left on device"
    ):
        RunLog(tmp_path, last_epoch=-1, tensorboard=True)


def test_tensorboard_gets_the_same_numbers(tmp_path):
    log = RunLog(tmp_path, last_epoch=-1, tensorboard=True)
    for row in rows(0, 1, 2):
        log.write(row)
    log.close()
    assert scalars(tmp_path) == {"loss": [(0, 0.0), (1, -0.33333), (2, -0.66667)]}


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, round(event.value, 5)) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def log_steps(folder, steps, *, last_epoch, value, **options):
    log = RunLog(folder, last_epoch=last_epoch, **options)
    for step in steps:
        log.write_step(step, {"loss": value})
    log.write({"epoch": last_epoch + 1, "loss": value})
    log.close()


def test_a_resumed_run_replaces_tensorboards_steps_after_its_checkpoint(tmp_path):
    log_steps(tmp_path, [50, 100, 150, 200], last_epoch=-1, value=1.0, tensorboard=True)
    # The one before was killed beyond step 150, its checkpoint is of 100.
    log_steps(tmp_path, [150], last_epoch=0, value=2.0, tensorboard=True)
    assert scalars(tmp_path / "steps") == {"step/loss": [(50, 1.0), (100, 1.0), (150, 2.0)]}
    assert scalars(tmp_path) == {"loss": [(0, 1.0), (1, 2.0)]}
    assert [row["epoch"] for row in read_log(tmp_path)] == [0, 1]


class StandIn:
    """What RunLog calls of the package wandb, written down."""

    class Error(Exception):
        pass

    def __init__(self, error=None):
        self.error, self.inits, self.axes, self.rows, self.finished = error, [], {}, [], 0

    def init(self, **arguments):
        if self.error:
            raise self.Error(self.error)
        self.inits.append(SimpleNamespace(**arguments))
        return self

    def define_metric(self, name, step_metric=None):
        self.axes[name] = step_metric

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished += 1


def test_wandb_gets_the_options_epochs_and_steps_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    options = {"training": {"epochs": 2}}
    for last_epoch in (-1, 0, -1):
        log_steps(
            tmp_path,
            [50 * (last_epoch + 2)],
            last_epoch=last_epoch,
            value=1.0,
            tensorboard=False,
            wandb="mine",
            options=options,
        )
    first, resumed, anew = wandb.inits
    assert (first.project, first.name, first.dir, first.config) == (
        "mine",
        tmp_path.name,
        str(tmp_path),
        options,
    )
    assert first.id == resumed.id != anew.id and resumed.resume == "allow"
    assert wandb.rows[:2] == [{"step": 50, "step/loss": 1.0}, {"epoch": 0, "epoch/loss": 1.0}]
    assert wandb.rows[2:4] == [{"step": 100, "step/loss": 1.0}, {"epoch": 1, "epoch/loss": 1.0}]
    assert (
        wandb.axes == {"epoch": None, "epoch/*": "epoch", "step": None, "step/*": "step"}
        and wandb.finished == 3
    )


def test_wandbs_own_errors_and_a_missing_package_are_told_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "wandb", StandIn(error="api_key not configured.\nRun wandb login")
    )
    with pytest.raises(UserError, match="--run.wandb: api_key not configured. Run wandb login"):
        RunLog(tmp_path, last_epoch=-1, tensorboard=False, wandb="mine")
    monkeypatch.setitem(sys.modules, "wandb", None)  # import raises ImportError
    with pytest.raises(
        UserError, match="--run.wandb: the package wandb is not installed; pip install"
    ):
        RunLog(tmp_path, last_epoch=-1, tensorboard=False, wandb="mine")
