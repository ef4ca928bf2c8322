"""What ends a program as a user asked for it, or can put right."""

import signal


class UserError(Exception):
    """A mistake in the input: a file, an option, a sample.

    The message is one line that names the culprit and says what to do. Programs print it without a
    traceback and leave with status 2.
    """


class Stopped(Exception):
    """A signal has asked the program to leave. status: the exit status that says so."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        # As after Ctrl-C; sysexits.h: EX_TEMPFAIL, "the user is invited to retry".
        self.status = 130 if number == signal.SIGINT else 75
