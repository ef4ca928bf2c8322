"""ImageNet (ILSVRC 2012), extracted.

There is a folder a class, or the validation images lie in one folder and the devkit has their
labels. In both cases labels are ranks of the sorted WordNet ids, the order that torchvision and
published weights use.
"""

import codecs
import io
import os
import re
import tarfile
from pathlib import Path

import numpy as np

from ffssl.data.convert.sources.base import PackedStrings
from ffssl.data.convert.sources.folder import ImageFolder, class_of, has_subfolders, require_folder
from ffssl.errors import UserError

_SPLIT_FOLDERS = ("{}", "ILSVRC2012_img_{}", "Data/CLS-LOC/{}", "ILSVRC/Data/CLS-LOC/{}")
_DEVKITS = (
    "ILSVRC2012_devkit_t12",
    "ILSVRC2012_devkit_t12.tar.gz",
    "devkit",
    "LOC_val_solution.csv",
)
_CLASS_ID = re.compile(r"n\d{8}")
_VALIDATION_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\.", re.IGNORECASE)
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


class ImageNet(ImageFolder):
    """One split of ImageNet.

    root: the folder that holds the split's folder, or the images themselves.
    split: "train" or "val".
    val_labels: labels of validation images that do not all lie in class folders; looked for beside
        them when None. Either the devkit (its folder or .tar.gz; reading its meta.mat needs scipy),
        or a text file such as Kaggle's LOC_val_solution.csv: in each line a file name and a WordNet
        id, separated by a space or a comma. All images named there are found, wherever they lie
        below the split's folder.

    Raises UserError when images or labels are missing or do not match.
    """

    def __init__(
        self, root: str | os.PathLike, split: str, val_labels: str | os.PathLike | None = None
    ):
        root = require_folder(root)
        folders = (root / pattern.format(split) for pattern in _SPLIT_FOLDERS)
        folder = next((folder for folder in folders if folder.is_dir()), root)
        by_name = split == "val" and (val_labels is not None or _is_flat(folder))
        if has_subfolders(folder) and not by_name:
            _require_class_ids(folder, split)
            super().__init__(folder)
            return
        if split == "train":
            raise UserError(
                f"{folder}: no class folders in it; extract ILSVRC2012_img_train.tar, "
                "one folder a class"
            )
        super().__init__(folder, labels=False)
        labels = _find_labels(val_labels, [folder, folder.parent, root, root.parent])
        wnid_of = _read_devkit(labels) if _is_devkit(labels) else _read_label_file(labels)
        self._label_by_name(labels, wnid_of)

    def _label_by_name(self, labels: Path, wnid_of: dict[str, str]) -> None:
        """Label images by name. Some may lie in class folders, as after an interrupted move."""
        path_of: dict[str, str] = {}
        unknown = []
        for path in self._paths:
            stem, folder = _stem(path), class_of(path)
            in_class = os.sep in path and bool(_CLASS_ID.fullmatch(folder))
            if stem not in wnid_of:
                # If `root` itself holds the images, those of another split may lie below it.
                if os.sep in path and not in_class:
                    self.passed_over.add("not of the validation images", path)
                else:
                    unknown.append(path)
                continue
            if stem in path_of:
                other = self.root / path_of[stem]
                raise UserError(f"{self.root / path}: is also at {other}; remove one of them")
            if in_class and folder != wnid_of[stem]:
                raise UserError(
                    f"{self.root / path}: {labels} says class {wnid_of[stem]}; "
                    "move it there, or correct that"
                )
            path_of[stem] = path
        if unknown:
            raise UserError(
                f"{self.root / unknown[0]}: no label for it in {labels} "
                f"({len(unknown)} such images)"
            )
        missing = sorted(wnid_of.keys() - path_of.keys())
        if missing:
            raise UserError(
                f"{self.root}: {missing[0]} is not in it, though {labels} names it "
                f"({len(missing)} such images); extract or move it there, "
                "or pass a --val-labels that names only what is there"
            )
        paths = sorted(path_of.values())
        self._paths = PackedStrings(paths)
        self.class_names = sorted(set(wnid_of.values()))
        rank = {wnid: label for label, wnid in enumerate(self.class_names)}
        self._labels = np.array([rank[wnid_of[_stem(path)]] for path in paths], np.int64)


