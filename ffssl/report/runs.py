"""What the report knows of a run: its folder's log, options and record."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ffssl.config import Options, dotted
from ffssl.data.beton.description import description_or_empty
from ffssl.data.beton.several import read_betons
from ffssl.errors import UserError
from ffssl.evaluate.labels import shared_classes
from ffssl.load import load_run
from ffssl.methods import Method
from ffssl.printable import printable
from ffssl.run_folder import checkpoint
from ffssl.run_folder.log import NAME, read_log
from ffssl.run_folder.provenance import read_starts
from ffssl.schedules import noise_scale
from ffssl.training.run_schedule import RunSchedule

POINTS = 400  # in a schedule's curve, at least


@dataclass(frozen=True)
class ReportedRun:
    """A run as its folder has it.

    rows: the log, never empty. method: on the CPU with the checkpoint's weights, or the reason why
    there is none; then options are None. trained_on: the identity of the training images, see
    `ffssl.data.beton.description.identity`; empty if the checkpoint has none. starts: see
    `run_folder.provenance`.
    """

    folder: Path
    name: str
    rows: list[dict]
    options: Options | None
    method: Method | UserError
    trained_on: dict[str, object]
    starts: list[dict]

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""
        return self.rows[-1]["epoch"]

    @property
    def unfinished(self) -> bool:
        """Whether it is known that epochs are still to come."""
        return self.options is not None and self.epoch < self.options.training.epochs

    @property
    def schedule(self) -> RunSchedule:
        """The run's schedules, as fine as a curve needs them. Only for runs with options."""
        return RunSchedule(
            self.options, steps_per_epoch=-(-POINTS // self.options.training.epochs) + 1
        )

    @cached_property
    def last_evaluation(self) -> dict | None:
        return next((row for row in reversed(self.rows) if "knn" in row), None)

    @cached_property
    def samples(self) -> int | None:
        """The number of training images, or None if the log has no noise scale.

        The noise scale is proportional to it.
        """
        for row in self.rows:
            if row.get("learning_rate"):
                one = noise_scale(
                    learning_rate=row["learning_rate"],
                    momentum=row["momentum"],
                    samples=1,
                    batch_size=self.options.training.batch_size,
                )
                return round(row["noise_scale"] / one)
        return None

    @property
    def evaluation(self) -> tuple | None:
        """What must be equal for two accuracies to be comparable, or None if unknown."""
        if self.options is None:
            return None
        data, evaluate = self.options.data, self.options.evaluate
        images = self.trained_on.get("digest") or describe_data(data.train).identity
        settings = (
            self.options.resolution.max,
            evaluate.bank_samples,
            evaluate.k,
            evaluate.temperature,
        )
        return images, describe_data(data.validation).identity, *settings

    @cached_property
    def accuracy_doubt(self) -> str | None:
        """Why the accuracies mean nothing, or None if nothing says so.

        The reason is that the files' labels are of different classes, which training now refuses.
        """
        if self.options is None or not self.options.data.validation or not self.last_evaluation:
            return None
        data = self.options.data
        try:
            betons = [read_betons(path, data.label_field) for path in (data.train, data.validation)]
        except UserError:  # gone since
            return None
        try:
            shared_classes(*betons, partly=True)
        except UserError as error:
            return str(error)
        return None

    @property
    def hardware(self) -> tuple[str, int] | None:
        """The device of the run, and the number of processes.

        None if these changed, or if the run kept no record.
        """
        kinds = {(start["device"], start.get("ranks", 1)) for start in self.starts}
        return kinds.pop() if len(kinds) == 1 else None


@dataclass(frozen=True)
class Data:
    """What the description beside a beton file says of it."""

    path: str
    identity: str
    class_names: list[str]


def describe_data(path: str | None) -> Data:
    """Read the description of a beton file, or of several.

    identity: equal for copies of the files if the description exists, else the path.
    """
    description = description_or_empty(path) if path else {}
    return Data(
        path or "none",
        description.get("sha256") or str(Path(path or "none").resolve()),
        description.get("class_names") or [],
    )


def read_runs(folders: list[Path]) -> list[ReportedRun]:
    """Read the runs in these folders. Raise UserError for a folder without a log."""
    tails = [folder.resolve().name for folder in folders]
    names = tails if len(set(tails)) == len(tails) else [str(folder) for folder in folders]
    return [_read_run(folder, printable(name)) for folder, name in zip(folders, names)]


def _read_run(folder: Path, name: str) -> ReportedRun:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the run.folder of a run of ffssl train")
    rows = read_log(folder)
    if not rows:
        raise UserError(
            f"{folder}: has no {NAME} with an epoch in it; name the run.folder of a run of "
            "ffssl train"
        )
    try:
        if not (folder / checkpoint.NAME).exists():
            raise UserError(f"{folder} holds no checkpoint, from which this would be computed")
        options, method, state = load_run(folder)
    except UserError as error:
        options, method, state = None, error, {}
    return ReportedRun(
        folder, name, rows, options, method, state.get("data", {}), read_starts(folder)
    )


def compare_options(runs: list[ReportedRun]) -> tuple[dict[str, list], dict[str, object]]:
    """Return the options that differ between the runs, and those that do not, by dotted name.

    The former are lists of each run's value. Runs without options are left out.
    """
    tables = [dotted(run.options.as_dict()) for run in runs if run.options is not None]
    values = {name: [table[name] for table in tables] for name in tables[0]}
    differing = {
        name: each for name, each in values.items() if any(value != each[0] for value in each)
    }
    return differing, {name: each[0] for name, each in values.items() if name not in differing}
