"""Exit on a signal: after the step under way, with a checkpoint."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator

from ffssl.errors import Stopped
from ffssl.parallel.ranks import gather_objects

# SIGINT: Ctrl-C. SIGTERM: schedulers, Kubernetes. SIGUSR1: Slurm's early warning.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Signals within so many seconds are one request: a process often gets one from the scheduler and
# another from its parent.
ONE_REQUEST = 1.0


class StopRequest:
    """Record whether a signal has asked the program to exit; `check` raises Stopped if so.

    A second signal, more than a second after the first, ends the process at once.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._time = 0.0
        self._at_once = False

    def __bool__(self) -> bool:
        return self._number is not None

    def check(self) -> None:
        """Raise Stopped if this process or another rank has received a signal.

        Called by all ranks at the same step.
        """
        numbers = [number for number in gather_objects(self._number) if number is not None]
        if numbers:
            raise Stopped(numbers[0])

    def _check_this_process(self) -> None:
        if self._number is not None:
            raise Stopped(self._number)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal raise Stopped in the middle of the block.

        For work that takes long and leaves nothing half done.
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
            name = signal.Signals(number).name
            told = f"\n{name}: saving and leaving; once more leaves at once\n"
            with contextlib.suppress(OSError):  # the terminal may be closed
                os.write(2, told.encode())  # print isn't reentrant
            if self._at_once:
                self._check_this_process()
        elif time.monotonic() - self._time > ONE_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn signals into a request to stop while the block runs.

    A signal that was ignored, as under nohup, stays ignored. For the main thread.
    """
    request = StopRequest()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    changed = {number: old for number, old in before.items() if old is not signal.SIG_IGN}
    try:
        for number in changed:
            signal.signal(number, request.handle)
        yield request
    finally:
        for number, handler in changed.items():
            signal.signal(number, handler)
