"""Fill in the costs in docs/reproduce.md: the FLOPs of its commands as `ffssl.cost` counts them, and the hours that follow.

    python docs/costs.py

A row of the document's tables is about the command whose --run.folder is runs/ and what the row's first cell says.
"""

import re
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch

from ffssl.config import read_options
from ffssl.plan import Plan
from ffssl.train import build, count_flops

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "reproduce.md"
IMAGES = {"imagenet-train.beton": 1_281_167, "imagenette-train.beton": 9_469}
FLOP_PER_SECOND = {"V100": 0.25 * 125e12, "H200": 0.10 * 989e12}  # shares of the peaks in half precision; the document says why
ROW = re.compile(r"^\| `(?P<run>[^`]+)` \|(?P<about>[^|]*)\|[^|]*\|[^|]*\|(?P<paper>[^|]*)\|[^|]*\|[^|]*\|$", re.MULTILINE)


def commands(text: str) -> dict[str, list[str]]:
    """The arguments of every `python ffssl/train.py` in the document's bash blocks, as bash expands them, by the run's name."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    stand_in = 'python() { [ "$1" != ffssl/train.py ] || printf "%s\\n" "${*:2}"; }\n'
    output = subprocess.run(["bash", "-euc", stand_in + "\n".join(blocks)], capture_output=True, text=True, check=True).stdout
    return {line.partition("--run.folder=runs/")[2].split()[0]: line.split() for line in output.splitlines()}


class Costs:
    """PFLOP of runs. What was counted for one is not counted again for another."""

    def __init__(self):
        self._flops: dict[str, int] = {}

    def petaflop(self, options: SimpleNamespace, backward: int) -> float:
        """Of all images in every epoch, as the paper counts; a run leaves out the last batch of an epoch if it is not full."""
        plan = Plan(options, steps_per_epoch=1)
        steps_per_epoch = IMAGES[options.data.train] / options.training.batch_size
        sides = Counter(plan.resolution(epoch) for epoch in range(options.training.epochs))
        return sum(epochs * self._step(options, side, backward) for side, epochs in sides.items()) * steps_per_epoch / 1e15

    def _step(self, options: SimpleNamespace, side: int, backward: int) -> int:
        at_side = SimpleNamespace(**vars(options) | {"resolution": SimpleNamespace(schedule="constant", max=side)})
        at_side.resolution.min = at_side.resolution.step = side
        hard_augment = options.hard_augment if options.hard_augment.select != "off" else None
        key = repr((options.model, options.method, hard_augment, options.augment.views, options.training.batch_size, side, backward))
        if key not in self._flops:
            with torch.device("meta"):  # no weights
                method = build(at_side, torch.device("meta"))
            [self._flops[key]] = count_flops(Plan(at_side, steps_per_epoch=1), method, backward).values()
        return self._flops[key]

    def cells(self, options: SimpleNamespace) -> tuple[str, str, str, str]:
        """What stands in a row: PFLOP by the standard count and by the paper's, hours on a V100 and on an H200."""
        standard, papers = (self.petaflop(options, backward) for backward in (2, 1))
        hours = [standard * 1e15 / speed / 3600 for speed in FLOP_PER_SECOND.values()]
        return f"{standard:,.1f}", f"{papers:,.1f}", *(f"{h:,.1f}" for h in hours)


def filled_in(text: str) -> str:
    arguments, costs = commands(text), Costs()

    def row(match: re.Match) -> str:
        standard, papers, v100, h200 = costs.cells(read_options(arguments[match["run"]]))
        return f"| `{match['run']}` |{match['about']}| {standard} | {papers} |{match['paper']}| {v100} | {h200} |"

    return ROW.sub(row, text)


if __name__ == "__main__":
    DOCUMENT.write_text(filled_in(DOCUMENT.read_text()))
