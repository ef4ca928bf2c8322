"""Ends what tests have started once they are gone, however they ended: programs under test hang on
purpose, or train for hours.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

# In the environment of this process's descendants: all of them, whoever started them and in
# whatever group they are.
MARK = "FFSSL_TESTS"


def watch() -> None:
    """Have a process of its own end all that this one starts from now on, when this one has ended.

    Once is enough for all descendants.
    """
    if MARK in os.environ:
        return
    os.environ[MARK] = uuid.uuid4().hex
    # In a session of its own: a signal to the tests' whole group is no end of its work.
    subprocess.Popen(
        [sys.executable, __file__, os.environ[MARK], str(os.getpid())],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
    )


def processes(mark: str) -> list[int]:
    """Those that were started with this mark, but for this one."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found


def main(mark: str, watched: int) -> None:
    # Told, not asked for here: on a busy machine it may have ended before this line is reached.
    while os.getppid() == watched:
        time.sleep(0.5)
    while left := processes(mark):  # again, since one may be starting another
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
