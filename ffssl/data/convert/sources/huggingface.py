"""Hugging Face image datasets in Parquet files, as the hub serves them."""

import functools
import glob
import json
import os
from pathlib import Path

import numpy as np

from ffssl.data.convert.sources.base import (
    UNLABELLED,
    PassedOver,
    Source,
    as_label,
    number_classes,
)
from ffssl.data.convert.sources.file_tree import LINK_AGAIN, FileTree
from ffssl.data.convert.sources.shards import (
    SPLITS,
    below_common_folder,
    require_all_shards,
    require_distinct,
    require_file,
    require_one_split,
    split_of,
)
from ffssl.errors import UserError
from ffssl.files import natural_order

_USUAL_LABELS = ("label", "labels", "fine_label")


class HuggingFace(Source):
    """Rows of Parquet files with a column of images and perhaps one of labels.

    paths: Parquet files, wildcards, or folders that hold them.
    split: take only the files of this split, if given.
    image_column: holds {bytes, path} or bytes. By default it is found by the schema and by the
        usual names.
    label_column: found likewise by default.
    labels: with False all images are unlabelled.

    Labels are class numbers or texts. The names of class numbers are read from the schema's
    metadata, if `datasets` has written them there. Texts are numbered as class folders are. If a
    file lists the classes in another order than the first file, its numbers are translated.

    Raises UserError for missing or foreign files and columns, a folder of several splits or without
    all its shards, files with other classes, and when pyarrow is not installed.
    """

    def __init__(
        self,
        paths: list[str],
        split: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        labels: bool = True,
    ):
        _import_parquet()  # if it is missing, say so before looking for any file
        self.passed_over = PassedOver()
        self.files = [
            file for path in paths for file in _expand(str(path), split, self.passed_over)
        ]
        require_distinct(self.files)
        self.origin = " ".join(map(str, paths)) + (f", {split}" if split else "")
        schemas = [_opened(file).schema_arrow for file in self.files]
        features = [_features(*pair) if labels else {} for pair in zip(self.files, schemas)]
        self.image_column = image_column or _guess_image_column(
            self.files[0], schemas[0], features[0]
        )
        self.label_column = None
        if labels:
            self.label_column = label_column or _guess_label_column(self.files, schemas, features)
        for path, schema in zip(self.files, schemas):
            for column in filter(None, (self.image_column, self.label_column)):
                if column not in schema.names:
                    raise UserError(
                        f"{path}: no column '{column}' (has {', '.join(schema.names)}), "
                        "which every file needs"
                    )
            kind = schema.field(self.image_column).type
            if not _holds_images(kind):
                raise UserError(f"{path}: column '{self.image_column}' holds no images but {kind}")

        groups = []
        for number, path in enumerate(self.files):
            file = _opened(path)
            for group in range(file.num_row_groups):
                groups.append((number, group, file.metadata.row_group(group).num_rows))
        self._groups = np.array(groups, np.int64).reshape(-1, 3)
        self._ends = np.cumsum(self._groups[:, 2])
        if self._groups[:, 2].sum() == 0:
            raise UserError(f"{self.files[0]}: no rows in it; download it again")
        if self.label_column is None:
            self._labels = np.full(self._ends[-1], UNLABELLED, np.int64)
        else:
            self.class_names, self._labels = _read_labels(self.files, features, self.label_column)

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
        raise UserError(
            "reading Parquet files needs pyarrow: pip install 'ffssl[huggingface]'"
        ) from None
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


def _expand(path: str, split: str | None, passed_over: PassedOver) -> list[str]:
    if os.path.exists(path) and not os.path.isdir(path):
        return [require_file(path)]
    if os.path.isdir(path):
        tree = FileTree(Path(path), frozenset({".parquet"}))
        root, there, left_out = path, tree.paths, tree.passed_over
        for link, _ in tree.again:
            left_out.add(LINK_AGAIN, link)
    else:
        files, left_out = list(map(require_file, glob.glob(path))), PassedOver()
        root, there = below_common_folder(files) if files else ("", [])
    found = sorted((f for f in there if split is None or _is_of(f, split)), key=natural_order)
    for file in set(there).difference(found):
        left_out.add("of other splits", file)
    if not found:
        of_split = f" of split '{split}'" if split else ""
        raise UserError(f"{path}: no Parquet files{of_split} there{left_out.only()}; check --input")
    passed_over.update(left_out)
    if split is None:
        require_one_split(path, found, "pass --split")
    require_all_shards(path, found)
    return [os.path.join(root, file) for file in found]


def _is_of(file: str, split: str) -> bool:
    """Return whether a Parquet file is of that split, by its own name or its folder's."""
    named = split_of(file)
    if named:
        return named in (split, SPLITS.get(split))
    return (
        os.path.basename(file).startswith((f"{split}-", f"{split}."))
        or split in Path(file).parent.parts
    )


