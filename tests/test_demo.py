import numpy as np
import pytest
from support.options import SMALL
from support.printed_tables import rows_of
from support.sample_images import write_beton

from ffssl.config import read_options
from ffssl.data.convert.conversion import convert
from ffssl.data.convert.sources.embedded import Embedded
from ffssl.demo import print_table, raw_pixel_accuracy
from ffssl.run_folder.log import read_log
from ffssl.train import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    convert(Embedded("train", 100), folder / "train.beton")
    convert(Embedded("val", 20), folder / "val.beton")
    data = [f"--data.train={folder / 'train.beton'}", f"--data.validation={folder / 'val.beton'}"]
    own = {"baseline": [], "efficient": ["--resolution.schedule=progressive"]}
    options = {
        name: read_options(
            [*SMALL, "--training.epochs=2", *data, *own[name], f"--run.folder={folder / name}"]
        )
        for name in own
    }
    for one in options.values():
        train(one)
    return options, {name: read_log(folder / name) for name in own}


def test_table_states_accuracy_cost_and_speed_up_of_both_runs(runs, capsys):
    options, logs = runs
    print_table(logs, 0.123)
    lines = capsys.readouterr().out.splitlines()
    assert (
        "raw pixels 12.3%" in lines[1]
        and f"untrained network {logs['baseline'][0]['knn']:.1%}" in lines[1]
    )
    last = {name: rows[-1] for name, rows in logs.items()}
    titles, _, efficient = rows_of("\n".join(lines))
    assert titles == ["run", "epochs", "kNN", "TFLOP", "speed-up", "seconds", "speed-up"]
    assert efficient[2] == f"{last['efficient']['knn']:.1%}"
    assert efficient[4] == f"{last['baseline']['flops'] / last['efficient']['flops']:.2f}x"
    assert float(efficient[4][:-1]) > 1.3  # half of its epochs at half the side
    assert efficient[6] == f"{last['baseline']['seconds'] / last['efficient']['seconds']:.2f}x"


def test_raw_pixels_are_told_apart_by_what_is_left_without_their_mean(tmp_path):
    """Grey images, dark and light by turns: only without the mean do they point to two sides."""
    levels = [(180 if i % 2 else 70) + i for i in range(12)]
    images = [np.full((32, 32, 3), level, np.uint8) for level in levels]
    labels = [i % 2 for i in range(12)]
    wrong = [1, 0, 1, *labels[3:]]  # three of the twelve
    train = write_beton(tmp_path / "train.beton", images, labels, raw=True)
    validation = write_beton(tmp_path / "val.beton", images, wrong, raw=True)
    data = [f"--data.train={train}", f"--data.validation={validation}"]
    options = read_options([*SMALL, *data, f"--run.folder={tmp_path}"])
    assert raw_pixel_accuracy(options) == pytest.approx(9 / 12)
