import pytest

from ffssl import ProgressiveMagnitude, ProgressiveResolution
from ffssl.config import read_options
from ffssl.errors import UserError
from ffssl.training.run_schedule import RunSchedule

PAPERS = ProgressiveResolution(epochs=480, warmup_epochs=80, low=96, high=224)


def test_the_stages_are_the_papers_six_of_eighty_epochs():
    assert PAPERS.stages == [(side, 80) for side in (224, 96, 128, 160, 192, 224)]
    assert [PAPERS(epoch) for epoch in (0, 79, 80, 159, 160, 479)] == [224, 224, 96, 96, 128, 224]


@pytest.mark.parametrize("epochs, warmup, low, high, step", [(7, 0, 32, 96, 32), (23, 4, 8, 20, 4)])
def test_both_are_those_of_a_run_with_these_options(epochs, warmup, low, high, step):
    options = read_options(
        [
            "--data.train=x",
            "--run.folder=x",
            "--resolution.schedule=spl",
            f"--training.epochs={epochs}",
            f"--training.warmup_epochs={warmup}",
            f"--resolution.min={low}",
            f"--resolution.max={high}",
            f"--resolution.step={step}",
            "--hard_augment.resolution=8",
            "--augment.magnitude_min=4",
            "--augment.magnitude_max=6",
        ]
    )
    run = RunSchedule(options, steps_per_epoch=1)
    resolution = ProgressiveResolution(epochs, warmup, low, high, step)
    magnitude = ProgressiveMagnitude(epochs, 4, 6)
    for epoch in range(epochs):
        assert resolution(epoch) == run.resolution(epoch)
        assert magnitude(epoch) == run.magnitude(epoch)
    assert [side for side, n in resolution.stages for _ in range(n)] == [
        run.resolution(epoch) for epoch in range(epochs)
    ]


def test_the_magnitude_rises_linearly_to_the_last_epoch():
    magnitude = ProgressiveMagnitude(epochs=5, low=4, high=6)
    assert [magnitude(epoch) for epoch in range(5)] == [4, 4.5, 5, 5.5, 6]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ProgressiveResolution(10, 10, 96, 224), r"warmup_epochs is 10, must lie in 0..9"),
        (lambda: ProgressiveResolution(10, 2, 100, 224), "no whole number of steps of 32 px"),
        (lambda: ProgressiveResolution(10, 2, 224, 96), "from low=224 to high=96"),
        (lambda: ProgressiveMagnitude(0, 4, 6), "epochs is 0"),
        (lambda: PAPERS(480), "ProgressiveResolution: epoch 480 is none of its 480"),
        (lambda: ProgressiveMagnitude(3, 4, 6)(-1), "ProgressiveMagnitude: epoch -1 is none"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(make, message):
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