def _features(path: str, schema) -> dict[str, dict]:
    """Return what `datasets` has written about each column into the schema's metadata."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    try:
        content = (json.loads(metadata) if metadata else None) or {}
        features = (content.get("info") or {}).get("features") or {}
        for column, feature in features.items():
            # Anything but a dictionary describes a nested column, which holds no labels.
            names = feature.get("names") if isinstance(feature, dict) else None
            if not all(isinstance(name, str) for name in names or []):
                raise ValueError(f"names of '{column}'")
        return {column: value for column, value in features.items() if isinstance(value, dict)}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path}: the metadata of its columns are damaged ({error}); "
            "download it again, or pass --no-labels"
        ) from error


def _holds_images(kind) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _guess_image_column(path: str, schema, features: dict[str, dict]) -> str:
    columns = [field.name for field in schema if _holds_images(field.type)]
    declared = [column for column in columns if features.get(column, {}).get("_type") == "Image"]
    for candidates in (declared, columns):
        if "image" in candidates:
            return "image"
        if len(candidates) == 1:
            return candidates[0]
    has = ", ".join(schema.names)
    raise UserError(f"{path}: which column holds the images? (has {has}); pass --image-column")


def _guess_label_column(
    paths: list[str], schemas: list, features: list[dict[str, dict]]
) -> str | None:
    declared = dict.fromkeys(
        column
        for of_file in features
        for column, feature in of_file.items()
        if feature.get("_type") == "ClassLabel"
    )
    there = {name for schema in schemas for name in schema.names}
    candidates = declared or there
    usual = next((name for name in _USUAL_LABELS if name in candidates), None)
    if usual is None and len(declared) > 1:
        columns = ", ".join(declared)
        raise UserError(
            f"{paths[0]}: which column holds the labels? ({columns}); "
            "pass --label-column or --no-labels"
        )
    return usual or next(iter(declared), None)


def _read_labels(
    paths: list[str], features: list[dict[str, dict]], column: str
) -> tuple[list[str] | None, np.ndarray]:
    """Return class names, if there are any, and the labels of all rows: int64 (n,)."""
    import pyarrow as pa

    read = []
    for path in paths:
        try:
            values = _opened(path).read(columns=[column]).column(0)
            if pa.types.is_dictionary(values.type):  # as pandas stores categories
                values = values.cast(values.type.value_type)
            is_text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
            read.append(values if is_text else values.cast(pa.int64()))
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{path}: column '{column}' is not one of class numbers or names ({error}); "
                "pass --label-column or --no-labels"
            ) from error
    numbers = [path for path, values in zip(paths, read) if values.type == pa.int64()]
    if not numbers:
        return _number_texts([text for values in read for text in values.to_pylist()])
    texts = sorted(set(paths).difference(numbers))
    if texts:
        raise UserError(
            f"{texts[0]}: column '{column}' holds texts, and numbers in {numbers[0]}; "
            "convert them one by one, or pass --no-labels"
        )
    names = [of_file.get(column, {}).get("names") for of_file in features]
    labels = [
        _in_order_of(names[0], own, values, f"{path}: column '{column}'", paths[0])
        for path, own, values in zip(paths, names, read)
    ]
    return names[0], np.concatenate(labels)


def _number_texts(texts: list[str | None]) -> tuple[list[str] | None, np.ndarray]:
    numbers = [as_label(text) for text in texts if text is not None]
    if None in numbers:
        return number_classes(texts)
    # Texts that are numbers keep them: ranked as texts, 10 would come before 9.
    found = iter(numbers)
    return None, np.array([UNLABELLED if text is None else next(found) for text in texts], np.int64)


def _in_order_of(
    names: list[str] | None, own: list[str] | None, column, what: str, first: str
) -> np.ndarray:
    """Translate class numbers from the order of `own` into the order of `names`."""
    labels = column.fill_null(UNLABELLED).to_numpy()
    if own and (labels.min(initial=0) < UNLABELLED or labels.max(initial=0) >= len(own)):
        odd = labels[(labels < UNLABELLED) | (labels >= len(own))][0]
        raise UserError(
            f"{what} holds {odd}, and has {len(own)} names; download it again, or pass --no-labels"
        )
    if (own or None) == (names or None):
        return labels
    odd = sorted(set(own or []) ^ set(names or []))
    if odd or len(set(own)) != len(own):
        which = f"such as {odd[0]!r}" if odd else "some of them twice"
        raise UserError(
            f"{what} has other classes than {first}, {which}; "
            "convert them one by one, or pass --no-labels"
        )
    rank = np.array([*map(names.index, own), UNLABELLED], np.int64)  # the last is that of -1
    return rank[labels]
