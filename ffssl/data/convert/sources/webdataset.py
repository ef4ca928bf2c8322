"""WebDataset shards: tar files in which the files of a sample share their name up to the first dot.

Each shard is scanned once to find where its files begin. Samples are then read from there.
"""

import functools
import glob
import itertools
import os
import re

import numpy as np

from ffssl.data.convert.sources.base import (
    UNLABELLED,
    PackedStrings,
    PassedOver,
    Source,
    kind_of_name,
    number_classes,
)
from ffssl.data.convert.sources.shards import (
    below_common_folder,
    require_all_shards,
    require_distinct,
    require_file,
    require_one_split,
)
from ffssl.data.convert.sources.tar_shard import INSTEAD, Caption, Label, scan
from ffssl.errors import UserError
from ffssl.files import natural_order

_COMPRESSED = re.compile(
    r"\.(tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zstd?|lz4|lzma|z|br))$", re.IGNORECASE
)


class WebDataset(Source):
    """The images (.jpg, .png, .webp, ...) of tar shards, and their labels if there are any.

    patterns: paths with braces ("train-{000..146}.tar", "{a,b}.tar"), wildcards, or folders of tar
        files.
    labels: with False all images are unlabelled.

    A sample's label is the first of these that exists:

    - the integer in .cls;
    - in .json the value of "label", "cls", "class" or "target", an integer or a text; texts are
      numbered as class folders are;
    - the integer in .txt, if every .txt is an integer.

    Files of a sample need not follow each other. Links inside the tar are followed. If no image has
    a key that ends at the first dot, the keys may have dots: names are then split at their last
    dots, if no label loses its image that way.

    Raises UserError for missing, compressed or broken shards, a folder of several splits or without
    all its shards, links that lead out of their shard, and samples with two images or an odd label.
    """

    def __init__(self, patterns: list[str], labels: bool = True):
        self.passed_over = PassedOver()
        patterns = list(map(str, patterns))
        self.shards = [path for pattern in patterns for path in _expand(pattern, self.passed_over)]
        require_distinct(self.shards)
        self.origin = " ".join(patterns)
        keys, rows, found = [], [], []
        for number, path in enumerate(self.shards):
            for image in scan(path, labels, self.passed_over):
                keys.append(image.key)
                rows.append((number, image.offset, image.size))
                found.append(image.label)
        if not rows:
            raise UserError(
                f"{self.origin}: no images in {len(self.shards)} shards{self.passed_over.only()}"
            )
        self._keys = PackedStrings(keys)
        self._rows = np.array(rows, np.int64)
        self.class_names, self._labels = self._number(found)

    def _number(self, found: list[Label]) -> tuple[list[str] | None, np.ndarray]:
        """Return class names, if the labels are texts, and the labels: int64 (n,)."""
        captions = [at for at, label in enumerate(found) if isinstance(label, Caption)]
        are_numbers = all(found[at].number is not None for at in captions)
        if not are_numbers:
            self.passed_over.add(".txt", f"{self.name(captions[0])}.txt", len(captions))
        for at in captions:
            found[at] = found[at].number if are_numbers else None
        text = next((at for at, label in enumerate(found) if isinstance(label, str)), None)
        number = next((at for at, label in enumerate(found) if isinstance(label, int)), None)
        if text is None:
            labels = (UNLABELLED if label is None else label for label in found)
            return None, np.fromiter(labels, np.int64, len(found))
        if number is not None:
            raise UserError(
                f"{self.name(text)}: its label is the text {found[text]!r}, "
                f"and {self.name(number)} has a number; {INSTEAD}"
            )
        return number_classes(found)

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return f"{self.shards[self._rows[index, 0]]}:{self._keys[index]}"

    def load(self, index: int) -> tuple[bytes, int]:
        shard, offset, size = self._rows[index].tolist()
        data = os.pread(_descriptor(self.shards[shard]), size, offset)
        if len(data) != size:
            raise OSError(0, "ends early; has it changed since it was indexed?", self.shards[shard])
        return data, int(self._labels[index])


@functools.lru_cache(maxsize=64)
def _opened(path: str):
    return open(path, "rb", buffering=0)


def _descriptor(path: str) -> int:
    return _opened(path).fileno()


def expand_braces(pattern: str) -> list[str]:
    """Return a pattern with its braces expanded, in every combination, in order.

    Braces are {first..last} ranges, zero-padded as written, and {a,b} lists.
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[part] if i % 2 == 0 else _brace_choices(part) for i, part in enumerate(parts)]
    return ["".join(combination) for combination in itertools.product(*choices)]


def _brace_choices(inside: str) -> list[str]:
    limits = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if not limits:
        return inside.split(",")
    first, last = limits.groups()
    width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
    return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]


def _expand(pattern: str, passed_over: PassedOver) -> list[str]:
    paths = []
    for path in expand_braces(pattern):
        if os.path.isdir(path):
            found = _shards_in(path, passed_over)
        elif os.path.exists(path):
            found = [path]
        else:
            found = sorted(glob.glob(path), key=natural_order)
        if not found:
            raise UserError(
                f"{path}: no such shard; check --input "
                "(quote patterns so that the shell leaves them alone)"
            )
        if found != [path]:
            _, names = below_common_folder(found)
            require_one_split(path, names, "name the shards of one, as 'train-*.tar'")
            require_all_shards(path, names)
        paths += map(require_file, found)
    return paths


def _shards_in(folder: str, passed_over: PassedOver) -> list[str]:
    here = PassedOver()
    found = []
    for entry in os.scandir(folder):
        if entry.is_dir():
            here.add("hidden" if entry.name.startswith(".") else "folders", entry.path)
        elif _COMPRESSED.search(entry.name):
            raise UserError(
                f"{entry.path}: a compressed shard can't be read in any order; "
                "decompress it, or name the shards to take"
            )
        elif not entry.name.startswith(".") and entry.name.lower().endswith(".tar"):
            found.append(entry.path)
        else:
            here.add(kind_of_name(entry.name), entry.path)
    if not found:
        raise UserError(f"{folder}: no .tar in it{here.only()}; name the folder of the shards")
    passed_over.update(here)
    return sorted(found, key=natural_order)
