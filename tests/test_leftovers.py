"""A killed test run leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from support import leftovers

# What a test does: it starts a program that starts another, in another group, and all hang.
TESTS = """
import os, subprocess, sys, time
from support import leftovers
leftovers.watch()
hang = [sys.executable, "-c", "import time; print(flush=True); time.sleep(3600)"]
outer = f"subprocess.Popen({hang}, start_new_session=True); time.sleep(3600)"
nested = [sys.executable, "-c", f"import subprocess, time; {outer}"]
child = subprocess.Popen(nested, stdout=subprocess.PIPE)
child.stdout.readline()  # of the innermost
print(os.environ[leftovers.MARK], flush=True)
time.sleep(3600)
"""


def test_what_tests_have_started_ends_with_them(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != leftovers.MARK}
    environment["PYTHONPATH"] = str(Path(leftovers.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", TESTS], stdout=subprocess.PIPE, env=environment, text=True
    ) as tests:
        mark = tests.stdout.readline().strip()
        started = leftovers.processes(mark)
        # Both programs, and the one that watches.
        assert len(started) == 3 and tests.pid not in started
        tests.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 600
    while left := leftovers.processes(mark):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_tests_that_end_before_they_are_watched_leave_nothing_either():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mark = uuid.uuid4().hex
    left = subprocess.Popen(["sleep", "3600"], env={**os.environ, leftovers.MARK: mark})
    watcher = [sys.executable, leftovers.__file__, mark, str(ended.pid)]
    subprocess.run(watcher, timeout=600, check=True)
    assert left.wait(timeout=600) == -signal.SIGKILL
