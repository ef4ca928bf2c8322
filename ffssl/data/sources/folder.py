"""Images in a folder: one folder a class, or unlabelled."""

import os
from pathlib import Path

import numpy as np

from ffssl.data.sources.base import IMAGE_SUFFIXES, UNLABELLED, PackedStrings, Source
from ffssl.errors import UserError


class ImageFolder(Source):
    """Images under `root`. With class folders, the label is the folder's rank by name, as in torchvision's ImageFolder.

    Class folders may be nested inside. Without any, or with labels=False, the images are unlabelled. Hidden files and
    folders are passed over. Raises UserError for a missing or empty folder, a class without images, and images beside
    class folders.
    """

    def __init__(self, root: str | os.PathLike, labels: bool = True):
        root = require_folder(root)
        paths = sorted(_image_paths(root))
        if not paths:
            raise UserError(f"{root}: no images in it (looked for {' '.join(sorted(IMAGE_SUFFIXES))})")
        class_names = None
        if labels and any(os.sep in path for path in paths):
            class_names = _class_folders(root, paths)
        self.root = root
        self.origin = str(root)
        self.class_names = class_names
        self._paths = PackedStrings(paths)
        rank = {name: label for label, name in enumerate(class_names or [])}
        self._labels = np.array([rank.get(path.split(os.sep, 1)[0], UNLABELLED) for path in paths], np.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return os.path.join(self.root, self._paths[index])

    def load(self, index: int) -> tuple[bytes, int]:
        with open(self.name(index), "rb") as file:
            return file.read(), int(self._labels[index])


def require_folder(path: str | os.PathLike) -> Path:
    """`path` as a Path. Raises UserError unless it is a folder."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such folder; check --input")
    if not path.is_dir():
        raise UserError(f"{path}: is a file, not a folder; name the folder that holds the images")
    return path


def has_subfolders(folder: Path) -> bool:
    return any(entry.is_dir() and not entry.name.startswith(".") for entry in os.scandir(folder))


def _image_paths(root: Path):
    """Paths of the images under `root`, relative to it. Links are followed, as torchvision does."""

    def refuse(error: OSError):
        raise UserError(f"{error.filename}: cannot be listed: {error.strerror}; check its permissions")

    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        prefix = os.path.relpath(folder, root)
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                yield name if prefix == "." else os.path.join(prefix, name)


def _class_folders(root: Path, paths: list[str]) -> list[str]:
    stray = next((path for path in paths if os.sep not in path), None)
    if stray:
        raise UserError(
            f"{root}: images such as {stray} lie beside class folders; move them into one, or pass --no-labels"
        )
    class_names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    empty = sorted(set(class_names) - {path.split(os.sep, 1)[0] for path in paths})
    if empty:
        raise UserError(
            f"{root / empty[0]}: class folder without images, which would shift the labels against other splits; "
            "remove it, or pass --no-labels"
        )
    return class_names
