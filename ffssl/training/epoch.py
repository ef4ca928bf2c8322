"""An epoch under way: its batches, timed; what its steps add up to; when they are looked at."""

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from ffssl.data.loader import ViewLoader
from ffssl.parallel.ranks import mean_over_ranks, rank, world_size
from ffssl.training.gauges import effective_rank
from ffssl.training.run import Run
from ffssl.training.schedule import StepShape
from ffssl.training.totals import Meter, StepResult, Tally
from ffssl.training.transfer import Lead, to_device

STEPS_BETWEEN_CHECKS = 50  # on a GPU reading the loss waits for the step; so often costs nothing
# Fewer steps if they take longer: torchrun grants its processes half a minute to save and leave.
SECONDS_BETWEEN_CHECKS = 5.0


class Epoch:
    """What is left of an epoch, counted into `run.tally`. A context manager.

    Iterating gives views (B, m, 3, R, R) on the run's device.
    """

    def __init__(self, run: Run, loader: ViewLoader):
        self.run, self.loader = run, loader
        self.resolution, views = run.plan.shape(run.epoch)
        magnitude, done = run.plan.magnitude(run.epoch), run.tally.steps
        loader.set_epoch(run.epoch, self.resolution, magnitude, views=views, first_batch=done)
        self._meter, self._lead = Meter(run.tally, run.joules), Lead(run.device)
        self._replaced, self._checked, self._steps_to_check = run.tally.replaced, done, 1

    @property
    def step(self) -> int:
        """The optimiser step under way, counted from the start of the run."""
        return self.run.epoch * self.run.plan.steps_per_epoch + self.run.tally.steps

    def __enter__(self) -> "Epoch":
        self._bar = self._progress_bar()
        self._batches = to_device((views for views, _, _ in self.loader), self.run.device)
        return self

    def __exit__(self, *_) -> None:
        self._batches.close()
        self._bar.close()

    def __iter__(self) -> Iterator[Tensor]:
        run, tally = self.run, self.run.tally
        while tally.steps < len(self.loader):
            asked = time.perf_counter()
            views = next(self._batches)
            tally.waited += time.perf_counter() - asked
            # So that its random numbers (of dropout) do not depend on where a run was resumed, and
            # each rank has its own.
            torch.manual_seed(run.options.run.seed + self.step + (rank() << 32))
            yield views
            self._bar.update(run.options.training.batch_size)

    def _progress_bar(self) -> tqdm:
        training = self.run.options.training
        return tqdm(
            desc=f"epoch {self.run.epoch + 1}/{training.epochs}",
            total=len(self.loader) * training.batch_size,
            initial=self.run.tally.steps * training.batch_size,
            unit="img",
            leave=False,
            disable=None if rank() == 0 else True,
        )

    def add(self, result: StepResult) -> None:
        """Count a step, which is not waited for."""
        self._lead()
        self.run.tally.add(result)
        self.run.tally.replaced = self._replaced + self.loader.replaced

    def check_is_due(self, saving: bool) -> bool:
        """Whether to look at the steps since the last check.

        Several ranks agree on what to do at the checks alone: for one, each step would have to wait
        for the GPU.
        """
        steps = self.run.tally.steps
        due = steps in (self._checked + self._steps_to_check, len(self.loader))
        return due or (saving and world_size() == 1)

    def check(self, saving: bool) -> tuple[float, bool]:
        """The mean loss since the last check, and whether any rank is saving.

        Waits for the GPU, and for the other ranks. Raises FloatingPointError for a loss that is not
        finite.
        """
        tally = self.run.tally
        losses = torch.stack(tally.losses[self._checked :])
        pace = self._meter.elapsed() / len(losses)
        told = [losses.mean(), losses.new_tensor(saving), losses.new_tensor(pace)]
        loss, saving, pace = mean_over_ranks(torch.stack(told)).tolist()
        self._checked = tally.steps
        if self.run.device.type != "cpu":
            steps = int(SECONDS_BETWEEN_CHECKS / pace)
            self._steps_to_check = max(1, min(STEPS_BETWEEN_CHECKS, steps))
        if not math.isfinite(loss):
            raise FloatingPointError(self._diverged())
        self._meter.charge()
        learning_rate, _ = self.run.plan.learning_rate_and_momentum(self.step - 1)
        self._bar.set_postfix(
            loss=f"{loss:.3f}",
            lr=f"{learning_rate:.3g}",
            res=self.resolution,
            wait=f"{tally.waited / tally.seconds:.0%}",
        )
        return loss, bool(saving)

    def _diverged(self) -> str:
        run = self.run
        return (
            f"the loss is not finite at step {self.step - 1} (epoch {run.epoch + 1}); the last "
            f"checkpoint in {run.options.run.folder} is untouched. Try a smaller "
            f"--training.learning_rate (now {run.options.training.learning_rate:g}) or a longer "
            "--training.warmup_epochs"
        )


def end_epoch(run: Run, loader: ViewLoader, flops: dict[StepShape, int]) -> dict[str, float]:
    """Count an epoch whose steps are done. Returns its row in the log.

    flops: of a step of all ranks.
    """
    tally, run.tally = run.tally, Tally()
    epoch, run.epoch = run.epoch, run.epoch + 1
    run.spent["seconds"] += tally.seconds
    run.spent["flops"] += tally.steps * flops[run.plan.shape(epoch)]
    if tally.kwh is not None and (epoch == 0 or "kwh" in run.spent):
        run.spent["kwh"] = run.spent.get("kwh", 0.0) + tally.kwh * world_size()
    else:  # for good: what a part of the run has used would pass for the whole
        run.spent.pop("kwh", None)

    last_step = run.epoch * run.plan.steps_per_epoch - 1
    learning_rate, momentum = run.plan.learning_rate_and_momentum(last_step)
    images = tally.steps * run.options.training.batch_size
    row = {
        "epoch": run.epoch,
        **run.spent,
        "loss": torch.stack(tally.losses).mean().item(),
        "learning_rate": learning_rate,
        "momentum": momentum,
        "noise_scale": run.plan.noise_scale(last_step, len(loader.samples)),
        "resolution": loader.resolution,
        "magnitude": run.plan.magnitude(epoch),
        "images_per_second": images / tally.seconds,
        "data_wait": tally.waited / tally.seconds,
        "embedding_std": torch.stack(tally.spreads).mean().item(),
        "effective_rank": effective_rank(tally.all_embeddings),
        **tally.gauge_means(),
    }
    if loader.broken == "replace":
        row["replaced"] = round(tally.replaced * world_size())
    return row
