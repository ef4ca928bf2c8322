"""Fill in the costs in docs/reproduce.md.

    python docs/costs.py

The costs are the FLOPs of the document's commands, as `ffssl.cost` counts them, and the hours that
follow. A row of the document's tables is about the command whose --run.folder is runs/ and the
row's first cell.
"""

import re
import subprocess
from pathlib import Path

from ffssl.config import Options, read_options
from ffssl.cost import PAPERS, STANDARD
from ffssl.cost.runs import IMAGES, RunCosts, petaflop

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "reproduce.md"
# Shares of the peaks in half precision; the document says why.
FLOP_PER_SECOND = {"V100": 0.25 * 125e12, "H200": 0.10 * 989e12}
ROW = re.compile(
    r"^\| `(?P<run>[^`]+)` \|(?P<about>[^|]*)\|[^|]*\|[^|]*\|(?P<paper>[^|]*)\|[^|]*\|[^|]*\|$",
    re.MULTILINE,
)


def commands(text: str) -> dict[str, list[str]]:
    """Return the arguments of every `ffssl train` in the bash blocks, by the run's name.

    They are as bash expands them.
    """
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    stand_in = 'ffssl() { [ "$1" != train ] || printf "%s\\n" "${*:2}"; }\n'
    output = subprocess.run(
        ["bash", "-euc", stand_in + "\n".join(blocks)], capture_output=True, text=True, check=True
    ).stdout
    return {
        line.partition("--run.folder=runs/")[2].split()[0]: line.split()
        for line in output.splitlines()
    }


def cells(options: Options, costs: RunCosts) -> tuple[str, str, str, str]:
    """Return a row's cells: PFLOP by the standard count and by the paper's, and hours.

    The hours are on a V100 and on an H200.
    """
    stages, images = costs.stages(options), IMAGES[options.data.train.removesuffix("-train.beton")]
    standard, papers = (petaflop(stages, images, count) for count in (STANDARD, PAPERS))
    hours = [standard * 1e15 / speed / 3600 for speed in FLOP_PER_SECOND.values()]
    return f"{standard:,.1f}", f"{papers:,.1f}", *(f"{h:,.1f}" for h in hours)


def filled_in(text: str) -> str:
    arguments, costs = commands(text), RunCosts()

    def row(match: re.Match) -> str:
        standard, papers, v100, h200 = cells(read_options(arguments[match["run"]]), costs)
        return (
            f"| `{match['run']}` |{match['about']}| {standard} | {papers} |{match['paper']}| "
            f"{v100} | {h200} |"
        )

    return ROW.sub(row, text)


if __name__ == "__main__":
    DOCUMENT.write_text(filled_in(DOCUMENT.read_text()))
