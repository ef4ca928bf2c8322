"""An epoch under way: its batches, the time they take, its totals, and when to look at them."""

import contextlib
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
from ffssl.training.run_schedule import StepShape
from ffssl.training.step import draws_seed
from ffssl.training.totals import EpochTotals, Meter, StepResult
from ffssl.training.transfer import RunAheadLimit, views_to_device
from ffssl.training.views import Views

# Reading the loss waits for the GPU; once in so many steps that costs nothing.
STEPS_BETWEEN_CHECKS = 50
# Check earlier if steps take long: torchrun gives its processes half a minute to save and exit.
SECONDS_BETWEEN_CHECKS = 5.0


class Epoch:
    """The rest of an epoch, counted into `run.totals`. A context manager.

    Iterating yields a batch's views on the run's device, see `ffssl.training.views`, and their
    labels int64 (B,) in the host's memory.
    """

    def __init__(self, run: Run, loader: ViewLoader):
        self.run, self.loader = run, loader
        shape, magnitude = run.schedule.shape(run.epoch), run.schedule.magnitude(run.epoch)
        self.resolution, done = shape.resolution, run.totals.steps
        loader.set_epoch(run.epoch, magnitude=magnitude, first_batch=done, **shape.for_loader)
        self._meter, self._lead = Meter(run.totals, run.joules), RunAheadLimit(run.device)
        self._replaced, self._compiled = run.totals.replaced, run.totals.compile_steps
        self._checked, self._steps_to_check = done, 1

    @property
    def step(self) -> int:
        """The optimiser step under way, counted from the start of the run."""
        return self.run.epoch * self.run.schedule.steps_per_epoch + self.run.totals.steps

    def __enter__(self) -> "Epoch":
        self._bar = self._progress_bar()
        self._batches = views_to_device(self.loader, self.run.device)
        with contextlib.ExitStack() as stack:
            stack.callback(self._bar.close)
            stack.callback(self._batches.close)
            stack.enter_context(self._meter.noticing_compilation())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[tuple[Views, Tensor]]:
        run, totals = self.run, self.run.totals
        while totals.steps < len(self.loader):
            asked = time.perf_counter()
            views, labels = next(self._batches)
            totals.waited += time.perf_counter() - asked
            # Dropout's random numbers must not depend on where a run was resumed.
            torch.manual_seed(draws_seed(run.options.run.seed, "dropout", self.step, rank()))
            yield views, labels
            self._bar.update(run.options.training.batch_size)

    def _progress_bar(self) -> tqdm:
        training = self.run.options.training
        return tqdm(
            desc=f"epoch {self.run.epoch + 1}/{training.epochs}",
            total=len(self.loader) * training.batch_size,
            initial=self.run.totals.steps * training.batch_size,
            unit="img",
            leave=False,
            disable=None if rank() == 0 else True,
        )

    def add(self, result: StepResult) -> None:
        """Count a step, without waiting for it."""
        self._meter.end_step()
        self._lead()
        self.run.totals.add(result)
        self.run.totals.replaced = self._replaced + self.loader.replaced

    def check_is_due(self, saving: bool) -> bool:
        """Return whether to look at the steps since the last check.

        Several ranks agree on what to do at the checks alone: otherwise each step would have to
        wait for the GPU.
        """
        steps = self.run.totals.steps
        due = steps in (self._checked + self._steps_to_check, len(self.loader))
        return due or (saving and world_size() == 1)

    def check(self, saving: bool) -> tuple[float, bool]:
        """Return the mean loss since the last check, and whether any rank is saving.

        Wait for the GPU and for the other ranks. Raise FloatingPointError if the loss is not
        finite.
        """
        totals = self.run.totals
        losses = torch.stack(totals.losses[self._checked :])
        # Unknown after compilation: check after the next step.
        compiled = totals.compile_steps > self._compiled
        pace = math.inf if compiled else self._meter.elapsed() / len(losses)
        told = [losses.mean(), losses.new_tensor(saving), losses.new_tensor(pace)]
        loss, saving, pace = mean_over_ranks(torch.stack(told)).tolist()
        self._checked, self._compiled = totals.steps, totals.compile_steps
        if self.run.device.type != "cpu":
            steps = int(SECONDS_BETWEEN_CHECKS / pace)
            self._steps_to_check = max(1, min(STEPS_BETWEEN_CHECKS, steps))
        if not math.isfinite(loss):
            raise FloatingPointError(self._diverged())
        self._meter.charge()
        learning_rate, _ = self.run.schedule.learning_rate_and_momentum(self.step - 1)
        self._bar.set_postfix(
            loss=f"{loss:.3f}",
            lr=f"{learning_rate:.3g}",
            res=self.resolution,
            wait=f"{totals.waited / totals.seconds:.0%}",
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
    """Count an epoch whose steps are done. Return its row of the log.

    flops: FLOPs of one step of all ranks, by the step's shape.
    """
    totals, run.totals = run.totals, EpochTotals()
    epoch, run.epoch = run.epoch, run.epoch + 1
    run.spent["seconds"] += totals.seconds
    if totals.compile_seconds or "compile_seconds" in run.spent:
        before = run.spent.get("compile_seconds", 0.0)
        run.spent["compile_seconds"] = before + totals.compile_seconds
    run.spent["flops"] += totals.steps * flops[run.schedule.shape(epoch)]
    if totals.kwh is not None and (epoch == 0 or "kwh" in run.spent):
        run.spent["kwh"] = run.spent.get("kwh", 0.0) + totals.kwh * world_size()
    else:
        # Drop it for good: the energy of a part of the run would pass for that of the whole.
        run.spent.pop("kwh", None)

    last_step = run.epoch * run.schedule.steps_per_epoch - 1
    learning_rate, momentum = run.schedule.learning_rate_and_momentum(last_step)
    images = (totals.steps - totals.compile_steps) * run.options.training.batch_size
    row = {
        "epoch": run.epoch,
        **run.spent,
        "loss": torch.stack(totals.losses).mean().item(),
        "learning_rate": learning_rate,
        "momentum": momentum,
        "noise_scale": run.schedule.noise_scale(last_step, len(loader.samples)),
        "resolution": run.schedule.resolution(epoch),
        "magnitude": run.schedule.magnitude(epoch),
        "images_per_second": images / totals.seconds,
        "data_wait": totals.waited / totals.seconds,
        "embedding_std": torch.stack(totals.embedding_stds).mean().item(),
        "effective_rank": effective_rank(totals.all_embeddings),
        **totals.gauge_means(),
    }
    if loader.broken == "replace":
        row["replaced"] = round(totals.replaced * world_size())
    return row
