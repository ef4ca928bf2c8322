"""The log of a run: one JSON line an epoch.

TensorBoard and Weights & Biases show the same numbers live, and those of steps.
"""

import contextlib
import io
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from ffssl.errors import UserError
from ffssl.files import write_text

NAME = "log.jsonl"


def read_log(folder: str | Path) -> list[dict]:
    """Return the rows of a run's log, oldest first."""
    return _whole_rows(Path(folder) / NAME)


class RunLog:
    """Append rows to `log.jsonl` in a folder.

    last_epoch: later rows, of a run killed before its checkpoint, are dropped.
    tensorboard: also write TensorBoard files to the folder.
    wandb: also log to this project of Weights & Biases.
    options: the run's options, to be shown there.

    Raise UserError if the log can't be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        last_epoch: int,
        tensorboard: bool,
        wandb: str | None = None,
        options: dict | None = None,
    ):
        self._folder = folder
        with self._named():
            self._viewers: list[WandbViewer | TensorBoardViewer] = []
            if wandb:
                viewer = WandbViewer(folder, wandb, options, resumed=last_epoch >= 0)
                self._viewers.append(viewer)
            kept = [row for row in _whole_rows(folder / NAME) if row["epoch"] <= last_epoch]
            write_text(folder / NAME, "".join(json.dumps(row) + "\n" for row in kept))
            self._file = io.FileIO(folder / NAME, "ab")
            if tensorboard:
                self._viewers.append(TensorBoardViewer(folder, last_epoch))

    def write(self, row: dict) -> None:
        """Add one row; `row["epoch"]` counts finished epochs."""
        with self._named():
            self._file.write(json.dumps(row).encode() + b"\n")
            # A checkpoint that survives a power cut must not outlive its row.
            os.fsync(self._file.fileno())
            for viewer in self._viewers:
                viewer.epoch(row)

    def write_step(self, step: int, values: dict[str, float]) -> None:
        """Show values at an optimiser step, counted from the start of the run.

        They do not go to `log.jsonl`.
        """
        with self._named():
            for viewer in self._viewers:
                viewer.step(step, values)

    def close(self) -> None:
        self._file.close()
        with self._named():
            for viewer in self._viewers:
                viewer.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._folder}: the log can't be written: {error.strerror or error}"
            ) from error


class TensorBoardViewer:
    """Write epochs to the folder itself, and steps to its subfolder `steps`.

    A resumed run drops everything in a folder beyond an epoch or a step, so the two need a folder
    each.
    """

    def __init__(self, folder: Path, last_epoch: int):
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._new_writer = SummaryWriter
        self._folder = folder
        self._epochs = SummaryWriter(str(folder), purge_step=last_epoch + 1)
        self._steps: SummaryWriter | None = None

    def epoch(self, row: dict) -> None:
        for name, value in row.items():
            if name != "epoch":
                self._epochs.add_scalar(name, value, row["epoch"])
        self._epochs.flush()

    def step(self, step: int, values: dict[str, float]) -> None:
        if self._steps is None:
            self._steps = self._new_writer(
                str(self._folder / "steps"), purge_step=step, flush_secs=30
            )
        for name, value in values.items():
            self._steps.add_scalar(f"step/{name}", value, step)

    def close(self) -> None:
        for writer in filter(None, (self._epochs, self._steps)):
            writer.close()


class WandbViewer:
    """A run of Weights & Biases, named after the folder.

    A file in the folder keeps its id, so that a resumed run continues the same one.
    """

    def __init__(self, folder: Path, project: str, options: dict | None, *, resumed: bool):
        wandb = require_wandb()
        id_file = folder / "wandb-id"
        if not (resumed and id_file.exists()):
            id_file.write_text(uuid.uuid4().hex[:12])
        try:
            self._run = wandb.init(
                project=project,
                name=folder.resolve().name,
                dir=str(folder),
                id=id_file.read_text(),
                resume="allow",
                config=options,
                allow_val_change=True,
            )
        except wandb.Error as error:
            raise UserError(f"--run.wandb: {' '.join(str(error).split())}") from error
        for axis in ("epoch", "step"):
            self._run.define_metric(axis)
            self._run.define_metric(f"{axis}/*", step_metric=axis)

    def epoch(self, row: dict) -> None:
        self._log(
            "epoch", row["epoch"], {name: value for name, value in row.items() if name != "epoch"}
        )

    def step(self, step: int, values: dict[str, float]) -> None:
        self._log("step", step, values)

    def _log(self, axis: str, position: int, values: dict[str, float]) -> None:
        self._run.log(
            {axis: position} | {f"{axis}/{name}": value for name, value in values.items()}
        )

    def close(self) -> None:
        self._run.finish()


def require_wandb() -> ModuleType:
    """Return the package wandb. Raise UserError if it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "--run.wandb: the package wandb is not installed; pip install 'ffssl[wandb]', "
            "or leave the option out"
        ) from error
    return wandb


def _whole_rows(path: Path) -> list[dict]:
    """Return the complete rows of a log; its last line may have been cut short."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
