"""Read from the names of a data set's files their split, and whether all files are there."""

import os
import re
from collections import defaultdict
from pathlib import Path

from ffssl.errors import UserError

# The words that Hugging Face's `datasets` knows for splits, and the split of each.
SPLITS = {
    word: split
    for split, words in {
        "train": ("train", "training"),
        "validation": ("validation", "valid", "val", "dev"),
        "test": ("test", "testing", "eval", "evaluation"),
    }.items()
    for word in words
}
_NUMBERED = re.compile(r"(.*?)[-_.]?(\d+)-of-(\d+)")


def split_of(path: str) -> str | None:
    """Return the split that a path below the data set's folder names, or None.

    The rules are those of `datasets`: NAME-00000-of-00002 is of split NAME. Else a known word is
    looked for in the folders, the nearest first, then in the file's name.
    """
    folder, name = os.path.split(path)
    numbered = _NUMBERED.match(name)
    if numbered and numbered[1]:
        return SPLITS.get(numbered[1], numbered[1])
    for part in (*reversed(Path(folder).parts), Path(name).stem):
        for word in re.split(r"[-._ 0-9]+", part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return None


def below_common_folder(paths: list[str]) -> tuple[str, list[str]]:
    """Return the folder that all paths lie below, and the paths relative to it."""
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return root, [os.path.relpath(path, root or ".") for path in paths]


def require_one_split(root: str, paths: list[str], what_to_do: str) -> None:
    """Raise UserError if the paths, relative to `root`, are of several splits."""
    of_split = {split_of(path) or "": path for path in reversed(paths)}
    if len(of_split) > 1:
        splits = ", ".join(
            f"{split or 'no split'} ({of_split[split]})" for split in sorted(of_split)
        )
        raise UserError(f"{root}: holds files of several splits: {splits}; {what_to_do}")


def require_all_shards(root: str, paths: list[str]) -> None:
    """Raise UserError if names such as train-00000-of-00002 show that a file is missing.

    Raise it also if the names are of two sets, even if each set is whole.
    """
    sets: dict[str, dict[tuple[int, int], str]] = defaultdict(dict)
    for path in paths:
        if numbered := _NUMBERED.match(os.path.basename(path)):
            name, number, total = numbered[1], int(numbered[2]), int(numbered[3])
            found = sets[name]
            other = found.get((total, number)) or next(
                (path for key, path in found.items() if key[0] != total), None
            )
            if other:
                raise UserError(
                    f"{root}: {other} and {path} are shards of two sets; "
                    "name the folder or the files of one"
                )
            found[total, number] = path
    for found in sets.values():
        total, (_, example) = next(iter(found))[0], min(found.items())
        first = int((total, total) in found)  # most count from 0, some from 1
        missing = [number for number in range(first, first + total) if (total, number) not in found]
        if missing:
            raise UserError(
                f"{root}: {len(missing)} of {total} shards are not there, such as number "
                f"{missing[0]} beside {example}; download it, or name the files to take"
            )


def require_distinct(paths: list[str]) -> None:
    """Raise UserError if two paths lead to one file, whose samples would be taken twice."""
    known: dict[str, str] = {}
    for path in paths:
        other = known.setdefault(os.path.realpath(path), path)
        if other is not path:
            how = "given twice" if other == path else f"the same file as {other}"
            raise UserError(f"{path}: {how}; name it once")


def require_file(path: str) -> str:
    """Return `path`, which exists. Raises UserError unless it is a regular file."""
    if not os.path.isfile(path):
        raise UserError(
            f"{path}: is a folder, a pipe or a device, where a file is needed; name files"
        )
    return path
