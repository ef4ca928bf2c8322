"""Command lines that answer a mistake with one line and status 2."""

import argparse
import os
import select
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from fastargs.validation import Checker

from ffssl.errors import UserError, did_you_mean
from ffssl.printable import printable

NOT_READ = 128 + signal.SIGPIPE
# Of a run, like all with a dot, as --data.train: programs may pass them on to `read_options`.
OPTIONS_OF_RUNS = ("--config", "--config-file")


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError, which names the nearest known word.

    program: the words after `ffssl`, as "benchmark step".
    """

    def __init__(self, program: str | None = None, **settings: Any):
        if program:
            settings["prog"] = f"ffssl {program}"
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(message if message.endswith("?") else f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._subparsers is None:
            # Before argparse would ask for the required option whose name is mistyped.
            self._check_names(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def _check_names(self, words: list[str]) -> None:
        known = {*self._option_string_actions, *OPTIONS_OF_RUNS, "--"}
        for word in words:
            name = word.partition("=")[0]
            if name.startswith("--") and "." not in name and name not in known:
                self.error(f"{name}: unknown option{did_you_mean(name, known)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(value, action.choices or ())
            raise


def add_network(parser: Parser, help_text: str = "whose backbone") -> None:
    """Declare --network, which says whose backbone of a run is meant."""
    parser.add_argument(
        "--network",
        default="student",
        choices=("student", "teacher"),
        help=f"{help_text} (default: %(default)s)",
    )


def add_device_and_amp(parser: Parser) -> None:
    """Declare --device and --amp of a program that computes with a frozen backbone."""
    parser.add_argument(
        "--device", default="auto", help="cuda, cuda:N or cpu (default: a GPU where there is one)"
    )
    parser.add_argument(
        "--amp",
        default="auto",
        choices=("auto", "bf16", "fp16", "off"),
        help="mixed precision of the backbone (default: off on CPU)",
    )


def checked(checker: Checker) -> Callable[[str], object]:
    """Return an argument's `type` for argparse that accepts what `checker` accepts."""

    def parse(text: str) -> object:
        try:
            return checker.check(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {checker.help()}, got {text!r}") from None

    return parse


def command(name: str, *arguments: str) -> list[str]:
    """Return the words that run a command of FFSSL in a process of its own.

    By its file: `python -m` would also import what lies in the working directory.
    """
    return [sys.executable, str(Path(__file__).parents[1] / "__main__.py"), name, *arguments]


def typed_command() -> str:
    """Return this process's command, as one would type it again."""
    module = getattr(sys.modules["__main__"].__spec__, "name", "")
    package, _, name = module.removesuffix(".__main__").rpartition(".")
    if package.partition(".")[0] == "ffssl":  # by `ffssl` or `python -m`
        return shlex.join(["ffssl", name.replace("_", "-"), *sys.argv[1:]])
    return shlex.join(["python", *sys.argv])


def exit_status(program: Callable[[], int | None], *, interrupted: str = "\ninterrupted") -> int:
    """Run a program and return its exit status.

    That is what the program returns, or 0 if it returns None; 2 after a UserError and 130 after an
    interrupt, each reported in one line; 141, as after SIGPIPE, if nobody reads its output any
    more. Characters that a terminal can't show are escaped.

    interrupted: message after an interrupt, or if the reader left while the program ran; "": none.
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
            raise  # it comes from another pipe
        if interrupted:
            print(interrupted, file=sys.stderr)
        status = NOT_READ if isinstance(error, BrokenPipeError) else 130
    return status if _flush() else NOT_READ


def _reader_has_left() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _flush() -> bool:
    """Write buffered output, which at the interpreter's exit could raise an error nobody can catch.

    Return whether anybody reads it.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Else the interpreter would try again to write what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True
