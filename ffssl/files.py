"""Atomic writes to files, their natural order, and folders locked by one process at a time."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ffssl.errors import UserError

LOCK = ".lock"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside `path` to write to, and rename it to `path` when the block ends.

    If the block raises, the hidden file is deleted. A process killed at any moment leaves `path` as
    it was, or new and complete.
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


def sha256(path: Path) -> str:
    """Return a file's SHA-256, in hexadecimal digits. Raise UserError if it can't be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text atomically, see `replacing`. It survives a power cut."""
    # Names of files may not be UTF-8.
    with (
        replacing(path) as partial,
        open(partial, "w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def write_json(path: Path, content: object) -> None:
    """Write indented JSON, as `write_text` does."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def make_folder(folder: Path, option: str) -> None:
    """Make a folder and its parents. Raise UserError, naming the `option`, if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: {folder} can't be made: {error.strerror}") from error


@contextlib.contextmanager
def exclusive_folder(folder: Path, what: str, option: str) -> Iterator[int]:
    """Lock an existing folder.

    The lock is held by this process and by children that inherit the yielded descriptor. It is
    released when the last of them exits. Raise UserError if another process holds the lock; the
    message calls it a `what`. If the file system has no locks, print a warning and hold nothing.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise UserError(f"{option}: {folder} can't be written to: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{option}: a {what} is under way in {folder} already; wait for it, or "
                "choose another folder"
            ) from None
        except OSError as error:
            print(
                f"warning: {folder}: no lock can be had ({error.strerror}); don't start a "
                f"second {what} in it",
                file=sys.stderr,
            )
        yield descriptor
    finally:
        os.close(descriptor)


def natural_order(text: str) -> list[tuple[bool, int, str]]:
    """Return a sort key by which shard-9 comes before shard-10."""
    return [
        (part.isdecimal(), int(part) if part.isdecimal() else 0, part)
        for part in re.split(r"(\d+)", text)
    ]
