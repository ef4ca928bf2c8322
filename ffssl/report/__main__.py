"""Write one HTML page about training runs: what they did, and what it cost.

    ffssl report runs/baseline runs/efficient --output report.html

The page needs nothing else. PNGs of its pictures lie beside it. It takes the folders of runs,
finished or not, and compares costs with the first run's. Pictures of a run's data are computed
anew, from its checkpoint and its beton files; if these are gone, the page says so.
"""

import sys
from pathlib import Path

from ffssl.config.command_line import Parser, exit_status


def main() -> None:
    parser = Parser("report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report.html"),
        help="the page; PNGs go to a folder beside it (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="where the networks run: cuda, cuda:N or cpu; auto: a GPU where there is one",
    )
    arguments = parser.parse_args()

    from ffssl.report.write import write_report  # imports torch and matplotlib, which take seconds

    pictures = write_report(arguments.runs, arguments.output, arguments.device)
    print(f"{arguments.output}, and its pictures as PNG in {pictures}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
