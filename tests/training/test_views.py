"""The training views of a run: sizes, numbers and policies by its options."""

from dataclasses import replace

import torch

from ffssl.config import read_options
from ffssl.data.loader import ViewLoader
from ffssl.data.policy import POLICIES, ViewPolicy
from ffssl.training.loader import open_loader
from ffssl.training.run_schedule import RunSchedule, StepShape


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
    hard = ["--hard_augment.select=hard", "--hard_augment.start_epoch=1", "--augment.views=4"]
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


def test_a_runs_blur_is_its_policys_at_full_resolution_and_in_proportion_below(betons):
    options = options_of(betons["train"], "--augment.policy=simsiam", "--augment.blur=1")
    schedule = RunSchedule(options, steps_per_epoch=5)
    part = replace(POLICIES["simsiam"][0], crop_scale=(0.05, 0.14), blur=0.5)

    def views_of(options, epoch, policies=None):
        with open_loader(options) as loader:
            if policies is not None:
                loader._settings.policies = policies
            loader.set_epoch(epoch, **schedule.shape(epoch).for_loader)
            return [part.clone() for part in next(iter(loader)).views]

    changed = options.changed(augment={"blur_scale": "proportional"})
    same = views_of(changed, 0), views_of(options, 0)
    assert schedule.shape(0) == (48, 2, 32, 3)
    assert all(torch.equal(a, b) for a, b in zip(*same))
    assert schedule.shape(1) == (16, 2, 16, 3)
    globals_, locals_ = (
        replace(policy, blur=blur, blur_sigma=(0.1 * share, 2.0 * share))
        for policy, blur, share in ((POLICIES["simsiam"][0], 1.0, 1 / 3), (part, 0.5, 1 / 2))
    )
    ours = views_of(changed, 1)
    expected = views_of(options, 1, (globals_,) * 2 + (locals_,) * 3)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected))
    assert not any(torch.equal(a, b) for a, b in zip(ours, views_of(options, 1)))
