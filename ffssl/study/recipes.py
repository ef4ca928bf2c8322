"""Study files: which runs, on which data, with which seeds. `ffssl.study` shows the form."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from ffssl.config import Options, Role, read_options
from ffssl.config.named import find
from ffssl.data.beton.files import beton_files
from ffssl.errors import UserError, did_you_mean

SPLITS = ("train", "validation")
OWN_OPTIONS = ("data.train", "data.validation", "run.folder", "run.seed", "run.resume")


@dataclass(frozen=True)
class Run:
    """A row of the table: what is trained once a seed."""

    name: str  # "run", or "group/run"
    group: str | None
    against: str | None  # the name of the run that it is compared with
    arguments: list[str]  # of train.py, without those of a seed

    def folder(self, study_folder: Path, seed: int) -> Path:
        return study_folder / f"seed{seed}" / self.name

    def command(self, study_folder: Path, seed: int) -> list[str]:
        """Return the arguments of train.py for a seed."""
        return [
            *self.arguments,
            f"--run.folder={self.folder(study_folder, seed)}",
            f"--run.seed={seed}",
        ]


@dataclass(frozen=True)
class Study:
    """A study file, read and checked."""

    path: Path
    title: str
    seeds: list[int]
    data: dict[str, str]  # "train", "validation": beton files, as `beton_files` takes them
    embedded: dict[str, int]  # how many images to draw for which of them
    runs: list[Run]


def read_study(path: Path, folder: Path, overrides: list[str]) -> Study:
    """Read a study file, and apply `overrides` (--section.option=value) to all of its runs.

    Raise UserError, naming file, run and option, if `train.py` would refuse an option of a run, if
    a run occurs twice, or if data is missing.
    """
    content = _keys(
        _load(path),
        str(path),
        ("title", "data", "embedded", "seeds", "config", "options", "runs", "groups"),
    )
    given = _overrides(overrides)
    data, embedded = _data(content, path, folder, given)
    seeds = _seeds(content.get("seeds", ["0"]), path)
    runs = list(
        _grid(content, path, {f"data.{split}": files for split, files in data.items()} | given)
    )
    seen: dict[str, str] = {}
    for run in runs:
        try:
            options = json.dumps(comparable(read_options(run.command(folder, seeds[0]))))
        except UserError as error:
            raise UserError(f"{path}: run {run.name}: {error}") from error
        if options in seen:
            raise UserError(
                f"{path}: run {run.name} has the same options as run {seen[options]}; "
                "leave one of them out"
            )
        seen[options] = run.name
    return Study(path, str(content.get("title", path.stem)), seeds, data, embedded, runs)


def comparable(options: Options) -> dict[str, dict]:
    """Return the options that decide a run's result.

    Where it runs, and how many threads feed it, are left out.
    """
    sections = options.of_role(Role.EXPERIMENT, Role.DATA, Role.EVALUATION)
    del sections["run"]
    for split in SPLITS:
        sections["data"][split] = ",".join(
            str(path.resolve()) for path in beton_files(sections["data"][split])
        )
    return sections


class _Words(yaml.BaseLoader):
    """Keep every value as text, as on a command line, and refuse a key given twice.

    YAML would take the last of two equal keys.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise UserError(
                    f"line {node.value[index][0].start_mark.line + 1}: {key} is there "
                    "already; each name may be given once"
                )
        return super().construct_mapping(node, deep)


