"""The options of a run: declared in `options`, read from YAML files and command lines."""

from ffssl.config.checks import Choice, Number, Switch
from ffssl.config.options import Options, Role, declarations, dotted
from ffssl.config.read import (
    command_line_options,
    from_dict,
    help_text,
    read_options,
    shared_options,
)

__all__ = [
    "Choice",
    "Number",
    "Options",
    "Role",
    "Switch",
    "command_line_options",
    "declarations",
    "dotted",
    "from_dict",
    "help_text",
    "read_options",
    "shared_options",
]