def _require_class_ids(folder: Path, split: str) -> None:
    # If the split's folder is missing, those of other splits would count as classes.
    names = sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_dir() and not entry.name.startswith(".")
    )
    odd = next((name for name in names if not _CLASS_ID.fullmatch(name)), None)
    if odd:
        looked_for = " or ".join(pattern.format(split) for pattern in _SPLIT_FOLDERS)
        raise UserError(
            f"{folder / odd}: not a class of ImageNet, whose folders are named like n01440764; "
            f"--input must hold those, or {looked_for} with them in it"
        )


def _stem(path: str) -> str:
    return os.path.basename(path).rsplit(".", 1)[0]


def _is_flat(folder: Path) -> bool:
    return any(_VALIDATION_NUMBER.match(entry.name) for entry in os.scandir(folder))


def _is_devkit(path: Path) -> bool:
    return path.is_dir() or path.name.endswith((".tar.gz", ".tgz", ".tar"))


def _find_labels(given: str | os.PathLike | None, places: list[Path]) -> Path:
    candidates = [Path(given)] if given else [place / name for place in places for name in _DEVKITS]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    where = given or f"{_DEVKITS[0]} or {_DEVKITS[-1]} beside {places[0]}"
    raise UserError(
        f"{where}: not found, and without it the validation images have no labels; "
        "name it: --val-labels"
    )


def _read_label_file(path: Path) -> dict[str, str]:
    """Return the WordNet id of each file name without its suffix."""
    data = path.read_bytes()
    # Spreadsheets write a byte-order mark, quotes, and semicolons for commas.
    is_utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if is_utf_16 else "utf-8-sig", "replace")
    wnid_of: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        columns = re.sub("[,;\"']", " ", line).split()
        # Kaggle's file has a title line.
        if not columns or (number == 1 and columns[0].lower() == "imageid"):
            continue
        if len(columns) < 2 or not _CLASS_ID.fullmatch(columns[1]):
            raise UserError(
                f"{path}, line {number}: expected a file name and a WordNet id such as n01440764"
            )
        stem = re.sub(r"\.jpe?g$", "", os.path.basename(columns[0]), flags=re.IGNORECASE)
        if wnid_of.setdefault(stem, columns[1]) != columns[1]:
            raise UserError(
                f"{path}, line {number}: another class for {stem} than before; "
                "remove one of the lines"
            )
    return wnid_of


def _read_devkit(path: Path) -> dict[str, str]:
    """Return the WordNet id of each file name without its suffix, from the devkit.

    Line k of its ground truth is the ILSVRC2012_ID of validation image k.
    """
    try:
        truth, meta = _devkit_file(path, _GROUND_TRUTH), _devkit_file(path, "meta.mat")
        wnid_of_id = _read_meta(path, meta)
        ids = [int(word) for word in truth.split()]
        return {
            f"ILSVRC2012_val_{number:08d}": wnid_of_id[i] for number, i in enumerate(ids, start=1)
        }
    except (OSError, tarfile.TarError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: not a sound ILSVRC2012 devkit ({error}); download it again"
        ) from error


def _devkit_file(path: Path, name: str) -> bytes:
    if path.is_dir():
        for place in (path / "data", path, path / "ILSVRC2012_devkit_t12" / "data"):
            if (place / name).is_file():
                return (place / name).read_bytes()
    else:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and os.path.basename(member.name) == name:
                    return archive.extractfile(member).read()
    raise KeyError(f"{name} is not in it")


def _read_meta(path: Path, meta: bytes) -> dict[int, str]:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(
            f"{path}: reading its meta.mat needs scipy: pip install scipy, or pass "
            "--val-labels LOC_val_solution.csv"
        ) from None
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
    # Scipy's parser raises nearly anything, its own MatReadError among it.
    except Exception as error:
        raise ValueError(f"meta.mat: {error}") from error
    # Inner nodes of the WordNet tree are listed as well. The classes are its leaves.
    return {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
