"""One optimiser step."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ffssl import hard_augment
from ffssl.methods.base import Progress
from ffssl.training import gauges
from ffssl.training.optimizers import (
    clip_each,
    set_learning_rate_and_momentum,
    set_weight_decay,
)
from ffssl.training.run import Run
from ffssl.training.totals import StepResult
from ffssl.training.views import Views, global_and_local, split_batch


def train_step(
    run: Run,
    views: Views,
    step: int,
    labels: Tensor | None = None,
    mark: Callable[[str], None] = lambda part: None,
) -> StepResult:
    """Take one optimiser step on this rank's views, without waiting for the device.

    views: on the run's device, see `ffssl.training.views`.
    step: counted from the start of the run.
    labels: int64 (B,), in the host's memory, from which the run's classifier learns; without them
        it takes no step.
    mark: called with a part's name when the device has been given all work of that part.
    """
    options, progress = run.options, Progress(step, run.schedule.total_steps, run.epoch)
    learning_rate, momentum = run.schedule.learning_rate_and_momentum(step)
    set_learning_rate_and_momentum(
        run.optimizer, learning_rate, momentum, peak=options.training.learning_rate
    )
    if options.training.weight_decay_end is not None:
        set_weight_decay(run.optimizer, run.schedule.weight_decay(step))
    run.method.before_step(progress)
    run.optimizer.zero_grad(set_to_none=True)
    # Once a step, not once a part: the next part adds to the gradients of the one before.
    if run.device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()

    parts = split_batch(views, options.training.accumulate)
    seeds = [draws_seed(options.run.seed, "pairs", step, part) for part in range(len(parts))]
    targets: Sequence[Tensor | None] = [None] * len(parts)
    if run.classifier is not None and labels is not None:
        targets = run.classifier.targets(labels).chunk(len(parts))
    with local_gradients(run.parallel):
        results = [
            add_gradients(run, part, seed, len(parts), of_part, mark)
            for part, seed, of_part in zip(parts[:-1], seeds, targets)
        ]
    steps_per_epoch = run.schedule.steps_per_epoch
    measured = gauges.is_due(step % steps_per_epoch, steps_per_epoch)
    results.append(
        add_gradients(run, parts[-1], seeds[-1], len(parts), targets[-1], mark, measured=measured)
    )

    run.method.after_backward(progress)
    if options.training.clip_gradient:
        run.scaler.unscale_(run.optimizer)
        clip_each(run.method.parameters(), options.training.clip_gradient)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.classifier is not None and labels is not None:
        run.classifier.step(step)
    mark("optimiser")
    run.method.after_step(progress)
    mark("teacher")

    losses, stds, embeddings, readings = zip(*results)
    loss, std = torch.stack(losses).mean(), torch.stack(stds).mean()
    return StepResult(loss, std, torch.cat(embeddings), readings[-1])


def draws_seed(seed: int, of: Literal["pairs", "dropout"], step: int, part: int) -> int:
    """Return the seed, of 64 bits, of what one part of a batch, or one rank, draws in a step.

    Unlike a sum, it gives runs of neighbouring seeds nothing in common (numpy's SeedSequence).
    """
    key = (("pairs", "dropout").index(of), step, part)
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])


def local_gradients(network: nn.Module) -> contextlib.AbstractContextManager:
    """Return a context in which backward passes add to this rank's gradients only.

    The next backward pass outside averages the sums over the ranks.
    """
    if isinstance(network, DistributedDataParallel):
        return network.no_sync()
    return contextlib.nullcontext()


def add_gradients(
    run: Run,
    views: Views,
    seed: int,
    parts: int = 1,
    targets: Tensor | None = None,
    mark: Callable[[str], None] = lambda part: None,
    measured: bool = False,
) -> StepResult:
    """Run the forward and backward pass over one of `parts` equal parts of a batch.

    views: of B / parts images, on the run's device.
    seed: seed of random pairs.
    targets: of the run's classifier, see `OnlineClassifier.targets`.
    mark: as in `train_step`.
    measured: whether to measure the gauges.
    """
    selection = run.schedule.selection(run.epoch)
    whole, local = global_and_local(views)
    with run.amp:
        chosen = hard_augment.choose_views(run.method, whole, selection, seed)
    mark("selection")
    readings = None
    if measured:
        readings = torch.full((3,), math.nan, device=run.device)
        if selection.select == "hard" and whole.shape[1] > 2:
            # Before the loss, in which MoCo puts the keys of the chosen views into its queue.
            with run.amp:
                pair = chosen[0], chosen[1]
                hardness = gauges.hardness(run.method, whole, pair, selection, seed)
                readings[:2] = torch.stack(hardness)
    # Enter autocast again: before torch 2.10 it caches the weights that the selection cast without
    # gradient, and no gradient would reach the real weights.
    with run.amp:
        loss, embeddings = run.parallel(*chosen, **hard_augment.local_argument(local))
        if readings is not None:
            cosine = gauges.predictor_cosine(run.method, embeddings.detach())
            if cosine is not None:
                readings[2] = cosine
    mark("forward")
    run.scaler.scale(loss / parts).backward()
    if run.classifier is not None and targets is not None:
        run.classifier.add_gradients(targets)
    mark("backward")
    # Copy them: CUDA graphs write the next results to the same memory.
    loss, embeddings = loss.detach().clone(), embeddings.detach().clone()
    return StepResult(loss, embedding_std(embeddings), embeddings, readings)


def embedding_std(embeddings: Tensor) -> Tensor:
    """Return the standard deviation of the L2-normalised embeddings (N, d) times sqrt(d).

    It is 1 for random directions and 0 after a collapse.
    """
    z = F.normalize(embeddings.float(), dim=1)
    return z.std(0).mean() * z.shape[1] ** 0.5
