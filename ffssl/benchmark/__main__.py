"""Benchmarks: python -m ffssl.benchmark loader --help"""

import sys

from ffssl.command_line import exit_status
from ffssl.errors import UserError

BENCHMARKS = ("loader",)


def main() -> int:
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: python -m ffssl.benchmark {{{','.join(BENCHMARKS)}}} ...\n\nloader: images/s of the loader and of its peers, in one run")
        return 0 if words else 2
    if words[0] not in BENCHMARKS:
        raise UserError(f"{words[0]!r}: unknown benchmark; known are {', '.join(BENCHMARKS)}")
    from ffssl.benchmark.loader import main as benchmark_loader

    benchmark_loader(words[1:])
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main, interrupted=""))
