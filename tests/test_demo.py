import pytest
from printed_tables import rows_of

from ffssl.config import read_options
from ffssl.data.convert.conversion import convert
from ffssl.data.convert.sources.embedded import Embedded
from ffssl.demo import print_table, raw_pixel_accuracy
from ffssl.run_folder.log import read_log
from ffssl.train import train

SMALL = [
    "--model.backbone=resnet-small",
    "--method.name=simclr",
    "--method.hidden=32",
    "--method.projection=16",
    "--resolution.max=32",
    "--resolution.min=16",
    "--resolution.step=16",
    "--hard_augment.resolution=16",
    "--training.batch_size=16",
    "--evaluate.k=5",
    "--training.epochs=2",
    "--run.tensorboard=false",
    "--run.device=cpu",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    convert(Embedded("train", 100), folder / "train.beton")
    convert(Embedded("val", 20), folder / "val.beton")
    data = [f"--data.train={folder / 'train.beton'}", f"--data.validation={folder / 'val.beton'}"]
    own = {"baseline": [], "efficient": ["--resolution.schedule=progressive"]}
    options = {
        name: read_options([*SMALL, *data, *own[name], f"--run.folder={folder / name}"])
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


def test_raw_pixels_are_classified_as_the_definition_says(runs):
    options, _ = runs
    assert 0 <= raw_pixel_accuracy(options["baseline"]) < 0.6
