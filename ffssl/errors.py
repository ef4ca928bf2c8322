"""Exceptions that end a program without a traceback."""

import difflib
import signal
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input: a file, an option, a sample.

    The message is one line that names the culprit and says what to do. Programs print it without a
    traceback and exit with status 2.
    """


def did_you_mean(word: str, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> str:
    """Return the end of a message about an unknown word: up to `most` known words near to it.

    cutoff: how alike they must be, from 0 to 1 (`difflib.get_close_matches`).
    """
    nearest = difflib.get_close_matches(word, list(known), n=most, cutoff=cutoff)
    return f"; did you mean {' or '.join(nearest)}?" if nearest else ""


class Stopped(Exception):
    """A signal has asked the program to exit.

    status: the exit status to use, 130 after Ctrl-C, else 75.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        # 75 is EX_TEMPFAIL of sysexits.h: "the user is invited to retry".
        self.status = 130 if number == signal.SIGINT else 75
