"""How the options of a run are read.

They come from a YAML file (`--config FILE`, or the name of one of FFSSL's) of sections and keys,
and from the command line (`--section.option=value`), which wins. `base:` names one file or several,
relative to this one, or FFSSL's. Later bases override earlier ones, and this file overrides them
all, key by key.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from fastargs import Param, Section
from fastargs.config import Config
from fastargs.exceptions import MissingValueError, ValidationError

from ffssl.config import options as sections
from ffssl.config.command_line import exit_status
from ffssl.config.contradictions import check_together
from ffssl.config.named import find
from ffssl.config.options import (
    Declaration,
    MethodOptions,
    Options,
    declarations,
    dotted,
    section_titles,
)
from ffssl.errors import UserError, did_you_mean


def read_options(
    arguments: list[str], defaults: Mapping[str, object] = MappingProxyType({})
) -> Options:
    """Read the options of a run from command-line arguments.

    defaults: by dotted name, for a program that can do without an option that training requires.

    Raise UserError, naming the option, if it is unknown (with the nearest known one), of a wrong
    type, missing, or at odds with another.
    """
    known = {declared.name: declared for declared in declarations()}
    settings: dict[str, object] = {**defaults}
    overrides: dict[str, object] = {}
    words = iter(arguments)
    for word in words:
        if not word.startswith("--"):
            raise UserError(f"{word!r}: expected --config FILE or --section.option=value")
        name, equals, value = word[2:].partition("=")
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise UserError(f"--{name}: a value is missing, as in --{name}=value")
        if name in ("config", "config-file"):
            settings |= _read_file(find("config", value), known)
        else:
            _check_name(name, f"--{name}", known)
            overrides[name] = value
    options = _validated(known, settings | overrides)
    check_together(options)
    return options


def command_line_options(usage: str | None) -> Options:
    """Read the options of this process's command line.

    Print the help or a mistake in one line, and exit with status 0 or 2.
    """
    arguments, found = sys.argv[1:], []
    if {"-h", "--help"} & set(arguments):
        sys.exit(exit_status(lambda: print(help_text(usage)), interrupted=""))
    if status := exit_status(lambda: found.append(read_options(arguments))):
        sys.exit(status)
    return found[0]


def shared_options(options: Options) -> dict[str, object]:
    """Return the options that all ranks of a run must share, by their names on the command line."""
    plain = dotted(options.as_dict())
    shared = {
        f"--{declared.name}": plain.get(declared.name)
        for declared in declarations()
        if not declared.of_a_rank
    }
    # While rank 0 evaluates the others wait, so all must know whether it does.
    return shared | {"--data.validation": "given" if options.data.validation else "left out"}


def from_dict(plain: dict[str, dict]) -> Options:
    """Return the options from the dict that `Options.as_dict` made.

    Missing options have their defaults. Raise UserError as `read_options` does.
    """
    known = {declared.name: declared for declared in declarations()}
    settings = {name: value for name, value in dotted(plain).items() if value is not None}
    for name in settings:
        _check_name(name, name, known)
    return _validated(known, settings)


def help_text(usage: str | None) -> str:
    """Return the program's usage, then each option with its help, check and default, by section.

    usage: None under python -OO, which drops docstrings.
    """
    usage = usage or "usage: --config FILE --section.option=value ..."
    lines = [usage.strip()]
    section, titles = "", section_titles()
    for declared in declarations():
        if declared.path[0] != section:
            section = declared.path[0]
            lines += ["", f"{titles[section]}:"]
        lines.append(f"  --{declared.name:<36} {_described(declared)}")
    return "\n".join([*lines, ""])


def _described(declared: Declaration) -> str:
    check = declared.check.help()
    default = f"default {declared.default}" if declared.default is not None else ""
    notes = [check if check != "a string" else "", "required" if declared.required else default]
    note = "; ".join(filter(None, notes))
    return f"{declared.help} ({note})" if note else declared.help


def _check_name(name: str, where: str, known: Mapping[str, Declaration]) -> None:
    if name not in known:
        raise UserError(f"{where}: unknown option{did_you_mean(name, [*known, 'config'])}")


def _read_file(
    path: Path, known: Mapping[str, Declaration], built_on_it: tuple[Path, ...] = ()
) -> dict[str, object]:
    """Return a YAML file's options by dotted name, on top of those of its bases."""
    content = _parse_yaml(path)
    bases = content.pop("base", [])
    bases = bases if isinstance(bases, list) else [bases]
    built_on_it = (*built_on_it, path.resolve())
    settings: dict[str, object] = {}
    for base in bases:
        if not isinstance(base, str):
            raise UserError(f"{path}: base must name a file or a list of files, got {base!r}")
        file = find("config", base, path.parent)
        if file.resolve() in built_on_it:
            raise UserError(f"{path}: its base {base} is built on it in turn")
        settings |= _read_file(file, known, built_on_it)
    for section, values in content.items():
        if section not in section_titles():
            hint = did_you_mean(str(section), section_titles())
            raise UserError(f"{path}: unknown section {section!r}{hint}")
        if not isinstance(values, dict):
            raise UserError(f"{path}: section {section} must hold options, one a line")
        for key, value in values.items():
            _check_name(f"{section}.{key}", f"{path}: {section}.{key}", known)
            settings[f"{section}.{key}"] = value
    return settings


def _parse_yaml(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: the config can't be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: a config holds sections of options, as in training: {{epochs: 100}}"
        )
    return content


def _validated(known: Mapping[str, Declaration], settings: dict[str, object]) -> Options:
    config = Config()
    for section, title in section_titles().items():
        params = {
            d.path[1]: Param(
                d.check, d.help, required=d.required, default=None if d.required else d.default
            )
            for d in known.values()
            if d.path[0] == section
        }
        Section(section, title, config_descriptor=config).params(**params)
    config.collect(dict(settings))
    values: dict[str, dict[str, Any]] = {}
    for declared in known.values():
        try:
            value = config[declared.path]
        except MissingValueError:
            raise UserError(f"--{declared.name}: required ({declared.help})") from None
        except ValidationError:
            raise UserError(
                f"--{declared.name}: expected {declared.check.help()}, "
                f"got {settings[declared.name]!r}"
            ) from None
        values.setdefault(declared.path[0], {})[declared.path[1]] = value
    method = values.pop("method")
    return Options(
        data=sections.DataOptions(**values["data"]),
        augment=sections.AugmentOptions(**values["augment"]),
        resolution=sections.ResolutionOptions(**values["resolution"]),
        hard_augment=sections.HardAugmentOptions(**values["hard_augment"]),
        model=sections.ModelOptions(**values["model"]),
        method=MethodOptions(method.pop("name"), method),
        training=sections.TrainingOptions(**values["training"]),
        evaluate=sections.EvaluateOptions(**values["evaluate"]),
        run=sections.RunOptions(**values["run"]),
    )
