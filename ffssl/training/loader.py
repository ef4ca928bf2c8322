"""The training views of a run."""

import warnings
from dataclasses import replace

from ffssl.config import Options
from ffssl.data.loader import ViewLoader
from ffssl.data.policy import local_policy
from ffssl.parallel.ranks import cores_per_rank, rank, ranks_here, world_size
from ffssl.training.run_schedule import RunSchedule, view_policies


def open_loader(options: Options) -> ViewLoader:
    """Open the loader of a run's training views: this rank's part of every batch."""
    data, augment = options.data, options.augment
    policies = view_policies(options)
    largest = RunSchedule(options, steps_per_epoch=1).shape_at(
        options.resolution.max, augment.views
    )
    local = local_policy(policies[0], augment.local_crop_scale_max)
    if local.blur_side:
        local = replace(local, blur_side=largest.local_resolution)
    # Without the loader's warning about labels: the evaluations print what they use.
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        return ViewLoader(
            data.train,
            batch_size=options.training.batch_size // world_size(),
            policy=(policies, (local,)) if augment.local_views else policies,
            **largest.for_loader,
            seed=options.run.seed,
            workers=data.workers or cores_per_rank(),
            batches_ahead=data.batches_ahead,
            scaled_decoding=data.scaled_decoding,
            broken=data.broken,
            label_field=data.label_field,
            rank=rank(),
            world_size=world_size(),
            loaders_here=ranks_here(),
        )
