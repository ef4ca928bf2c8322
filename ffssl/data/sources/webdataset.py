"""WebDataset shards: tar files in which files of one sample follow each other and share their name up to the first dot.

Each shard is scanned once for where its files begin; samples are then read from there.
"""

import functools
import glob
import itertools
import os
import re
import tarfile
from pathlib import Path

import numpy as np

from ffssl.data.sources.base import IMAGE_SUFFIXES, UNLABELLED, PackedStrings, Source, natural_order
from ffssl.errors import UserError


class WebDataset(Source):
    """The images (.jpg, .jpeg, .png, .webp, ...) and labels (.cls, an integer; optional) of tar shards.

    patterns: paths with braces ("train-{000..146}.tar", "{a,b}.tar"), wildcards, or folders of tar files.
    Raises UserError for missing, compressed or broken shards, and samples with two images or an odd label.
    """

    def __init__(self, patterns: list[str]):
        self.shards = [shard for pattern in patterns for shard in _expand(pattern)]
        self.origin = " ".join(map(str, patterns))
        keys, rows = [], []
        for number, shard in enumerate(self.shards):
            for key, offset, size, label in _scan(shard):
                keys.append(key)
                rows.append((number, offset, size, label))
        if not rows:
            raise UserError(
                f"{' '.join(patterns)}: no images in {len(self.shards)} shards (looked for .jpg, .png, ...)"
            )
        self._keys = PackedStrings(keys)
        self._rows = np.array(rows, np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return f"{self.shards[self._rows[index, 0]]}:{self._keys[index]}"

    def load(self, index: int) -> tuple[bytes, int]:
        shard, offset, size, label = self._rows[index].tolist()
        data = os.pread(_descriptor(self.shards[shard]), size, offset)
        if len(data) != size:
            raise OSError(0, "ends early; has it changed since it was indexed?", self.shards[shard])
        return data, label


@functools.lru_cache(maxsize=64)
def _opened(path: str):
    return open(path, "rb", buffering=0)


def _descriptor(path: str) -> int:
    return _opened(path).fileno()


def expand_braces(pattern: str) -> list[str]:
    """Every combination of a pattern's {first..last} ranges, zero-padded as written, and {a,b} lists, in order."""
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


def _expand(pattern: str) -> list[str]:
    paths = []
    for path in expand_braces(str(pattern)):
        if Path(path).is_dir():
            found = [str(entry) for entry in Path(path).glob("*.tar")]
        else:
            found = [path] if Path(path).exists() else glob.glob(path)
        if not found:
            raise UserError(
                f"{path}: no such shard; check --input (quote patterns so that the shell leaves them alone)"
            )
        paths.extend(sorted(found, key=natural_order))
    return paths


def _scan(shard: str):
    """Yield (key, offset, size, label) of each image in the order of the shard."""
    try:
        with tarfile.open(shard, "r:") as archive:
            members = (member for member in archive if member.isfile() and not _is_hidden(member.name))
            for key, group in itertools.groupby(members, key=lambda member: _split_name(member.name)[0]):
                found = _scan_sample(archive, f"{shard}:{key}", list(group))
                if found:
                    yield key, *found
            _require_end(archive, shard)
    except tarfile.TarError as error:
        raise UserError(
            f"{shard}: not a sound, uncompressed tar file ({error}); decompress or download it again"
        ) from error
    except OSError as error:
        raise UserError(f"{shard}: cannot be read: {error.strerror}; check the file and its permissions") from error


def _require_end(archive: tarfile.TarFile, shard: str) -> None:
    """Raise UserError unless nothing but zeros, a block or more, follows the last member: tarfile takes what it can't read for the end."""
    archive.fileobj.seek(archive.offset)
    end = archive.fileobj.read(tarfile.BLOCKSIZE)
    padding = iter(lambda: archive.fileobj.read(1 << 20), b"")
    if end != bytes(tarfile.BLOCKSIZE) or any(part.strip(b"\0") for part in padding):
        raise UserError(f"{shard}: damaged or cut short at byte {archive.offset}; download or pack it again")


def _scan_sample(archive: tarfile.TarFile, name: str, members: list[tarfile.TarInfo]) -> tuple[int, int, int] | None:
    image, label = None, UNLABELLED
    for member in members:
        suffix = _split_name(member.name)[1]
        if suffix == ".cls":
            text = archive.extractfile(member).read().strip()
            if not text.isdigit():
                raise UserError(f"{name}.cls: holds {text[:20]!r}, not a class number; repair the shard")
            label = int(text)
        elif suffix in IMAGE_SUFFIXES:
            if image:
                raise UserError(f"{name}: two images under one key; give each sample its own")
            if member.issparse():
                raise UserError(f"{name}: stored as a sparse file; pack the shard again without --sparse")
            image = member
    return (image.offset_data, image.size, label) if image else None


def _is_hidden(name: str) -> bool:
    return os.path.basename(name).startswith(".")


def _split_name(name: str) -> tuple[str, str]:
    """Key and suffix. WebDataset splits at the first dot of the base name: a.seg.png is not an image of a."""
    folder, base = os.path.split(name)
    stem, dot, suffix = base.partition(".")
    return os.path.join(folder, stem), (dot + suffix).lower()
