"""Command lines whose mistakes cost one line and status 2."""

import argparse
import os
import select
import signal
import sys
from collections.abc import Callable

from fastargs.validation import Checker

from ffssl.errors import UserError
from ffssl.printable import printable

NOT_READ = 128 + signal.SIGPIPE
NETWORKS = ("student", "teacher")  # of a run, to choose from


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print the usage and leave."""

    def __init__(self, **settings):
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings
        )

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
    """Run a program: the status that it returns, 0 where it returns none; 2 after a UserError and
    130 after an interrupt, each told in a line; 141, as after SIGPIPE, where nobody reads what
    it prints any more. What a terminal can't show is escaped.

    interrupted: what is told of an interrupt, and of a reader that has left while the program ran;
    "": nothing.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = program() or 0
    except SystemExit:
        if _flush():
            raise
        return NOT_READ
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        status = 2
    except (KeyboardInterrupt, BrokenPipeError) as error:
        if isinstance(error, BrokenPipeError) and not _reader_has_left():
            raise  # of some other pipe
        if interrupted:
            print(interrupted, file=sys.stderr)
        status = NOT_READ if isinstance(error, BrokenPipeError) else 130
    return status if _flush() else NOT_READ


def _reader_has_left() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _flush() -> bool:
    """Write what has been printed, as the interpreter's end would, where no error can be caught.

    Returns whether anybody reads it.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left would be tried again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True
