"""Command lines whose mistakes cost one line and status 2."""

import argparse
import sys
from collections.abc import Callable

from fastargs.validation import Checker

from ffssl.errors import UserError

NETWORKS = ("student", "teacher")  # of a run, to choose from


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print the usage and leave."""

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str):
        raise UserError(message)


def checked(checker: Checker) -> Callable[[str], object]:
    """An argument's `type` that takes what a checker of `ffssl.config` takes."""

    def parse(text: str) -> object:
        try:
            return checker.check(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {checker.help()}, got {text!r}") from None

    return parse


def exit_status(program: Callable[[], int | None], *, interrupted: str = "\ninterrupted") -> int:
    """Run a program: the status that it returns, 0 where it returns none; 2 after a UserError and 130 after an interrupt, each told in a line.

    interrupted: what is told of an interrupt; "": nothing.
    """
    try:
        return program() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if interrupted:
            print(interrupted, file=sys.stderr)
        return 130
