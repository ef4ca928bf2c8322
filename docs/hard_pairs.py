"""Draw docs/hard_pairs.png from the runs of rn50_configs/studies/hard_pairs.yaml.

    python docs/hard_pairs.py

Over the steps it shows the cosine of a view's projection and its prediction, and how much harder
than random pairs the chosen pairs are.
"""

import json
from pathlib import Path

import numpy as np
from matplotlib import pyplot

from ffssl.plots import COLOURS, MARKERS

ROOT = Path(__file__).resolve().parent.parent
STUDY = ROOT / "runs" / "hard_pairs"
STEPS_PER_EPOCH = 10  # 640 images in batches of 64
RUNS = {
    "random": "random pairs",
    "method": "hardest by the trained loss",
    "cosine": "hardest by the cosine of the projections",
}
PANELS = {
    "predictor_cosine": "cos(p, z) of the same view",
    "hardness": "loss of the chosen pair\nminus that of a random one",
}


def column(run: str, name: str) -> np.ndarray:
    """Return a column of log.jsonl: (seeds, epochs), NaN where it was not measured."""
    logs = sorted(STUDY.glob(f"seed*/{run}/log.jsonl"))
    rows = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]
    return np.array([[row.get(name, np.nan) for row in log if row["epoch"]] for log in rows])


if __name__ == "__main__":
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, (name, label) in zip(axes, PANELS.items()):
        axis.axhline(0, color="0.8", lw=1)
        for (run, words), colour, marker in zip(RUNS.items(), COLOURS, MARKERS):
            values = column(run, name)
            steps = STEPS_PER_EPOCH * np.arange(1, values.shape[1] + 1)
            axis.plot(steps, values.mean(0), color=colour, marker=marker, ms=4, label=words)
            axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
        axis.set(xlabel="step", ylabel=label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(ROOT / "docs" / "hard_pairs.png", dpi=110)
