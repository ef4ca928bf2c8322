"""A parallel map over processes.

It keeps the order, bounds its memory, notices killed workers and stops at once.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")
MAX_CHUNK = 16  # enough that handing out work costs little beside the work
IN_FLIGHT_BYTES = 256 << 20


class WorkerDied(RuntimeError):
    """A worker process ended early or was killed.

    position: index of the first item whose result is missing.
    """

    def __init__(self, position: int):
        super().__init__(f"a worker died; results from item {position} on are missing")
        self.position = position


class WorkersNotStarted(RuntimeError):
    """A worker process ended before it began, since it failed to import the main module."""


def leave_if_worker() -> None:
    """End this process if it is just starting as a worker.

    Such a process gets here because it imports the program. It would start workers of its own, and
    each of them others. Its parent raises WorkersNotStarted.
    """
    # Multiprocessing itself uses this flag to refuse, but with a traceback.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SystemExit(1)


def map_in_order(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    size_of: Callable[[Result], int],
) -> Iterator[Result]:
    """Yield function(item) for each item, in order, computed by `workers` processes.

    function: pickled once a worker.
    workers: with 1, this process computes.
    size_of: the bytes of a result. Results computed ahead of the consumer are limited to about
        IN_FLIGHT_BYTES, judged by the largest result so far.

    Closing the iterator ends the workers at once. What `function` raises is raised here. Raises
    WorkerDied when a worker is killed, and WorkersNotStarted when none could be started.
    """
    if workers == 1 or len(items) <= 1:
        yield from map(function, items)
        return
    # Forking a process with threads may deadlock, and ours may have torch's and ffcv's threads. The
    # fork server has none.
    context = multiprocessing.get_context("forkserver")
    unblock = "ffssl.data.convert.fork_server"
    context.set_forkserver_preload([unblock, function.__class__.__module__])
    pool = ProcessPoolExecutor(workers, context, _start_worker, (function,))
    try:
        with _signals_held_back():
            pool.submit(int)  # starts the fork server and all workers
        yield from _in_chunks(pool, items, 2 * workers + 2, size_of)
        pool.shutdown()
    except WorkerDied as error:
        processes = list((pool._processes or {}).values())
        pool.shutdown()  # waits for them to end
        # Exit code 1: the process ended by an exception, not by a signal.
        if error.position == 0 and any(process.exitcode == 1 for process in processes):
            raise WorkersNotStarted from None
        raise
    finally:
        _stop(pool)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Let SIGINT and SIGTERM take effect when the block ends.

    An exception while a worker starts would leave it to itself: it would miss the pool's semaphores
    and print a traceback. So would the fork server, if Ctrl-C reached it before it ignores that: it
    inherits the mask, see `ffssl.data.convert.fork_server`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # no signal is handled here
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {each: signal.signal(each, lambda which, _: came.append(which)) for each in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _in_chunks(
    pool: ProcessPoolExecutor, items: Sequence, max_pending: int, size_of: Callable
) -> Iterator:
    pending: deque = deque()
    submitted, done, largest = 0, 0, 0
    try:
        while done < len(items):
            # At least two chunks, so that there is work while a result is consumed.
            while submitted < len(items) and (
                len(pending) < 2
                or len(pending) < max_pending
                and (len(pending) + 1) * largest <= IN_FLIGHT_BYTES
            ):
                # One item a chunk until sizes are known.
                chunk = min(MAX_CHUNK, IN_FLIGHT_BYTES // (largest * max_pending)) if largest else 1
                pending.append(
                    pool.submit(_run_chunk, items[submitted : submitted + max(1, chunk)])
                )
                submitted += max(1, chunk)
            results, error = pending.popleft().result()
            for result in results:
                largest = max(largest, size_of(result))
                yield result
            if error:
                raise error
            done += len(results)
    except BrokenProcessPool:
        raise WorkerDied(done) from None


_function: Callable


def _start_worker(function: Callable) -> None:
    global _function
    _function = function
    # Ctrl-C reaches the whole process group; the parent decides what becomes of the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # Workers of a killed parent would wait for work for ever.
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _run_chunk(items: Sequence) -> tuple[list, Exception | None]:
    """Return the results up to the first exception, and that exception.

    The results before it are still wanted.
    """
    results = []
    for item in items:
        try:
            results.append(_function(item))
        except Exception as error:
            return results, error
    return results, None


def _stop(pool: ProcessPoolExecutor) -> None:
    # Before Python 3.14 there is no public way to end workers in the middle of a task.
    for process in list((pool._processes or {}).values()):
        process.terminate()
    # Waits for the pool's thread, which ends with its workers. Else, at the interpreter's exit, the
    # executor would wake that thread without a lock, through a pipe that it may just be closing.
    pool.shutdown(cancel_futures=True)
