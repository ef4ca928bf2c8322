"""Files that are whole, or as they were before; folders that one process works in at a time."""

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from ffssl.errors import UserError

LOCK = ".lock"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` to write to: the file there takes the name `path` when the block
    ends, and goes if the block raises.

    A process that is killed at any moment leaves `path` as it was, or new and whole.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems refuse it; the rename itself has succeeded
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text in place of the file before, see `replacing`. It survives a power cut."""
    # Names may be no UTF-8.
    with (
        replacing(path) as partial,
        open(partial, "w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def write_json(path: Path, content: object) -> None:
    """Write indented JSON, as `write_text`."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def make_folder(folder: Path, option: str) -> None:
    """Raises UserError, naming the `option`, where it can't be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: {folder} can't be made: {error.strerror}") from error


@contextlib.contextmanager
def exclusive_folder(folder: Path, what: str, option: str) -> Iterator[int]:
    """Hold a folder that is there, for this process and the children that get the descriptor it
    returns; their end, however it comes, frees it.

    Raises UserError if another `what` holds it. Where the file system knows no locks it says so,
    and holds nothing.
    """
    try:
        file = open(folder / LOCK, "a")
    except OSError as error:
        raise UserError(f"{option}: {folder} can't be written to: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{option}: a {what} is under way in {folder} already; wait for it, or "
                "choose another folder"
            ) from None
        except OSError as error:
            print(
                (
                    f"warning: {folder}: no lock can be had ({error.strerror}); don't start a "
                    f"second {what} in it"
                ),
                file=sys.stderr,
            )
        yield file.fileno()
