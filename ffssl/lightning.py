"""The levers in a LightningModule: callbacks for the Trainer, and a helper for `training_step`.

    trainer = Trainer(
        max_epochs=100,
        callbacks=[
            OneCycle(max_lr=0.1, warmup_epochs=20),
            ViewSchedule(ProgressiveResolution(epochs=100, warmup_epochs=20, low=96, high=224)),
        ],
    )

They need the extra `lightning`. They fit the Trainer of `lightning` or of `pytorch_lightning`: that
which the program has imported, or else that which is installed. docs/levers.md shows them in use.
"""

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ffssl.data.loader import ViewLoader
from ffssl.data.normalise import to_input
from ffssl.errors import UserError
from ffssl.levers.hardest_views import hardest_views
from ffssl.levers.one_cycle import FixedOneCycleLR
from ffssl.levers.progressive import ProgressiveMagnitude, ProgressiveResolution


def _lightning() -> Any:
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise ImportError("ffssl.lightning needs Lightning: pip install 'ffssl[lightning]'")


pl = _lightning()


class OneCycle(pl.Callback):  # type: ignore[name-defined]  # of whichever Lightning is there
    """F1-CLR: the learning rate and the momentum of each step, see `FixedOneCycleLR`.

    The Trainer steps it, logs it (`LearningRateMonitor`) and saves it, as any scheduler.

    max_lr: the peak; a list has one for each parameter group.
    warmup_epochs: epochs until the peak; may be a fraction.
    momentum: at the peak, and where the learning rate is 0; None leaves it alone.

    When training starts it raises UserError for a module with several optimisers or a scheduler of
    its own, and for a Trainer without `max_epochs`.
    """

    def __init__(
        self,
        max_lr: float | Sequence[float],
        warmup_epochs: float,
        momentum: tuple[float, float] | None = (0.85, 0.95),
    ):
        self.max_lr, self.warmup_epochs, self.momentum = max_lr, warmup_epochs, momentum

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # The optimisers are set up here, and a checkpoint's schedulers not yet restored.
        if len(trainer.optimizers) != 1 or not pl_module.automatic_optimization:
            raise UserError(
                f"OneCycle: {type(pl_module).__name__} has {len(trainer.optimizers)} optimisers, "
                "or steps them by itself; use FixedOneCycleLR there"
            )
        if trainer.lr_scheduler_configs:
            raise UserError(
                f"OneCycle: {type(pl_module).__name__}.configure_optimizers returns a scheduler as "
                "well; return the optimiser alone"
            )
        total = trainer.estimated_stepping_batches
        if trainer.max_epochs < 1 or not math.isfinite(total):
            raise UserError("OneCycle: the length of training is not known; set max_epochs")
        per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        warmup = 0 if trainer.fast_dev_run else round(self.warmup_epochs * per_epoch)
        scheduler = FixedOneCycleLR(
            trainer.optimizers[0], int(total), warmup, self.max_lr, self.momentum
        )
        config = importlib.import_module(f"{pl.__name__}.utilities.types").LRSchedulerConfig
        trainer.lr_scheduler_configs.append(config(scheduler, interval="step"))


class ViewSchedule(pl.Callback):  # type: ignore[name-defined]
    """Super Progressive Learning: the epoch, resolution and magnitude of a `ViewLoader`.

    The loader is the Trainer's only one for training. With several ranks it must be made in
    `train_dataloader`, with `rank=trainer.global_rank` and `world_size=trainer.world_size`.

    resolution: by epoch; by default the loader's own.
    magnitude: by epoch; by default the standard one.
    pairs_until: epochs in which the loader serves two views of each image, before Hard Augment
        begins; for example those of the warm-up. Thereafter it serves all that it was made for.

    When training starts it raises UserError for another kind of loader, for a loader of other
    ranks, and for schedules of another number of epochs than the Trainer's.
    """

    def __init__(
        self,
        resolution: ProgressiveResolution | None = None,
        magnitude: ProgressiveMagnitude | None = None,
        *,
        pairs_until: int = 0,
    ):
        self.schedules: dict[str, ProgressiveResolution | ProgressiveMagnitude] = {
            name: schedule
            for name, schedule in (("resolution", resolution), ("magnitude", magnitude))
            if schedule is not None
        }
        self.pairs_until = pairs_until

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        loader = trainer.train_dataloader
        if not isinstance(loader, ViewLoader):
            raise UserError(
                f"ViewSchedule: the Trainer's loader is a {type(loader).__name__}, must be a "
                "ffssl.data.ViewLoader"
            )
        if (loader.rank, loader.world_size) != (trainer.global_rank, trainer.world_size):
            raise UserError(
                f"ViewSchedule: {loader.beton.name}: the loader is that of rank {loader.rank} of "
                f"{loader.world_size}, the Trainer's is {trainer.global_rank} of "
                f"{trainer.world_size}; make it in train_dataloader, with "
                "rank=self.trainer.global_rank, world_size=self.trainer.world_size"
            )
        if not isinstance(loader.most_views, int):
            raise UserError(
                f"ViewSchedule: {loader.beton.name}: the loader has views of several sizes; call "
                "its set_epoch in on_train_epoch_start of the module"
            )
        for name, schedule in self.schedules.items():
            if schedule.epochs != trainer.max_epochs and not trainer.fast_dev_run:
                raise UserError(
                    f"ViewSchedule: the {name} has {schedule.epochs} epochs, the Trainer "
                    f"max_epochs={trainer.max_epochs}; make them the same"
                )
        # A run that goes on within an epoch has no on_train_epoch_start.
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        loader, epoch = trainer.train_dataloader, trainer.current_epoch
        views = min(2, loader.most_views) if epoch < self.pairs_until else loader.most_views
        settings = {name: schedule(epoch) for name, schedule in self.schedules.items()}
        loader.set_epoch(epoch, views=views, **settings)


def training_pair(
    embed: Callable[[Tensor], Any],
    views: Tensor | Sequence[Tensor],
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    resolution: int = 64,
    normalise: Callable[[Tensor], Tensor] | None = to_input,
) -> tuple[Tensor, Tensor]:
    """Return the two views to train on, normalised, in `training_step`.

    Of three views or more they are the pair with the largest loss; of two, these. The arguments are
    those of `hardest_views`. `normalise` is that of a ViewLoader's views; None leaves views as they
    are.
    """
    given = views.unbind(1) if isinstance(views, Tensor) else tuple(views)
    if len(given) == 2:
        first, second = given
    else:
        first, second = hardest_views(
            embed, views, loss, resolution=resolution, normalise=normalise
        )
    return (first, second) if normalise is None else (normalise(first), normalise(second))
