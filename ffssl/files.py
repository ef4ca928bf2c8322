"""Files that are whole, or as they were before."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` to write to: the file there takes the name `path` when the block ends, and goes if the block raises.

    A process that is killed at any moment leaves `path` as it was, or new and whole.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Write indented JSON in place of the file before, see `replacing`."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")
