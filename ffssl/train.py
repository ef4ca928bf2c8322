"""Pre-train an image encoder without labels.

    python ffssl/train.py --config rn50_configs/efficient.yaml --data.train=train.beton --run.folder=runs/efficient
    python ffssl/train.py --config rn50_configs/efficient.yaml ... --training.epochs=50     # any option can be overridden
    python ffssl/train.py --help                                                            # all options
    torchrun --nproc_per_node=8 ffssl/train.py --config ...                                 # on 8 GPUs, see docs/many-gpus.md

The same command again continues a run that was interrupted, from the start of the epoch.
"""

import sys

from ffssl.command_line import exit_status
from ffssl.config import command_line_options
from ffssl.openmp import share_cores

if __name__ == "__main__":  # before torch is imported, which takes seconds: --help and a mistyped option are answered at once
    OPTIONS = command_line_options(__doc__)
    share_cores()

import contextlib
import math
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from ffssl import checkpoint
from ffssl.config import as_dict, shared_options
from ffssl.cost import count_flops
from ffssl.data.loader import ViewLoader
from ffssl.data.policy import choose_policies
from ffssl.device import choose_device, describe_precision
from ffssl.distributed import (
    check_batch, cores_per_rank, failing_together, local_device, mean_over_ranks, process_group, rank, require_same, world_size,
)  # fmt: skip
from ffssl.energy import JOULES_PER_KWH
from ffssl.errors import UserError
from ffssl.evaluate.online import OnlineKnn
from ffssl.methods import Method
from ffssl.plan import Plan
from ffssl.run_log import RunLog, require_wandb
from ffssl.run_record import record_start
from ffssl.step import PASSES, Run, build, compile_passes, memory_advice, start_run, to_device, train_step

STEPS_BETWEEN_CHECKS = 50  # on a GPU reading the loss waits for the step; this often costs nothing and loses little


def train(options: SimpleNamespace) -> None:
    """Train to the end, from the folder's checkpoint where there is one, with the other ranks where torchrun has started some.

    Raises UserError, FloatingPointError if the loss diverges, and ConnectionError if another rank is lost.
    """
    folder = Path(options.run.folder)
    if options.run.wandb:
        require_wandb()  # before anything takes time
    device = local_device(choose_device(options.run.device))
    torch.manual_seed(options.run.seed)
    method = build(options, device)
    flops = count_flops(Plan(options, steps_per_epoch=1), method)  # of all ranks, as one process that takes the whole batch
    with contextlib.ExitStack() as stack:
        stack.enter_context(process_group(device))
        first = rank() == 0  # it evaluates, writes and tells, once for all
        require_same(shared_options(options))
        check_batch(options.training.batch_size, options.training.accumulate)
        with failing_together():
            loader = stack.enter_context(open_loader(options, method))
            knn = stack.enter_context(contextlib.closing(OnlineKnn(options, device))) if options.data.validation and first else None
        require_same({"--data.train": f"{len(loader.beton)} samples, fingerprint {loader.beton.fingerprint()}"})
        run = start_run(options, method, Plan(options, len(loader)), device)
        compiled = compile_passes(method, PASSES, options.training.compile, device)
        with failing_together():
            resumed = resume(run, folder)
        require_same({f"--run.folder: {folder}": f"a checkpoint of epoch {run.epoch}" if resumed else "no checkpoint"})
        log = None
        if first:
            ranks = f", {world_size()} processes" if world_size() > 1 else ""
            print(f"{loader.describe_memory()}{', on each process' if ranks else ''}", flush=True)
            print(f"on {device}{ranks}: {describe_precision(options.training.amp, device)}; torch.compile {compiled}", flush=True)
            record_start(folder, device)
            log = stack.enter_context(contextlib.closing(open_log(run, folder, resumed)))
        if first and not resumed:
            if knn:
                row = {"epoch": 0, **run.spent, "knn": knn.accuracy(method.backbone, run.amp)}
                log.write(row)
                print(f"untrained: kNN {row['knn']:.1%}", flush=True)
            checkpoint.save(folder, run.state())

        epochs = options.training.epochs
        while run.epoch < epochs:
            row = None
            with contextlib.suppress(torch.OutOfMemoryError):
                row = train_epoch(run, loader, flops, log)
            if row is None:  # the failed step's tensors are free again by now
                raise UserError(out_of_memory(run, loader))
            if not first:
                continue
            if knn and (run.epoch == epochs or (options.evaluate.every and run.epoch % options.evaluate.every == 0)):
                row["knn"] = knn.accuracy(method.backbone, run.amp)
            log.write(row)
            checkpoint.save(folder, run.state())
            print(summary(row, epochs), flush=True)


