"""Draw docs/claim.png from the first table of docs/results.md.

    python docs/claim.py

An arrow leads from each method's baseline to its run with all levers. Bars are standard deviations.
"""

import re
from pathlib import Path

from matplotlib import pyplot

from ffssl.plots import COLOURS, ink

DOCS = Path(__file__).resolve().parent
MEAN = r"\| (\d+\.\d) ± (\d+\.\d) \| (\d+\.\d) "  # kNN accuracy, its deviation, TFLOP
ROW = re.compile(rf"^\| ([^|]+) \| \d+ {MEAN}{MEAN}", re.MULTILINE)


def draw(text: str, path: Path) -> None:
    figure, axis = pyplot.subplots(figsize=(9, 5), layout="constrained")
    rows = [(method, *map(float, numbers)) for method, *numbers in ROW.findall(text)]
    labelled = [row[4] for row in rows]  # accuracies with all levers
    for (method, *values), colour in zip(rows, COLOURS):
        ends = []
        for (accuracy, deviation, cost), filling in ((values[:3], "white"), (values[3:], colour)):
            axis.errorbar(
                cost, accuracy, deviation, color=colour, marker="o", ms=8, mfc=filling, mew=1.6
            )
            ends.append((cost, accuracy))
        arrow = {"arrowstyle": "->", "color": colour, "shrinkA": 8, "shrinkB": 8}
        axis.annotate("", ends[1], ends[0], arrowprops=arrow)
        crowded = any(0 < above - values[3] < 1 for above in labelled)
        axis.annotate(
            method,
            ends[1],
            (-8, -12 if crowded else 3),
            textcoords="offset points",
            ha="right",
            color=ink(colour),
        )
    axis.set_xlim(left=0)
    axis.set(xlabel="TFLOP", ylabel="kNN accuracy (%)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="0.92")
    axis.set_axisbelow(True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw((DOCS / "results.md").read_text(), DOCS / "claim.png")
