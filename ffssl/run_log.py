"""The log of a run: one JSON line an epoch, and the same numbers for TensorBoard."""

import json
import os
from pathlib import Path

NAME = "log.jsonl"


def read_log(folder: str | Path) -> list[dict]:
    """The rows of a run's log, oldest first."""
    return _whole_rows(Path(folder) / NAME)


class RunLog:
    """Appends rows to `log.jsonl` in a folder. Rows after `last_epoch`, of a run killed before its checkpoint, are dropped."""

    def __init__(self, folder: Path, *, last_epoch: int, tensorboard: bool):
        kept = [row for row in _whole_rows(folder / NAME) if row["epoch"] <= last_epoch]
        temporary = folder / f".{NAME}.partial"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, folder / NAME)
        self._file = open(folder / NAME, "a")
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            self._writer = SummaryWriter(str(folder), purge_step=last_epoch + 1)

    def write(self, row: dict) -> None:
        """Add one row; `row["epoch"]` counts finished epochs."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in row.items():
                if name != "epoch":
                    self._writer.add_scalar(name, value, row["epoch"])
            self._writer.flush()

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def _whole_rows(path: Path) -> list[dict]:
    """The rows of a log whose last line may have been cut short."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
