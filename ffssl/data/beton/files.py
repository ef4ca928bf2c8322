"""Which beton files a text means."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from ffssl.errors import UserError
from ffssl.files import natural_order

Files: TypeAlias = str | os.PathLike | Sequence[str | os.PathLike]


def beton_files(files: Files) -> list[Path]:
    """Return the beton files that are meant, in their order.

    files: a path, a pattern ("train-*.beton"), or several of both: a sequence, or a text with
        commas between them. A file that is called so is meant before a pattern or a list is.

    The files of a pattern are in the order of their names, with the numbers in them compared as
    numbers. That a file exists is not checked, unless there are several.

    Raises UserError for a pattern that matches nothing, and for a file that is named twice.
    """
    if isinstance(files, str | os.PathLike):
        text = os.fspath(files)
        parts = [text] if os.path.exists(text) else [part.strip() for part in text.split(",")]
    else:
        parts = [os.fspath(file) for file in files]
    paths = [Path(path) for part in parts for path in _matching(part)]
    if not paths or "" in parts:
        raise UserError(f"{files!r}: names no beton file, or one without a name")
    if len(paths) > 1:
        _refuse_repeated(paths)
    return paths


def file_names(files: str | os.PathLike) -> str:
    """Return the names of beton files without their folders, for a record. See `beton_files`."""
    return ", ".join(Path(part.strip()).name for part in os.fspath(files).split(","))


def _matching(part: str) -> list[str]:
    if os.path.exists(part) or not glob.has_magic(part):
        return [part]
    found = sorted(glob.glob(part, recursive=True), key=natural_order)
    if not found:
        raise UserError(f"{part}: no file matches this pattern; write them with ffssl convert")
    return found


def _refuse_repeated(paths: list[Path]) -> None:
    seen: dict[tuple[int, int], Path] = {}
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read: {error.strerror}; write it with ffssl convert"
            ) from error
        # Also by a link.
        same = seen.setdefault((status.st_dev, status.st_ino), path)
        if same is not path:
            link = "" if same == path else f", as {same}"
            raise UserError(f"{path}: is named twice{link}; name each beton file once")
