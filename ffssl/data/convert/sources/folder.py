"""Images in a folder: one folder a class, or unlabelled."""

import bisect
import os
from pathlib import Path

import numpy as np

from ffssl.data.convert.sources.base import IMAGE_SUFFIXES, UNLABELLED, PackedStrings, Source
from ffssl.data.convert.sources.file_tree import LINK_AGAIN, FileTree
from ffssl.data.convert.sources.shards import SPLITS
from ffssl.errors import UserError


class ImageFolder(Source):
    """Images under `root`.

    With class folders, an image's label is the folder's rank by name, as in torchvision's
    ImageFolder. There may be folders inside a class folder. Without class folders, or with
    labels=False, the images are unlabelled.

    Links are followed, and an image that is reached twice is taken once. Hidden files and folders
    are passed over, and so are files whose suffix is not an image's.

    Raises UserError for a missing or empty folder, a class without images, images beside class
    folders, class folders that are the splits of a data set, and a link that puts images of one
    class into another.
    """

    def __init__(self, root: str | os.PathLike, labels: bool = True):
        root = require_folder(root)
        tree = FileTree(root, IMAGE_SUFFIXES)
        paths = tree.paths
        if not paths:
            looked_for = " ".join(sorted(IMAGE_SUFFIXES))
            raise UserError(
                f"{root}: no images in it{tree.passed_over.only()} (looked for {looked_for})"
            )
        class_names = None
        if labels and any(os.sep in path for path in paths):
            _require_one_class_each(tree)
            class_names = _class_folders(root, paths)
        for link, _ in tree.again:
            tree.passed_over.add(LINK_AGAIN, link)
        self.root = root
        self.origin = str(root)
        self.class_names = class_names
        self.passed_over = tree.passed_over
        self._paths = PackedStrings(paths)
        rank = {name: label for label, name in enumerate(class_names or [])}
        self._labels = np.array([rank.get(class_of(path), UNLABELLED) for path in paths], np.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return os.path.join(self.root, self._paths[index])

    def path(self, index: int) -> str:
        """Return the image's path below `root`."""
        return self._paths[index]

    @property
    def labels(self) -> np.ndarray:
        """The images' labels: int64 (n,)."""
        return self._labels

    def digest(self) -> str:
        """Return 16 hexadecimal digits that tell these paths from others."""
        return self._paths.digest()

    def load(self, index: int) -> tuple[bytes, int]:
        with open(self.name(index), "rb") as file:
            return file.read(), int(self._labels[index])


def require_folder(path: str | os.PathLike) -> Path:
    """Return `path` as a Path. Raises UserError unless it is a folder."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such folder; check --input")
    if not path.is_dir():
        raise UserError(f"{path}: is a file, not a folder; name the folder that holds the images")
    return path


def has_subfolders(folder: Path) -> bool:
    return any(entry.is_dir() and not entry.name.startswith(".") for entry in os.scandir(folder))


def class_of(path: str) -> str:
    """Return the first folder of a path. With class folders it is the class."""
    return path.split(os.sep, 1)[0]


def _class_folders(root: Path, paths: list[str]) -> list[str]:
    stray = next((path for path in paths if os.sep not in path), None)
    if stray:
        raise UserError(
            f"{root}: images such as {stray} lie beside class folders; move them into one, "
            "or pass --no-labels"
        )
    filled = {class_of(path) for path in paths}
    _require_no_splits(root, filled, nested=all(path.count(os.sep) > 1 for path in paths))
    class_names = sorted(
        entry.name
        for entry in os.scandir(root)
        if entry.is_dir() and not entry.name.startswith(".")
    )
    empty = sorted(set(class_names) - filled)
    if empty:
        raise UserError(
            f"{root / empty[0]}: class folder without images, which would shift the labels "
            "against other splits; remove it, or pass --no-labels"
        )
    return class_names


def _require_no_splits(root: Path, folders: set[str], nested: bool) -> None:
    """Raise UserError for a data set's root, whose folders are splits and not classes."""
    of_split = {SPLITS[name.lower()]: name for name in sorted(folders) if name.lower() in SPLITS}
    if "train" in of_split and (len(of_split) > 1 or nested and len(folders) == 1):
        names = ", ".join(sorted(of_split.values()))
        raise UserError(
            f"{root}: looks like the root of a data set, whose folders ({names}) are splits, "
            f"not classes; name one, such as {root / of_split['train']}, "
            "or pass --no-labels to take all"
        )


def _require_one_class_each(tree: FileTree) -> None:
    """Raise UserError for a link that puts an image into two classes."""
    for link, target in tree.again:
        place = bisect.bisect_left(tree.paths, target)
        holds_images = place < len(tree.paths) and tree.paths[place].startswith(target)
        if holds_images and class_of(link) != class_of(target):
            raise UserError(
                f"{tree.root / link}: leads to {tree.root / target}, which would put its images "
                "into two classes; remove the link, or pass --no-labels"
            )
