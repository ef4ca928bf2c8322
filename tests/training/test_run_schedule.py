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
