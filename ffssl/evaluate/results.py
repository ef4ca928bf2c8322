"""The results of evaluations: `evaluation.json` beside a run's checkpoint, and tables.

The file is a list of records. A record holds

    evaluation  "knn" or "linear"
    checkpoint, epoch, steps, network, weights
                what was evaluated: after how many epochs, and steps of the next, whose backbone;
                weights is `ffssl.load.fingerprint`
    settings, data, machine
                how, on which files, on what
    scores      top1, and top5 of a probe: shares in 0..1, or null

and of a probe its checkpoint, "probe".
"""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ffssl.errors import UserError
from ffssl.files import write_json
from ffssl.tables import table

NAME = "evaluation.json"
# The columns of a table of records, and whether they hold numbers.
COLUMNS = {
    "network": False,
    "epoch": True,
    "evaluation": False,
    "settings": False,
    "images": True,
    "top-1": True,
    "top-5": True,
}
# What tells records apart.
_SCORED = ("evaluation", "checkpoint", "epoch", "network", "weights", "settings", "data")


def read_results(folder: Path) -> list[dict]:
    """Return the records of a folder, oldest first.

    Raise UserError if the file is damaged or can't be read.
    """
    path = Path(folder) / NAME
    try:
        return json.loads(path.read_text()) if path.exists() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error}); delete it and evaluate again") from error


def require_recordable(folder: Path) -> None:
    """Raise UserError if no result could be added to the folder's."""
    read_results(folder)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder}: {NAME} can't be written: {error.strerror}") from error


def add_result(folder: Path, record: dict) -> None:
    """Add a record to the folder's, in place of an earlier one of the same evaluation.

    The file is replaced whole.
    """
    others = [
        other for other in read_results(folder) if any(other[key] != record[key] for key in _SCORED)
    ]
    try:
        write_json(folder / NAME, [*others, record])
    except OSError as error:
        raise UserError(f"{folder / NAME}: can't be written: {error.strerror}") from error


def describe_settings(record: dict) -> str:
    """Say in a line how a record was measured."""
    settings = record["settings"]
    if record["evaluation"] == "knn":
        how = f"k = {settings['k']}, T = {settings['temperature']:g}"
    else:
        how = (
            f"{settings['epochs']} epochs {settings['training']}, learning rate "
            f"{settings['learning_rate']:g}, batch {settings['batch_size']}"
        )
    return f"{how}; {settings['resolution']} px, {settings['precision']}"


def describe(record: dict) -> tuple[str, ...]:
    """Return the cells of a record's row, in the order of COLUMNS."""
    epoch = (
        f"{record['epoch']} + {record['steps']} steps"
        if record.get("steps")
        else str(record["epoch"])
    )
    scores = record["scores"]
    top1, top5 = (
        f"{score:.2%}" if score is not None else "-"
        for score in (scores["top1"], scores.get("top5"))
    )
    return (
        record["network"],
        epoch,
        record["evaluation"],
        describe_settings(record),
        str(record["data"]["validation"]["images"]),
        top1,
        top5,
    )


def markdown_table(results: Iterable[tuple[str, dict]]) -> str:
    """Return a table of named records, a row each."""
    align = "<" + "".join(">" if number else "<" for number in COLUMNS.values())
    return table(("run", *COLUMNS), ((name, *describe(record)) for name, record in results), align)
