"""Each method, trained for a few minutes as the study of all methods trains it, against its own
untrained network.
"""

from pathlib import Path

import pytest

from ffssl.config import read_options
from ffssl.data.convert.conversion import ConvertOptions, convert
from ffssl.data.convert.sources.embedded import Embedded
from ffssl.methods import METHODS
from ffssl.run_folder.log import read_log
from ffssl.study.recipes import read_study
from ffssl.train import train

STUDY = Path(__file__).resolve().parents[2] / "rn50_configs" / "studies" / "methods.yaml"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    read = read_study(STUDY, folder, [])
    for split, count in read.embedded.items():
        read.data[split].parent.mkdir(exist_ok=True)
        convert(
            Embedded({"train": "train", "validation": "val"}[split], count),
            read.data[split],
            ConvertOptions(progress=False),
        )
    return read, folder


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_it_beats_its_untrained_network_by_ten_points(study, name):
    read, folder = study
    (run,) = (run for run in read.runs if run.name == f"{name}/F1-CLR+SPL")
    train(read_options([*run.command(folder, 0), "--evaluate.every=0"]))
    rows = read_log(run.folder(folder, 0))
    assert rows[-1]["knn"] >= rows[0]["knn"] + 0.1
