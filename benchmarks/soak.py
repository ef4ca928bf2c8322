"""Check that memory, threads and file descriptors stay flat over many epochs of the loader.

    PYTHONPATH=. python benchmarks/soak.py
    PYTHONPATH=. python benchmarks/soak.py --data train.beton --epochs 1000 --batch-size 64

The first runs 200 epochs of drawn images, about a minute.

Every epoch has another resolution than the last. Two of three are left by `break` after 0 to 3
batches. After every tenth comes an evaluation pass: a second loader of centre crops is opened,
served to its end and closed, as the kNN of a training run does.

The first quarter of the epochs warms the process up. After it, usage is flat if every epoch ends
with the same number of threads and descriptors, and if the median resident memory (VmRSS) of the
last quarter is at most LIMIT_MB above that of the second. A single batch lost every tenth epoch
would exceed that. The exit status is 1 if usage is not flat.
"""

import ctypes
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ffssl.config.command_line import Parser, exit_status
from ffssl.data.convert.conversion import ConvertOptions, convert
from ffssl.data.convert.sources.embedded import Embedded
from ffssl.data.loader import ViewLoader
from ffssl.data.policy import EVALUATION
from ffssl.tables import table

LIMIT_MB = 2
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of glibc's malloc.h
SLOTS_OF_INTERNED_STRINGS = 200_000  # more than torch, Numba and FFCV leave free
RESOLUTIONS = (128, 96, 160, 64, 112)
EPOCHS_BETWEEN_EVALUATIONS = 10


@dataclass(frozen=True)
class Usage:
    """What this process holds.

    memory: resident, in bytes. threads: all, not only Python's. descriptors: open files.
    """

    memory: int
    threads: int
    descriptors: int

    @classmethod
    def now(cls) -> "Usage":
        with open("/proc/self/status") as file:
            status = dict(line.split(":", 1) for line in file)
        return cls(
            1024 * int(status["VmRSS"].split()[0]),
            int(status["Threads"]),
            len(os.listdir("/proc/self/fd")),
        )


def settle() -> None:
    """Provoke now what happens once, at some epoch, and looks like growth of 4 to 14 MB.

    glibc: as buffers are freed, it raises the size from which a buffer gets pages of its own. Its
    heaps then grow in steps until they hold the largest mix of batches. A thread may also get a
    heap of its own.

    Python: its table of interned strings keeps a slot for each string that is gone. The strings in
    the code compiled for each loader use the table up, and a larger one replaces it.
    """
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_THRESHOLD, 64 * 1024)  # a size that is set is no longer raised
    mallopt(M_ARENA_MAX, 2)
    for number in range(SLOTS_OF_INTERNED_STRINGS):
        sys.intern(f"settle {number}")


def soak(path: Path, epochs: int, batch_size: int) -> Iterator[Usage]:
    """Yield the usage at the end of each epoch."""
    with ViewLoader(path, batch_size=batch_size, views=2, resolution=max(RESOLUTIONS)) as loader:
        for epoch in range(epochs):
            loader.set_epoch(
                epoch, RESOLUTIONS[epoch % len(RESOLUTIONS)], magnitude=5 + epoch / epochs
            )
            most = len(loader) if epoch % 3 == 0 else epoch % 4
            for served, _ in enumerate(loader, start=1):
                if served > most:
                    break
            if epoch % EPOCHS_BETWEEN_EVALUATIONS == 0:
                with ViewLoader(
                    path,
                    batch_size=batch_size,
                    views=1,
                    resolution=128,
                    policy=EVALUATION,
                    shuffle=False,
                    drop_last=False,
                ) as images:
                    for _ in images:
                        pass
            time.sleep(0.05)  # a thread that Python has joined is still leaving
            yield Usage.now()


def is_flat(usages: list[Usage]) -> bool:
    """Apply the criterion above.

    Raise ValueError for fewer than eight epochs, which have no quarters to compare.
    """
    if len(usages) < 8:
        raise ValueError(f"{len(usages)} epochs are too few to tell")
    quarter = len(usages) // 4
    warm = usages[quarter:]
    growth = _median_memory(warm[-quarter:]) - _median_memory(warm[:quarter])
    return (
        len({(usage.threads, usage.descriptors) for usage in warm}) == 1
        and growth <= LIMIT_MB * 1e6
    )


def usage_table(usages: list[Usage]) -> str:
    """Return a line for each eighth of the epochs.

    It has the median memory, and the range of threads and descriptors.
    """
    rows = []
    bounds = [len(usages) * i // 8 for i in range(9)]
    for first, end in itertools.pairwise(bounds):
        part = usages[first:end]
        spans = (
            _span(getattr(usage, name) for usage in part) for name in ("threads", "descriptors")
        )
        rows.append((f"{first + 1} to {end}", f"{_median_memory(part) / 1e6:.1f}", *spans))
    return table(("epochs", "memory, MB", "threads", "descriptors"), rows, ">")


def _median_memory(usages: list[Usage]) -> float:
    return statistics.median(usage.memory for usage in usages)


def _span(numbers: Iterator[int]) -> str:
    numbers = sorted(set(numbers))
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="a beton file; drawn images if not given"
    )
    parser.add_argument("--epochs", type=int, default=200, help="8 or more (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="images in a batch (default: %(default)s)"
    )
    options = parser.parse_args()
    if options.epochs < 8:
        parser.error(f"--epochs: {options.epochs} are too few to tell, at least 8 are needed")
    with tempfile.TemporaryDirectory(prefix="ffssl-soak-") as folder:
        path = options.data or Path(folder) / "images.beton"
        if not options.data:
            convert(Embedded("train", 8 * options.batch_size), path, ConvertOptions(progress=False))
        settle()
        usages = list(soak(path, options.epochs, options.batch_size))
    flat = is_flat(usages)
    print(usage_table(usages))
    print(
        "flat"
        if flat
        else (
            f"not flat: memory grew by more than {LIMIT_MB} MB, or threads or descriptors "
            "changed, after the first quarter"
        )
    )
    return int(not flat)


if __name__ == "__main__":
    sys.exit(exit_status(main))
