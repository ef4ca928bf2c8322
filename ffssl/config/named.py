"""The configs and studies that come with FFSSL, found by their names.

In a checkout they lie in rn50_configs/, in an installed package in ffssl/configs/ (setup.py).
"""

from pathlib import Path

from ffssl.errors import UserError, did_you_mean

_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = _PACKAGE / "configs"
FOLDER = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "rn50_configs"
FOLDERS = {"config": FOLDER, "study": FOLDER / "studies"}


def find(kind: str, name: str | Path, beside: Path = Path()) -> Path:
    """Return the file of a config or a study: a path if there is such a file, else one of FFSSL's.

    kind: "config" or "study". name: a path, relative to the folder `beside`, or the name of a file
    in FOLDERS[kind], which may lack its .yaml. Raise UserError, with the nearest name, if there is
    none.
    """
    folder = FOLDERS[kind]
    for path in (beside / name, folder / name, folder / f"{name}.yaml"):
        if path.is_file():
            return path
    if (beside / name).exists():  # a pipe; or a folder, which reading it will tell
        return beside / name
    hint = did_you_mean(Path(name).stem, [path.stem for path in listed(kind)])
    raise UserError(
        f"{beside / name}: the {kind} can't be read: No such file, and FFSSL has none of this name"
        f"{hint} (`ffssl configs` lists them)"
    )


def listed(kind: str) -> list[Path]:
    """Return the files of all configs or studies of FFSSL, sorted, without the parts of configs."""
    return sorted(FOLDERS[kind].glob("*.yaml"))


def summary(path: Path) -> str:
    """Return the first line of a file's comment, which says what it is."""
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
