"""The options of a run: declared in `options`, read from YAML files and command lines."""

from ffssl.config.options import (
    Choice,
    Number,
    Switch,
    as_dict,
    command_line_options,
    declare,
    from_dict,
    help_text,
    read_options,
    shared_options,
)

__all__ = [
    "Choice",
    "Number",
    "Switch",
    "as_dict",
    "command_line_options",
    "declare",
    "from_dict",
    "help_text",
    "read_options",
    "shared_options",
]
