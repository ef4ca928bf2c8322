"""Imported by multiprocessing's fork server, which is started while SIGINT is blocked.

The server keeps that mask for good, and ignores SIGINT anyway. The processes that it starts, for
whoever uses it, inherit the mask, so that Ctrl-C does not end them half started. Then they must
drop it.
"""

import signal
import sys
from multiprocessing.util import register_after_fork


def _unblock(_: object) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


# In each process, before its target is called.
register_after_fork(sys.modules[__name__], _unblock)
