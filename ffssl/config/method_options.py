"""The options that methods declare, read from their source, since importing them imports torch.

A method is a class with a `name` in a file of `ffssl/methods`. Its options are the keyword
arguments of its constructor, each with a type of `ffssl.config.checks` and a default. A line of the
class's docstring, `option: what it is`, is the option's help.
"""

import ast
import functools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from fastargs.validation import Checker

from ffssl.config.checks import CHECKS


@dataclass(frozen=True)
class MethodOption:
    """An option of a method."""

    name: str
    check: Checker
    help: str


def method_options() -> dict[str, list[MethodOption]]:
    """Return the options of each method, by its name.

    Raise SyntaxError if a declaration is incomplete.
    """
    package = sys.modules.get("ffssl.methods")
    folders = package.__path__ if package else [Path(__file__).parents[1] / "methods"]
    files = (file for folder in folders for file in sorted(Path(folder).glob("*.py")))
    return {name: options for file in files for name, options in of_file(file).items()}


@functools.cache
def of_file(file: Path) -> dict[str, list[MethodOption]]:
    """Return the options of the methods in a file, by the method's name."""
    classes = (node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef))
    return {name: _of_class(node, file) for node in classes if (name := _method_name(node))}


def _method_name(node: ast.ClassDef) -> str | None:
    for statement in node.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="name")], value=ast.Constant(value=str(name))):
                return name
    return None


def _of_class(node: ast.ClassDef, file: Path) -> list[MethodOption]:
    constructors = (
        part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"
    )
    constructor = next(constructors, None)
    helps = dict(re.findall(r"^(\w+): (.+?)$", _joined(ast.get_docstring(node) or ""), re.M))
    options = []
    for argument in constructor.args.kwonlyargs if constructor else ():
        kind = argument.annotation.id if isinstance(argument.annotation, ast.Name) else None
        if kind not in CHECKS or argument.arg not in helps:
            raise SyntaxError(
                f"{file}: {node.name}: option {argument.arg} needs a type, one of "
                f"{', '.join(CHECKS)}, and a line '{argument.arg}: what it is' in the docstring"
            )
        options.append(MethodOption(argument.arg, CHECKS[kind], helps[argument.arg].rstrip(".")))
    return options


def _joined(doc: str) -> str:
    """Join indented lines of a docstring to the line that they continue."""
    return re.sub(r"\n[ ]+", " ", doc)
