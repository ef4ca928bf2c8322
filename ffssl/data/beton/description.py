"""What a converter noted of a beton file, in `FILE.beton.json` beside it."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ffssl.data.beton.files import Files, beton_files
from ffssl.data.beton.read import Beton, read_beton
from ffssl.errors import UserError


def description_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def read_description(files: Files) -> dict | None:
    """Read the converter's description of beton files; return None if one has none.

    files: see `beton_files`. The description of several is what can be said of them together:
    samples, class_names (see `class_names`), source (kind) and sha256, a digest of theirs.

    Raises UserError for a description that can't be read.
    """
    paths = beton_files(files)
    each = [_read(path) for path in paths]
    if None in each:
        return None
    if len(each) == 1:
        return each[0]
    kinds = {description["source"]["kind"] for description in each}
    return {
        "samples": sum(description["samples"] for description in each),
        "class_names": class_names(paths),
        "source": {"kind": ", ".join(sorted(kinds))},
        "sha256": _digest([description["sha256"] for description in each]),
    }


def description_or_empty(files: Files) -> dict:
    """Read the converter's description; return an empty one if it is missing or damaged."""
    try:
        return read_description(files) or {}
    except UserError:
        return {}


def class_names(paths: Sequence[Path]) -> list[str] | None:
    """Return the names of the classes of beton files; None if no description has any.

    If the files' names differ, these are all of them, sorted as those of class folders are. Raises
    UserError for a description that can't be read.
    """
    each = [(_read(path) or {}).get("class_names") for path in paths]
    known = [names for names in each if names is not None]
    if all(names == known[0] for names in known):
        return known[0] if known else None
    return sorted(set().union(*known))


def identity(beton: Beton) -> dict[str, object]:
    """Return what tells the samples of a beton file, or of several, from others.

    That is their number, a digest of the tables and, if each file has a description, its sha256, or
    a digest of theirs. Raises UserError if the description beside a file is of other samples.
    """
    if len(beton.files) == 1:
        return _identity(beton)
    each = [_identity(read_beton(file.path)) for file in beton.files]
    found = {
        "samples": sum(one["samples"] for one in each),
        "digest": _digest([one["digest"] for one in each])[:16],
    }
    if all("sha256" in one for one in each):
        found["sha256"] = _digest([one["sha256"] for one in each])
    return found


def same_samples(one: dict[str, object], other: dict[str, object]) -> bool:
    """Return whether two identities agree in all that both of them state."""
    return all(one[name] == other[name] for name in one.keys() & other.keys())


def _read(path: Path) -> dict | None:
    place = description_path(path)
    try:
        return json.loads(place.read_text(encoding="utf-8")) if place.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{place}: not a readable description ({error}); "
            f"convert {path.name} again, or delete it"
        ) from error


def _identity(beton: Beton) -> dict:
    path, found = beton.files[0].path, {"samples": len(beton), "digest": beton.digest()}
    description = _read(path) or {}
    if description.get("digest", found["digest"]) != found["digest"]:
        raise UserError(
            f"{path}: damaged, or not the file that {description_path(path).name} describes; "
            "write or copy both again"
        )
    return found | {name: description[name] for name in ("sha256",) if name in description}


def _digest(digests: list[str]) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
