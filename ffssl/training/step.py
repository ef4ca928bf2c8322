"""One step of the optimiser."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ffssl import hard_augment
from ffssl.methods import Method
from ffssl.methods.base import Progress
from ffssl.training import gauges
from ffssl.training.optimizers import set_learning_rate_and_momentum
from ffssl.training.run import Run
from ffssl.training.totals import StepResult


def train_step(
    run: Run, views: Tensor, step: int, mark: Callable[[str], None] = lambda part: None
) -> StepResult:
    """One step of the optimiser on this rank's uint8 views (B, m, 3, R, R) on the run's device,
    without waiting for it.

    mark: called with the name of each part when it has been given to the device.
    """
    options, progress = run.options, Progress(step, run.schedule.total_steps, run.epoch)
    learning_rate, momentum = run.schedule.learning_rate_and_momentum(step)
    set_learning_rate_and_momentum(
        run.optimizer, learning_rate, momentum, peak=options.training.learning_rate
    )
    run.method.before_step(progress)
    run.optimizer.zero_grad(set_to_none=True)
    # Before the first part alone: the gradients of one must last while the next adds to them.
    if run.device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()
    parts = views.chunk(options.training.accumulate)
    # No part's pairs are drawn as another's.
    seeds = [(options.run.seed + step) * len(parts) + part for part in range(len(parts))]
    with local_gradients(run.parallel):
        results = [
            add_gradients(run, part, seed, len(parts), mark)
            for part, seed in zip(parts[:-1], seeds)
        ]
    steps_per_epoch = run.schedule.steps_per_epoch
    measured = gauges.is_due(step % steps_per_epoch, steps_per_epoch)
    results.append(add_gradients(run, parts[-1], seeds[-1], len(parts), mark, measured=measured))
    run.method.after_backward(progress)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    mark("optimiser")
    run.method.after_step(progress)
    mark("teacher")
    losses, stds, embeddings, readings = zip(*results)
    return StepResult(
        torch.stack(losses).mean(), torch.stack(stds).mean(), torch.cat(embeddings), readings[-1]
    )


def local_gradients(network: nn.Module) -> contextlib.AbstractContextManager:
    """Backward passes inside add to this rank's gradients; the next one outside averages the sums
    over the ranks.
    """
    return (
        network.no_sync()
        if isinstance(network, DistributedDataParallel)
        else contextlib.nullcontext()
    )


def add_gradients(
    run: Run,
    views: Tensor,
    seed: int,
    parts: int = 1,
    mark: Callable[[str], None] = lambda part: None,
    measured: bool = False,
) -> StepResult:
    """Forward and backward pass over one of the equal `parts` of a batch, as `train_step`."""
    selection = run.schedule.selection(run.epoch)
    with run.amp:
        chosen = hard_augment.choose_views(run.method, views, selection, seed)
    mark("selection")
    # Anew: before torch 2.10 autocast keeps the weights that it cast without gradient, and none
    # would reach the real ones.
    with run.amp:
        loss, embeddings = run.parallel(*chosen)
    mark("forward")
    readings = None
    if measured:
        with run.amp:
            readings = measure(run.method, views, chosen[:2], selection, seed, embeddings.detach())
    run.scaler.scale(loss / parts).backward()
    mark("backward")
    # Copies: CUDA graphs write the next results to the same place.
    loss, embeddings = loss.detach().clone(), embeddings.detach().clone()
    return StepResult(loss, embedding_std(embeddings), embeddings, readings)


def measure(
    method: Method,
    views: Tensor,
    chosen: tuple[Tensor, Tensor],
    selection: hard_augment.Selection,
    seed: int,
    embeddings: Tensor,
) -> Tensor:
    """The gauges of a step, see `StepResult`: (3,), NaN for what is not measured."""
    readings = embeddings.new_full((3,), float("nan"), dtype=torch.float32)
    if selection.select == "hard" and views.shape[1] > 2:
        readings[:2] = torch.stack(gauges.hardness(method, views, chosen, selection, seed))
    cosine = gauges.predictor_cosine(method, embeddings)
    if cosine is not None:
        readings[2] = cosine
    return readings


def embedding_std(embeddings: Tensor) -> Tensor:
    """Standard deviation of the L2-normalised embeddings (N, d) times sqrt(d): 1 for directions at
    random, 0 after a collapse.
    """
    z = F.normalize(embeddings.float(), dim=1)
    return z.std(0).mean() * z.shape[1] ** 0.5
