"""Leaving when a signal asks for it: after the step under way, with a checkpoint."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator

from ffssl.errors import Stopped
from ffssl.parallel.ranks import gather_objects

# Ctrl-C, schedulers and Kubernetes, and the warning that Slurm's --signal sends.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Seconds in which signals are one request: a job's processes often get them from the scheduler and
# from their parent.
ONE_REQUEST = 1.0


class StopRequest:
    """Whether a signal has asked the program to leave; `check` does so.

    The same again, after a second, ends the process at once.
    """

    def __init__(self):
        self._number: int | None = None
        self._time = 0.0
        self._at_once = False

    def __bool__(self) -> bool:
        return self._number is not None

    def check(self) -> None:
        """Raises Stopped after a signal to this process, or to another rank.

        Called by all ranks at one step.
        """
        numbers = [number for number in gather_objects(self._number) if number is not None]
        if numbers:
            raise Stopped(numbers[0])

    def _check_this_process(self) -> None:
        if self._number is not None:
            raise Stopped(self._number)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A signal raises Stopped in the midst of the block: for what takes long and leaves nothing
        half done.
        """
        self._at_once = True
        try:
            self._check_this_process()
            yield
        finally:
            self._at_once = False

    def handle(self, number: int, _frame: object) -> None:
        if self._number is None:
            self._number, self._time = number, time.monotonic()
            with contextlib.suppress(OSError):  # a closed terminal; print isn't reentrant
                os.write(
                    2,
                    (
                        f"\n{signal.Signals(number).name}: saving and leaving; once more "
                        "leaves at once\n"
                    ).encode(),
                )
            if self._at_once:
                self._check_this_process()
        elif time.monotonic() - self._time > ONE_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Signals become a request to stop while the block runs.

    One that was ignored, as under nohup, remains so. For the main thread.
    """
    request = StopRequest()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    changed = {
        number: handler for number, handler in before.items() if handler is not signal.SIG_IGN
    }
    try:
        for number in changed:
            signal.signal(number, request.handle)
        yield request
    finally:
        for number, handler in changed.items():
            signal.signal(number, handler)
