"""Hugging Face image datasets in Parquet files, as the hub serves them."""

import functools
import glob
import json
from pathlib import Path

import numpy as np

from ffssl.data.sources.base import UNLABELLED, Source, natural_order
from ffssl.errors import UserError


class HuggingFace(Source):
    """Rows of Parquet files with an image column, {bytes, path} or plain bytes, and perhaps an integer label column.

    paths: Parquet files, wildcards, or folders that hold them, in which only those of `split`, named
    SPLIT-*.parquet or under a folder SPLIT, are taken when it is given.
    image_column, label_column: found by type and by the usual names when None.

    Raises UserError for missing or foreign files and columns, and when pyarrow is not installed.
    """

    def __init__(
        self,
        paths: list[str],
        split: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
    ):
        _import_parquet()  # its absence is worth its own message, before any file is looked for
        self.files = [file for path in paths for file in _expand(path, split)]
        self.origin = " ".join(map(str, paths)) + (f", {split}" if split else "")
        schemas = [_opened(file).schema_arrow for file in self.files]
        self.image_column = image_column or _guess_image_column(self.files[0], schemas[0])
        self.label_column = label_column or next(
            (n for n in ("label", "labels", "fine_label") if any(n in schema.names for schema in schemas)), None
        )
        for path, schema in zip(self.files, schemas):
            for column in filter(None, (self.image_column, self.label_column)):
                if column not in schema.names:
                    raise UserError(f"{path}: no column '{column}' (has {', '.join(schema.names)}), which every file needs")
        self.class_names = _class_names(schemas[0], self.label_column)

        groups, labels = [], []
        for number, path in enumerate(self.files):
            file = _opened(path)
            for group in range(file.num_row_groups):
                groups.append((number, group, file.metadata.row_group(group).num_rows))
            labels.append(self._read_labels(file, path))
        self._groups = np.array(groups, np.int64).reshape(-1, 3)
        self._ends = np.cumsum(self._groups[:, 2])
        self._labels = np.concatenate(labels)
        if len(self._labels) == 0:
            raise UserError(f"{self.files[0]}: no rows in it; download it again")

    def _read_labels(self, file, path: str) -> np.ndarray:
        if self.label_column is None:
            return np.full(file.metadata.num_rows, UNLABELLED, np.int64)
        import pyarrow as pa

        try:
            column = file.read(columns=[self.label_column]).column(0)
            return column.cast(pa.int64()).fill_null(UNLABELLED).to_numpy()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: column '{self.label_column}' is not one of class numbers ({error})") from error

    def __len__(self) -> int:
        return len(self._labels)

    def _locate(self, index: int) -> tuple[str, int, int]:
        place = int(np.searchsorted(self._ends, index, side="right"))
        number, group, rows = self._groups[place].tolist()
        return self.files[number], group, index - (int(self._ends[place]) - rows)

    def name(self, index: int) -> str:
        path, group, row = self._locate(index)
        return f"{path}, row group {group}, row {row}"

    def load(self, index: int) -> tuple[bytes, int]:
        path, group, row = self._locate(index)
        cell = _row_group(path, group, self.image_column)[row].as_py()
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if data is None and isinstance(cell, dict) and cell.get("path"):
            data = (Path(path).parent / cell["path"]).read_bytes()
        return data or b"", int(self._labels[index])


def _import_parquet():
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading Parquet files needs pyarrow: pip install 'ffssl[huggingface]'") from None
    return pyarrow.parquet


@functools.lru_cache(maxsize=64)
def _opened(path: str):
    import pyarrow as pa

    try:
        return _import_parquet().ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a sound Parquet file ({error}); download it again") from error


# Neighbouring samples share a row group, and a worker reads runs of neighbours.
@functools.lru_cache(maxsize=1)
def _row_group(path: str, group: int, column: str):
    return _opened(path).read_row_group(group, columns=[column]).column(0)


def _expand(path: str, split: str | None) -> list[str]:
    if Path(path).is_dir():
        found = [str(file) for file in Path(path).rglob("*.parquet")]
        if split:
            found = [
                f for f in found if Path(f).name.startswith((f"{split}-", f"{split}.")) or Path(f).parent.name == split
            ]
    else:
        found = [path] if Path(path).exists() else glob.glob(path)
    if not found:
        of_split = f" of split '{split}'" if split else ""
        raise UserError(f"{path}: no Parquet files{of_split} there; check --input")
    return sorted(found, key=natural_order)


def _guess_image_column(path: str, schema) -> str:
    import pyarrow as pa

    def holds_images(kind) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    columns = [field.name for field in schema if holds_images(field.type)]
    if "image" in columns:
        return "image"
    if len(columns) != 1:
        raise UserError(f"{path}: which column holds the images? (has {', '.join(schema.names)}); pass --image-column")
    return columns[0]


def _class_names(schema, label_column: str | None) -> list[str] | None:
    """The names of a ClassLabel feature, which `datasets` keeps in the schema's metadata."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    if metadata is None or label_column is None:
        return None
    feature = json.loads(metadata).get("info", {}).get("features", {}).get(label_column, {})
    return list(feature["names"]) if "names" in feature else None
