"""The training views of a run: sizes, numbers and policies by its options."""

import torch

from ffssl.config import read_options
from ffssl.data.loader import ViewLoader
from ffssl.data.policy import POLICIES, ViewPolicy
from ffssl.training.schedule import RunSchedule, StepShape
from ffssl.training.views import open_loader


def options_of(data, *more):
    return read_options(
        [
            f"--data.train={data}",
            "--run.folder=none",
            "--method.name=dino",
            "--training.batch_size=16",
            "--training.epochs=4",
            "--training.warmup_epochs=1",
            "--resolution.schedule=spl",
            "--resolution.max=48",
            "--resolution.min=16",
            "--resolution.step=16",
            "--augment.local_views=3",
            "--augment.local_share=0.6",
            *more,
        ]
    )


def test_local_views_follow_the_schedules_and_are_all_served_where_pairs_are_not_chosen_yet():
    hard = ["--hard_augment.select=hard", "--augment.views=4"]
    schedule = RunSchedule(options_of("none", *hard), steps_per_epoch=5)
    assert schedule.stages == [
        (StepShape(48, 2, 32, 3), 1),
        (StepShape(16, 4, 16, 3), 1),
        (StepShape(32, 4, 16, 3), 1),
        (StepShape(48, 4, 32, 3), 1),
    ]


def test_a_runs_local_views_show_small_parts_and_its_global_views_stay_as_they_are(betons):
    without = {"augment": {"local_views": 0}, "data": {"scaled_decoding": False}}
    options = options_of(betons["train"], "--data.scaled_decoding=false")
    schedule = RunSchedule(options, steps_per_epoch=5)
    part = ViewPolicy(crop_scale=(0.05, 0.14), saturation=0.2, blur=0.5)
    with (
        open_loader(options) as loader,
        open_loader(options.changed(**without)) as plain,
        ViewLoader(
            betons["train"],
            batch_size=16,
            views=5,
            resolution=32,
            policy=[*POLICIES["byol"], part, part, part],
            scaled_decoding=False,
        ) as expected,
    ):
        loader.set_epoch(0, **schedule.shape(0).for_loader)
        for batch, of_plain, of_expected in zip(loader, plain, expected):
            views, local = batch.views
            assert views.shape[2:] == (3, 48, 48) and local.shape[1:] == (3, 3, 32, 32)
            assert torch.equal(views, of_plain.views)
            assert torch.equal(local, of_expected.views[:, 2:])
