"""What rank 0 keeps and prints of a run: its log, its checkpoints and its progress."""

import contextlib
import sys

from ffssl.run_folder.background_writer import Saver
from ffssl.run_folder.log import RunLog
from ffssl.training.run import Run


class Record:
    """The record of the other ranks, which keep nothing."""

    def due(self) -> bool:
        """Return whether the last checkpoint is old enough for another one."""
        return False

    def save(self, run: Run) -> None:
        """Write a checkpoint in the background."""

    def step(self, step: int, loss: float, learning_rate: float) -> None:
        """Show a step, counted from the start of the run, in TensorBoard and the like."""

    def untrained(self, row: dict[str, float]) -> None:
        """Log and print the accuracy before the first step."""

    def epoch(self, row: dict[str, float], run: Run) -> None:
        """Log and print a finished epoch."""

    def close(self) -> None:
        """Wait until everything is written."""


class RankZeroRecord(Record):
    """The record of rank 0."""

    def __init__(self, log: RunLog, saver: Saver):
        self._log, self._saver = log, saver

    def due(self) -> bool:
        return self._saver.due()

    def save(self, run: Run) -> None:
        self._saver.save(run.state())

    def step(self, step: int, loss: float, learning_rate: float) -> None:
        self._log.write_step(step, {"loss": loss, "learning_rate": learning_rate})

    def untrained(self, row: dict[str, float]) -> None:
        if "knn" in row:
            self._log.write({"epoch": 0, **row})
            print(f"untrained: kNN {row['knn']:.1%}", flush=True)

    def epoch(self, row: dict[str, float], run: Run) -> None:
        self._log.write(row)
        print(summary(row, run.options.training.epochs), flush=True)
        if row.get("hardness", 0) < -2 * row.get("hardness_error", 0):  # beyond chance
            print(upside_down(row, run), file=sys.stderr, flush=True)

    def close(self) -> None:
        with contextlib.closing(self._log):
            self._saver.close()


def summary(row: dict[str, float], epochs: int) -> str:
    """Describe a finished epoch on one line."""
    accuracies = "".join(
        f"  {name} {row[key]:.1%}"
        for name, key in (("kNN", "knn"), ("linear", "linear_top1"))
        if key in row
    )
    return (
        f"epoch {row['epoch']}/{epochs}  {row['resolution']} px  loss {row['loss']:.3f}  "
        f"lr {row['learning_rate']:.3g}  {row['images_per_second']:.0f} img/s, "
        f"{row['data_wait']:.0%} waiting for data{accuracies}"
    )


def upside_down(row: dict[str, float], run: Run) -> str:
    """Return a warning for an epoch in which the chosen pairs were easier than random ones."""
    loss = run.options.hard_augment.loss or run.method.compares_pairs_by
    advice = (
        "compare them by the method's loss, --hard_augment.loss=method"
        if loss != "method" and run.method.has_pair_losses
        else "begin later, --hard_augment.start_epoch, or set --hard_augment.share_max below 1"
    )
    return (
        f"warning: epoch {row['epoch']}: the loss of the chosen pairs is {-row['hardness']:.3g} "
        f"below that of random pairs: Hard Augment trains on easy pairs; {advice}"
    )
