"""Several beton files as if they were one."""

import numpy as np

from ffssl.data.beton.description import class_names, description_path
from ffssl.data.beton.files import Files, beton_files
from ffssl.data.beton.read import (
    MIN_PAGE_SIZE,
    UNLABELLED,
    Beton,
    BetonFile,
    describe_fields,
    read_beton,
)
from ffssl.errors import UserError

# Between the files' first bytes: a multiple of the memory page of every machine, so that the tables
# do not depend on the machine.
_ALIGNMENT = MIN_PAGE_SIZE


def read_betons(files: Files, label_field: str | None = None) -> Beton:
    """Read the tables of one beton file or several, see `beton_files` and `read_beton`.

    The samples of several files follow each other in the files' order: sample i of a file is number
    i + n, if there are n samples in the files before it. Parts of a source, in their order, thus
    are the file of the whole source.

    Where the files' class names differ, labels are numbered anew by name, see `class_names`. A file
    without labels is unlabelled (UNLABELLED).

    Raises UserError, which names the file, also if its labels can't be told from another's: they
    lie in a field of another name, or only one of the files has class names.
    """
    paths = beton_files(files)
    parts = [read_beton(path, label_field) for path in paths]
    return parts[0] if len(parts) == 1 else _joined(parts)


def _joined(parts: list[Beton]) -> Beton:
    sizes = [part.files[0].size for part in parts]
    counts = [len(part) for part in parts]
    starts = np.cumsum([0, *(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)])[:-1]
    firsts = np.cumsum([0, *counts])[:-1]
    images = np.concatenate([part.images for part in parts])
    images["data_ptr"] += np.repeat(starts.astype(np.uint64), counts)
    pointers = [part.pointers + np.uint64(start) for part, start in zip(parts, starts)]
    model = _with_field_of_labels(parts)
    labels = None if model.labels is None else np.concatenate(_labels_by_name(parts))
    named_labels = [_or_unlabelled(part.named_labels, len(part)) for part in parts]
    joined = Beton(
        tuple(
            BetonFile(part.files[0].path, size, start, first)
            for part, size, start, first in zip(parts, sizes, starts.tolist(), firsts.tolist())
        ),
        images,
        np.concatenate([part.image_sizes for part in parts]),
        labels,
        np.concatenate(pointers),
        np.concatenate([part.sizes for part in parts]),
        max(part.page_size for part in parts),
        model.fields,
        model.label_field,
        np.concatenate(named_labels),
    )
    joined.protect()
    return joined


def _with_field_of_labels(parts: list[Beton]) -> Beton:
    """Return a file that says which field holds the labels; refuse one that says otherwise."""
    able = [part for part in parts if part.may_have_labels]
    first = next((part for part in able if part.labels is not None), (able or parts)[0])
    for part in able:
        if part.label_field != first.label_field:
            raise UserError(
                f"{part.name}: its labels are not in the field '{first.label_field}', as those of "
                f"{first.name}; its fields: {describe_fields(part.fields)}; convert both alike"
            )
    return first


def _labels_by_name(parts: list[Beton]) -> list[np.ndarray]:
    """Return each file's labels, int64 (n,), numbered by the class names of all files."""
    labels = [_or_unlabelled(part.labels, len(part)) for part in parts]
    paths = [part.files[0].path for part in parts]
    names = [class_names([path]) for path in paths]
    common = class_names(paths)
    if common is None:
        return labels
    has_names = paths[next(i for i, own in enumerate(names) if own is not None)]
    for i, (path, own) in enumerate(zip(paths, names)):
        if own is None and (labels[i] != UNLABELLED).any():
            raise UserError(
                f"{path}: has labels without class names, and {has_names} has names; copy "
                f"{description_path(path).name} beside it, or convert both alike"
            )
        if own is not None and own != common:
            labels[i] = _renumbered(labels[i], own, common, f"{path}: its classes")
    return labels


def _renumbered(labels: np.ndarray, names: list[str], common: list[str], what: str) -> np.ndarray:
    number = {name: label for label, name in enumerate(common)}
    table = np.array([number[name] for name in names], np.int64)
    if len(np.unique(table)) < len(names):
        raise UserError(f"{what} can't be told by name: two have one name; convert it again")
    known = labels != UNLABELLED
    unnamed = labels[known & ((labels < 0) | (labels >= len(names)))]
    if len(unnamed):
        raise UserError(f"{what} can't be told by name: {unnamed[0]} has none; convert it again")
    return np.where(known, table[np.where(known, labels, 0)], UNLABELLED)


def _or_unlabelled(labels: np.ndarray | None, count: int) -> np.ndarray:
    return np.full(count, UNLABELLED) if labels is None else labels
