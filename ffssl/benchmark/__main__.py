"""Benchmarks of this machine.

ffssl benchmark NAME --help
"""

import importlib
import sys

from ffssl.config.command_line import exit_status
from ffssl.errors import UserError, did_you_mean
from ffssl.parallel.openmp import share_cores

BENCHMARKS = {
    "loader": "images/s of the loader and of its peers, in one run",
    "step": "a training step: where its time goes, and how near it is to the ceiling",
    "agreement": "whether the GPU computes what the CPU does: losses and chosen pairs of all "
    "methods",
    "speedup": "how much faster one config trains than another, by timing every stage of both",
}


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: ffssl benchmark NAME ...\n")
        print("\n".join(f"{name:<11}{about}" for name, about in BENCHMARKS.items()))
        return
    if name not in BENCHMARKS:
        hint = did_you_mean(name, BENCHMARKS)
        raise UserError(f"{name!r}: unknown benchmark{hint} (known: {', '.join(BENCHMARKS)})")
    if name != "loader":  # it starts processes of its own
        share_cores()
    importlib.import_module(f"ffssl.benchmark.{name}").main(arguments)


if __name__ == "__main__":
    sys.exit(exit_status(main, interrupted=""))
