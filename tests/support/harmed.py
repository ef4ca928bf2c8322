"""Runs of the training program in processes that can be harmed: forked from one that has imported
it, which takes seconds.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
# Seconds, after which a program does: far more than any needs, on a machine that has other work,
# too.
HANGS = 600
# The optimiser imports the other, for two seconds.
CONTEXT.set_forkserver_preload(["ffssl.train", "torch._dynamo"])


class Program:
    """`ffssl/train.py` with these arguments. harm: called in its process first."""

    def __init__(self, arguments: list[str], output: Path, harm: Callable[[], None] | None = None):
        self._output = output
        self._process = CONTEXT.Process(target=_run, args=(arguments, output, harm))
        self._process.start()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Of the running program; it is over when it ends or hangs."""
        deadline = time.monotonic() + HANGS
        while not condition():
            assert self._process.is_alive() and time.monotonic() < deadline, self.output
            time.sleep(0.002)

    def signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def status(self) -> int:
        """When it has ended: its exit status, or -n where signal n has ended it."""
        self._process.join(HANGS)
        if self._process.exitcode is None:
            self._process.kill()
            raise AssertionError(f"the program hangs: {self.output}")
        return self._process.exitcode

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    @property
    def output(self) -> str:
        return self._output.read_text()


def _run(arguments: list[str], output: Path, harm: Callable[[], None] | None) -> None:
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    from ffssl import train
    from ffssl.config import read_options
    from ffssl.config.command_line import exit_status

    torch.set_num_threads(1)
    if harm:
        harm()
    sys.exit(exit_status(lambda: train.main(read_options(arguments))))


def kill_while_saving(stage: str, checkpoint: int) -> None:
    """Have this process killed while it writes its checkpoint of that number, from 1 on.

    stage: what it is about to call in the module os: "fsync" (of the file; the folder's is the
    second), "link", "replace"; or "write", when half of the file is there.
    """
    import threading

    import torch

    def harmed(module: object, name: str, calls: int, die: Callable) -> None:
        function, left = getattr(module, name), calls

        def count(*arguments):
            nonlocal left
            left -= threading.current_thread().name.startswith("ffssl-checkpoint")
            return die(*arguments) if left == 0 else function(*arguments)

        setattr(module, name, count)

    def die(*_) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if stage == "write":
        save = torch.save

        def half(state: dict, file) -> None:
            save(state, file)
            file.flush()
            file.truncate(file.tell() // 2)
            die()

        harmed(torch, "save", checkpoint, half)
    elif stage == "folder":
        harmed(os, "fsync", 2 * checkpoint, die)
    else:
        calls = {
            "fsync": 2 * checkpoint - 1,
            "link": checkpoint - 1,
            "replace first": 2 * checkpoint - 2,
            "replace": 2 * checkpoint - 1,
        }
        harmed(os, stage.split()[0], calls[stage], die)


def signal_itself(number: int, after: int) -> None:
    """Have this process sent a signal once it has taken so many steps."""
    from ffssl.training.epoch import Epoch

    add, left = Epoch.add, after

    def counted(epoch: Epoch, result: object) -> None:
        nonlocal left
        add(epoch, result)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)

    Epoch.add = counted


def limit_files(size: int) -> None:
    """No file may grow beyond `size` bytes, as on a full disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def hang_while_saving() -> None:
    from ffssl.run_folder import checkpoint

    # Its test kills it, and `leftovers` where that is killed first.
    checkpoint.save = lambda *_, **__: time.sleep(3600)
