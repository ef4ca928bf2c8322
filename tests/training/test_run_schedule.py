import pytest

from ffssl.config import read_options
from ffssl.training.run_schedule import RunSchedule, input_sides

STAGES = ["--resolution.schedule=stages", "--resolution.stages=96:0.5, 192:0.25, 224:0.25"]


def test_a_run_follows_free_stages_from_its_first_epoch_on():
    options = read_options(
        ["--data.train=a.beton", "--run.folder=runs", "--training.epochs=8", *STAGES]
    )
    schedule = RunSchedule(options, steps_per_epoch=10)
    assert [schedule.resolution(e) for e in range(8)] == [96] * 4 + [192] * 2 + [224] * 2
    assert schedule.resolutions == [96, 192, 224]
    assert input_sides(options) == {
        96: "--resolution.stages",
        192: "--resolution.stages",
        224: "--resolution.max",
    }


@pytest.mark.parametrize(
    "arguments, start",
    [
        (["--method.name=byol"], 0),
        (["--method.name=byol", "--training.schedule=f1-clr", "--training.warmup_epochs=3"], 3),
        (["--method.name=barlow_twins"], 5),
        (["--method.name=dino"], 5),
        (
            [
                "--method.name=barlow_twins",
                "--training.schedule=f1-clr",
                "--training.warmup_epochs=7",
            ],
            7,
        ),
        (["--method.name=barlow_twins", "--hard_augment.start_epoch=1"], 1),
    ],
)
def test_pairs_are_chosen_after_the_warm_up_and_not_before_the_method_bears_it(arguments, start):
    options = read_options(
        [
            "--data.train=a.beton",
            "--run.folder=runs",
            "--training.epochs=10",
            "--augment.views=4",
            "--hard_augment.select=hard",
            *arguments,
        ]
    )
    schedule = RunSchedule(options, steps_per_epoch=10)
    assert [schedule.selection(e).select for e in range(10)] == ["off"] * start + ["hard"] * (
        10 - start
    )
    assert [schedule.views(e) for e in range(10)] == [2] * start + [4] * (10 - start)