def _load(path: Path) -> object:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Words)
    except OSError as error:
        raise UserError(f"{path}: the study can't be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    except UserError as error:
        raise UserError(f"{path}, {error}") from error


def _keys(value: object, where: str, known: tuple[str, ...] | None = None) -> dict:
    """Return `value` if it is a mapping, whose keys are all in `known` if that is given.

    Nothing counts as an empty mapping.
    """
    value = {} if value in ("", "~", "null", None) else value
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected names with values, as in name: value; got {value!r}")
    for key in value:
        if known and key not in known:
            hint = did_you_mean(key, known)
            raise UserError(f"{where}: unknown key {key!r}{hint}; known are {', '.join(known)}")
    return value


def _options(sections: object, where: str) -> dict[str, str]:
    """Return the options of {section: {option: value}} by dotted name."""
    options = {}
    for section, values in _keys(sections, where).items():
        for option, value in _keys(values, f"{where}: {section}").items():
            options[_not_own(f"{section}.{option}", where)] = _word(
                value, f"{where}: {section}.{option}"
            )
    return options


def _word(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: expected one value, got {value!r}")
    return value


def _not_own(option: str, where: str) -> str:
    if option in OWN_OPTIONS:
        raise UserError(
            f"{where}: {option} is set by the study itself; see data, embedded and seeds "
            "in ffssl study --help"
        )
    return option


def _overrides(words: list[str]) -> dict[str, str]:
    options = {}
    for word in words:
        match = re.fullmatch(r"--(\w+\.\w+)=(.*)", word, re.DOTALL)
        if not match:
            raise UserError(f"{word}: expected --section.option=value")
        options[match[1]] = match[2]
    return options


def _data(
    content: dict, path: Path, folder: Path, given: dict[str, str]
) -> tuple[dict[str, str], dict[str, int]]:
    """Return the beton files (see `beton_files`), and how many images are to be drawn for which.

    Takes the data options out of `given`.
    """
    where = f"{path}: data"
    files = {
        split: _files(file, f"{where}.{split}")
        for split, file in _keys(content.get("data"), where, SPLITS).items()
    }
    counts = _keys(content.get("embedded"), f"{path}: embedded", SPLITS)
    if files and counts:
        raise UserError(f"{path}: give either data or embedded")
    for split, count in counts.items():
        if not (isinstance(count, str) and count.isdecimal() and int(count)):
            raise UserError(f"{path}: embedded: {split} must be a number of images, got {count!r}")
        files[split] = str(folder / "data" / f"{split}-{count}.beton")
    named = {split: given.pop(f"data.{split}") for split in SPLITS if f"data.{split}" in given}
    files |= named
    for option in given:
        _not_own(option, f"--{option}")
    embedded = {split: int(count) for split, count in counts.items() if split not in named}
    for split in SPLITS:
        if split not in files:
            raise UserError(
                f"{path}: no {split} images; give data: {{train: FILE, validation: FILE}} "
                f"or --data.{split}=FILE, or embedded"
            )
        if split not in embedded:
            _require(files[split], f"{path}: data.{split}", split)
    return {split: files[split] for split in SPLITS}, embedded


def _files(value: object, where: str) -> str:
    """Return the text of a list of files, or of one, see `beton_files`."""
    files = value if isinstance(value, list) else [value]
    return ",".join(_word(file, where) for file in files)


def _require(files: str, where: str, split: str) -> None:
    try:
        missing = [path for path in beton_files(files) if not path.is_file()]
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if missing:
        raise UserError(
            f"{where}: {missing[0]} not found; make it with ffssl convert, or give "
            f"--data.{split}=FILE"
        )


def _seeds(words: object, path: Path) -> list[int]:
    if (
        not isinstance(words, list)
        or not words
        or not all(isinstance(word, str) and word.isdecimal() for word in words)
    ):
        raise UserError(
            f"{path}: seeds must be a list of integers of 0 or more, as in [0, 1, 2]; got {words!r}"
        )
    seeds = [int(word) for word in words]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: seeds: one is there twice in {seeds}")
    return seeds


def _grid(content: dict, path: Path, given: dict[str, str]) -> Iterator[Run]:
    """Yield every run of every group. The options `given` override all others."""
    common = _options(content.get("options"), f"{path}: options")
    runs = {
        name: _keys(run, f"{path}: run {name}", ("against", "config", "options"))
        for name, run in _named(content.get("runs"), f"{path}: runs").items()
    }
    if not runs:
        raise UserError(f"{path}: the study holds no runs; give at least one under runs")
    for group, group_content in (
        _named(content.get("groups"), f"{path}: groups") or {None: {}}
    ).items():
        where = f"{path}: group {group}"
        group_content = _keys(group_content, where, ("options", "runs", "leave_out"))
        kept = _kept(list(runs), group_content.get("leave_out"), where)
        of_group = _options(group_content.get("options"), where)
        of_runs = _keys(group_content.get("runs"), f"{where}: runs", tuple(runs))
        prefix = f"{group}/" if group else ""
        for name in kept:
            run = runs[name]
            against = run.get("against")
            if against is not None and (against == name or against not in list(runs)):
                raise UserError(
                    f"{path}: run {name}: against must name another run of the study, got "
                    f"{against!r}; there are {', '.join(runs)}"
                )
            if against is not None and against not in kept:
                raise UserError(f"{where}: leave_out: {against} is what {name} is compared with")
            config = _config(run.get("config", content.get("config")), path, name)
            options = (
                common
                | _options(run.get("options"), f"{path}: run {name}")
                | of_group
                | _options(of_runs.get(name), f"{where}: run {name}")
            )
            arguments = [f"--{option}={value}" for option, value in (options | given).items()]
            arguments = config + arguments
            yield Run(prefix + name, group, against and prefix + against, arguments)


def _config(name: object, path: Path, run: str) -> list[str]:
    """Return the arguments that name a run's config, if it has one."""
    if not name:
        return []
    where = f"{path}: run {run}"
    try:
        return ["--config", str(find("config", _word(name, f"{where}: config"), path.parent))]
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _kept(runs: list[str], leave_out: object, where: str) -> list[str]:
    """Return the runs without those that a group leaves out."""
    names = [] if leave_out is None else leave_out
    if not isinstance(names, list) or not all(name in runs for name in names):
        raise UserError(
            f"{where}: leave_out must be a list of runs, of {', '.join(runs)}; got {names!r}"
        )
    return [name for name in runs if name not in names]


def _named(value: object, where: str) -> dict:
    """Return a mapping, after a check that its keys can name folders."""
    for name in _keys(value, where):
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise UserError(
                f"{where}: {name!r} can't name a folder; use letters, digits and . _ + -"
            )
    return _keys(value, where)
