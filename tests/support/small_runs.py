"""Runs as training leaves them, in no time."""

import os
from pathlib import Path

import torch
from support.options import NETWORK, QUIET, SIDES, of_method

from ffssl.config import read_options
from ffssl.methods import Method
from ffssl.run_folder import checkpoint
from ffssl.training.build import build
from ffssl.training.totals import EpochTotals

OPTIONS = [
    *NETWORK,
    *SIDES,
    *QUIET,
    *of_method("simclr"),
    "--training.epochs=3",
    "--training.batch_size=32",
]


def save_run(folder: Path, *options: str, epoch: int = 3, steps: int = 0, seed: int = 0) -> Method:
    """A folder with the checkpoint of an untrained run, whose BatchNorm layers have statistics
    unlike those of any batch.

    steps: of the epoch after the finished ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parsed = read_options(
        [*OPTIONS, "--data.train=train.beton", f"--run.folder={folder}", *options]
    )
    torch.manual_seed(seed)
    method = build(parsed, torch.device("cpu"))
    for module in method.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    spent = {"seconds": 12.0, "flops": 3.5e12}
    totals = EpochTotals(
        losses=[torch.tensor(1.0)] * steps, embedding_stds=[torch.tensor(1.0)] * steps
    ).state()
    checkpoint.save(
        folder,
        {
            "epoch": epoch,
            "totals": totals,
            "spent": spent,
            "options": parsed.as_dict(),
            "method": method.state_dict(),
        },
    )
    return method.eval()


class Code:
    """What a pickle may hold: loading it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
