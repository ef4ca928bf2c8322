"""Files of features, written batch by batch, that a killed process leaves fit to be continued.

    features.npy      float32 (n, d); numpy.load(..., mmap_mode="r") maps it
    features.csv      a line for each row: image, label
    features.json     what computed them, and the images that were left out

Or features.parquet, with columns image, label and features, in place of the first two. Until all is
written, hidden files hold it: .features.npy.features, .csv and .json.
"""

import contextlib
import csv
import fcntl
import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from ffssl.data.beton.read import UNLABELLED
from ffssl.errors import UserError
from ffssl.files import replacing, write_json

SUFFIXES = (".npy", ".parquet")
SECONDS_BETWEEN_SAVES = 5
_ROWS_AT_ONCE = 8192


class FeatureFile:
    """Features of images in order, appended batch by batch.

    output: a path that ends in .npy or .parquet. identity: what decides the features; a file that
    was begun with another one is not continued. width: length of a feature vector. images: how many
    there are. overwrite: replace what is there, and begin anew.

    done: images that are finished, readable or not. skipped: (name, reason) of those left out.

    Use it in a with block: on leaving, what is done is saved. Raise UserError, naming the file, if
    it can't be written, if it is there already, or if another process writes it.
    """

    def __init__(
        self,
        output: Path,
        identity: dict[str, object],
        *,
        width: int,
        images: int,
        overwrite: bool = False,
    ):
        self.output, self._identity, self._width = output, identity, width
        hidden = output.with_name(f".{output.name}")
        self._unfinished, self._table_path, self._state_path = (
            hidden.with_name(hidden.name + suffix) for suffix in (".features", ".csv", ".json")
        )
        self.done, self.rows, self.skipped = 0, 0, []
        self._table_bytes, self._saved = 0, time.monotonic()
        self._description = output.with_suffix(".json")
        self._final_table = output.with_suffix(".csv")
        beside = () if output.suffix == ".parquet" else (self._final_table,)
        for path in (output, self._description, *beside):
            if path.exists() and not overwrite:
                raise UserError(f"--output: {path} exists already; pass --overwrite to replace it")
        with self._writing(), contextlib.ExitStack() as stack:
            self._file = stack.enter_context(open(self._unfinished, "ab"))
            self._lock()
            self._table = stack.enter_context(open(self._table_path, "ab"))
            before = None if overwrite else self._state()
            if before:
                self.done, self.rows, self._table_bytes = (
                    before[key] for key in ("done", "rows", "table_bytes")
                )
                self.skipped = [tuple(one) for one in before["skipped"]]
            else:
                self._file.truncate(0)
                self._file.write(self._header(images))
                self._file.flush()
            # What was written after the state was saved is written again.
            self._file.truncate(len(self._header(images)) + 4 * width * self.rows)
            self._table.truncate(self._table_bytes)
            self._files = stack.pop_all()

    def __enter__(self) -> "FeatureFile":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if not self._file.closed:
                self.save()
        except UserError:
            if kind is None:
                raise
        finally:
            self._close()

    def add(
        self,
        features: np.ndarray,
        names: Sequence[str | int],
        labels: Sequence[int],
        skipped: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Append the features (n, width) of n images, and say which images are left out."""
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows(
            (name, "" if label == UNLABELLED else label) for name, label in zip(names, labels)
        )
        # Names of files may not be UTF-8; so their bytes are kept.
        table = lines.getvalue().encode("utf-8", "surrogateescape")
        with self._writing():
            self._file.write(np.ascontiguousarray(features, "<f4").data)
            self._table.write(table)
            self._file.flush()
            self._table.flush()
        self.rows += len(features)
        self._table_bytes += len(table)
        self.skipped += skipped
        self.done += len(features) + len(skipped)
        if time.monotonic() > self._saved + SECONDS_BETWEEN_SAVES:
            self.save()

    def save(self) -> None:
        """Make what is done outlast a power cut. The next process continues from here."""
        state = {
            "identity": self._identity,
            "done": self.done,
            "rows": self.rows,
            "table_bytes": self._table_bytes,
            "skipped": self.skipped,
        }
        with self._writing():
            os.fsync(self._file.fileno())
            os.fsync(self._table.fileno())
            write_json(self._state_path, state)
        self._saved = time.monotonic()

    def finish(self, description: dict[str, object]) -> None:
        """Give the files their names. description: goes into the JSON file."""
        with self._writing():
            self._file.close()
            self._table.close()
            with open(self._unfinished, "r+b") as file:
                file.write(self._header(self.rows))
                os.fsync(file.fileno())
            if self.output.suffix == ".parquet":
                _write_parquet(self.output, self._unfinished, self._table_path)
            else:
                with replacing(self._final_table) as table:
                    _with_heading(self._table_path, table)
            write_json(self._description, description)
            if self.output.suffix == ".npy":
                os.replace(self._unfinished, self.output)
            self.discard()

    def discard(self) -> None:
        """Close the hidden files, and delete them."""
        self._close()
        for path in (self._state_path, self._table_path, self._unfinished):
            path.unlink(missing_ok=True)

    def _close(self) -> None:
        with contextlib.suppress(OSError):  # of what a full disk did not take
            self._files.close()

    def _header(self, rows: int) -> bytes:
        """Return the file's header. NumPy leaves room in it for any number of rows."""
        header = io.BytesIO()
        content = {"descr": "<f4", "fortran_order": False, "shape": (rows, self._width)}
        np.lib.format.write_array_header_1_0(header, content)
        return header.getvalue()

    def _state(self) -> dict | None:
        """Return the state of what was begun, or None. Raise UserError if it is of other things."""
        try:
            state = json.loads(self._state_path.read_text())
            before, header = state["identity"], len(self._header(0))
            whole = (
                self._unfinished.stat().st_size >= header + 4 * self._width * state["rows"]
                and self._table_path.stat().st_size >= state["table_bytes"]
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        now = json.loads(json.dumps(self._identity))
        if differs := [
            key for key in now.keys() | before.keys() if now.get(key) != before.get(key)
        ]:
            raise UserError(
                f"--output: {self.output} was begun with other {' and '.join(sorted(differs))}; "
                "pass --overwrite to begin anew, or name another file"
            )
        return state if whole else None

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--output: another process is writing {self.output}; wait for it, or name "
                "another file"
            ) from None
        except OSError:
            pass  # this file system has no locks

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = "; the same command continues with what is done" if self.done else ""
            raise UserError(
                f"--output: {self.output} can't be written: {error.strerror}{kept}"
            ) from error


def check_output(output: Path) -> None:
    """Raise UserError unless a path has one of SUFFIXES, and what it needs is installed."""
    if output.suffix not in SUFFIXES:
        raise UserError(f"--output: {output}: must end in {' or '.join(SUFFIXES)}")
    if output.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise UserError(
                f"--output: {output}: writing Parquet files needs pyarrow: "
                "pip install 'ffssl[parquet]'; or name a .npy file"
            ) from None


def _with_heading(table: Path, target: Path) -> None:
    with open(table, "rb") as source, open(target, "wb") as file:
        file.write(b"image,label\n")
        while piece := source.read(1 << 20):
            file.write(piece)


def _write_parquet(output: Path, features: Path, table: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    values = np.load(features, mmap_mode="r")
    width = values.shape[1]
    types = {"image": pa.string(), "label": pa.int64(), "features": pa.list_(pa.float32(), width)}
    schema = pa.schema(list(types.items()))
    # Parquet's strings are UTF-8: other bytes of a name are written as \xe9.
    with (
        open(table, encoding="utf-8", errors="backslashreplace", newline="") as lines,
        replacing(output) as partial,
        pa.parquet.ParquetWriter(partial, schema) as writer,
    ):
        rows = csv.reader(lines)
        for start in range(0, len(values), _ROWS_AT_ONCE):
            part = np.ascontiguousarray(values[start : start + _ROWS_AT_ONCE])
            names, labels = zip(*islice(rows, len(part)))
            columns = [
                pa.array(names, pa.string()),
                pa.array([int(label) if label else None for label in labels], pa.int64()),
                pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), width),
            ]
            writer.write_table(pa.table(columns, schema=schema))