def train_epoch(run: Run, loader: ViewLoader, flops: dict[int, int], log: RunLog | None) -> dict[str, float]:
    """One pass over the training images. flops: of a step, by resolution. Shows its steps in the log, rank 0's, and returns its row."""
    options, plan, epoch = run.options, run.plan, run.epoch
    resolution, magnitude = plan.resolution(epoch), plan.magnitude(epoch)
    # So that an epoch's random numbers (of dropout) don't depend on where a run was resumed, and each rank has its own.
    torch.manual_seed(options.run.seed + epoch + (rank() << 32))
    loader.set_epoch(epoch, resolution, magnitude)
    run.method.train()
    step = epoch * plan.steps_per_epoch
    losses, spreads, waited, started, joules = [], [], 0.0, time.perf_counter(), run.joules()
    check_every = 1 if run.device.type == "cpu" else STEPS_BETWEEN_CHECKS
    images, name = len(loader) * options.training.batch_size, f"epoch {epoch + 1}/{options.training.epochs}"

    with tqdm(total=images, unit="img", desc=name, leave=False, disable=None if log else True) as bar:
        batches = to_device((views for views, _, _ in loader), run.device)
        for i in range(len(loader)):
            asked = time.perf_counter()
            views = next(batches)
            waited += time.perf_counter() - asked
            loss, spread = train_step(run, views, step + i)
            losses.append(loss)
            spreads.append(spread)
            if (i + 1) % check_every == 0 or i + 1 == len(loader):
                last = mean_over_ranks(torch.stack(losses[-check_every:]).mean()).item()
                if not math.isfinite(last):
                    raise FloatingPointError(diverged(run, step + i))
                elapsed, learning_rate = time.perf_counter() - started, plan.learning_rate_and_momentum(step + i)[0]
                if log:
                    log.write_step(step + i + 1, {"loss": last, "learning_rate": learning_rate})
                bar.set_postfix(loss=f"{last:.3f}", lr=f"{learning_rate:.3g}", res=resolution, wait=f"{waited / elapsed:.0%}")
            bar.update(options.training.batch_size)
        batches.close()

    seconds = time.perf_counter() - started
    run.epoch += 1
    run.spent["seconds"] += seconds
    run.spent["flops"] += len(loader) * flops[resolution]
    used = float("nan") if joules is None else run.joules() - joules
    own = torch.stack([torch.stack(losses).mean(), torch.stack(spreads).mean(), *torch.tensor([waited / seconds, used], device=run.device)])
    loss, spread, data_wait, used = mean_over_ranks(own).tolist()
    if not math.isnan(used):
        run.spent["kwh"] = run.spent.get("kwh", 0.0) + used * world_size() / JOULES_PER_KWH
    learning_rate, momentum = plan.learning_rate_and_momentum(step + len(loader) - 1)
    return {
        "epoch": run.epoch, **run.spent, "loss": loss, "learning_rate": learning_rate, "momentum": momentum,
        "noise_scale": plan.noise_scale(step + len(loader) - 1, len(loader.samples)), "resolution": resolution, "magnitude": magnitude,
        "images_per_second": images / seconds, "data_wait": data_wait, "embedding_std": spread,
    }  # fmt: skip


def open_loader(options: SimpleNamespace, method: Method) -> ViewLoader:
    """A run's training views: this rank's share of every batch."""
    augment = options.augment
    policies = choose_policies(
        augment.policy or method.policy, crop_scale_min=augment.crop_scale_min, blur=augment.blur, jitter_form=augment.jitter_form
    )
    return ViewLoader(
        options.data.train, batch_size=options.training.batch_size // world_size(), views=augment.views, policy=policies,
        resolution=options.resolution.max, seed=options.run.seed, workers=options.data.workers or cores_per_rank(),
        batches_ahead=options.data.batches_ahead, scaled_decoding=options.data.scaled_decoding, rank=rank(), world_size=world_size(),
    )  # fmt: skip


def open_log(run: Run, folder: Path, resumed: bool) -> RunLog:
    options = run.options
    return RunLog(
        folder, last_epoch=run.epoch if resumed else -1, tensorboard=options.run.tensorboard, wandb=options.run.wandb, options=as_dict(options)
    )


def resume(run: Run, folder: Path) -> bool:
    """Continue from the folder's checkpoint. Returns whether there was one. Raises UserError if it is of another experiment."""
    make_folder(folder)
    state = checkpoint.load(folder, run.device)
    if state is None:
        return False
    if run.options.run.resume == "never":
        raise UserError(f"--run.folder: {folder} holds a run already; choose another folder, or --run.resume=auto to continue it")
    now = as_dict(run.options)
    for section in ("augment", "resolution", "hard_augment", "model", "method", "training"):
        for name, before in state["options"][section].items():
            if before != now[section][name] and (section, name) != ("training", "compile"):  # which changes how, not what is computed
                raise UserError(
                    f"--{section}.{name}: the run in {folder} has {before!r}, not {now[section][name]!r}; choose another --run.folder"
                )
    run.restore(state)
    return True


def make_folder(folder: Path) -> None:
    """Raises UserError where it can't be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--run.folder: {folder} can't be made: {error.strerror}") from error


def summary(row: dict[str, float], epochs: int) -> str:
    """A finished epoch on one line."""
    knn = f"  kNN {row['knn']:.1%}" if "knn" in row else ""
    return (
        f"epoch {row['epoch']}/{epochs}  {row['resolution']} px  loss {row['loss']:.3f}  lr {row['learning_rate']:.3g}  "
        f"{row['images_per_second']:.0f} img/s, {row['data_wait']:.0%} waiting for data{knn}"
    )


def diverged(run: Run, step: int) -> str:
    return (
        f"the loss is not finite at step {step} (epoch {run.epoch + 1}); the checkpoint of epoch {run.epoch} in {run.options.run.folder} is "
        f"untouched. Try a smaller --training.learning_rate (now {run.options.training.learning_rate:g}) or a longer --training.warmup_epochs"
    )


def out_of_memory(run: Run, loader: ViewLoader) -> str:
    views = (loader.batch_size, run.options.augment.views, 3, loader.resolution, loader.resolution)
    # Trying what fits takes all ranks, of which only this one may have run out of memory.
    advice = memory_advice(run, views) if world_size() == 1 else "take a larger --training.accumulate, or more GPUs"
    return (
        f"--training.batch_size: a step with {views[0]} images of {views[1]} views at {views[-1]} px needs more memory than {run.device} has; "
        f"{advice}. The checkpoint of epoch {run.epoch} is untouched"
    )


def main() -> int:
    try:
        train(OPTIONS)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ConnectionError as error:
        print(f"error: {error}; the same command continues after the last whole epoch", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main, interrupted="interrupted; the same command continues after the last whole epoch"))
