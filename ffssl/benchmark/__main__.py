"""Benchmarks: python -m ffssl.benchmark loader --help"""

import importlib
import sys

from ffssl.errors import UserError

BENCHMARKS = ("loader", "plan")


def main() -> int:
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: python -m ffssl.benchmark {{{','.join(BENCHMARKS)}}} ...\n\nloader: images/s of the loader and of its peers, in one run")
        print("plan: how long a run will take on given machines, and what will hold it up")
        return 0 if words else 2
    try:
        if words[0] not in BENCHMARKS:
            raise UserError(f"{words[0]!r}: unknown benchmark; known are {', '.join(BENCHMARKS)}")
        importlib.import_module(f"ffssl.benchmark.{words[0]}").main(words[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
