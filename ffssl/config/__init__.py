"""The options of a run: declared in `options`, read from YAML files and command lines."""

from ffssl.config.checks import Number
from ffssl.config.options import Options, Role, declarations, dotted
from ffssl.config.read import (
    command_line_options,
    from_dict,
    help_text,
    read_options,
    shared_options,
)

__all__ = [
    "Number",
    "Options",
    "Role",
    "command_line_options",
    "declarations",
    "dotted",
    "from_dict",
    "help_text",
    "read_options",
    "shared_options",
]
