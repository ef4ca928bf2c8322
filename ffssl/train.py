"""Pre-train an image encoder without labels.

    python ffssl/train.py --config rn50_configs/efficient.yaml --data.train=train.beton --run.folder=runs/efficient
    python ffssl/train.py --config rn50_configs/efficient.yaml ... --training.epochs=50     # any option can be overridden
    python ffssl/train.py --help                                                            # all options
    torchrun --nproc_per_node=8 ffssl/train.py --config ...                                 # on 8 GPUs, see docs/many-gpus.md

The same command again continues a run that was interrupted, with the very next batch after its checkpoint. SIGTERM, SIGUSR1 and Ctrl-C
save one and leave, with status 75, 75 and 130.
"""

import faulthandler
import sys

from ffssl.command_line import exit_status
from ffssl.config import command_line_options
from ffssl.openmp import share_cores

if __name__ == "__main__":  # before torch is imported, which takes seconds: --help and a mistyped option are answered at once
    faulthandler.enable(2)  # tells where, should a disk fail under a mapped file (SIGBUS)
    OPTIONS = command_line_options(__doc__)
    share_cores()

import contextlib
import math
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from ffssl import checkpoint
from ffssl.config import as_dict, shared_options
from ffssl.cost import count_flops
from ffssl.data.beton import LABEL
from ffssl.data.convert import identity, same_samples
from ffssl.data.loader import ViewLoader
from ffssl.data.policy import choose_policies
from ffssl.device import choose_device, describe_precision, precision
from ffssl.distributed import (
    check_batch, cores_per_rank, failing_together, local_device, mean_over_ranks, process_group, rank, ranks_here, require_same, world_size,
)  # fmt: skip
from ffssl.errors import Stopped, UserError
from ffssl.evaluate.online import OnlineKnn
from ffssl.files import make_folder, only_one_in
from ffssl.methods import Method
from ffssl.plan import Plan
from ffssl.run_log import RunLog, require_wandb
from ffssl.run_record import record_start
from ffssl.saver import Saver
from ffssl.step import PASSES, Lead, Run, build, compile_passes, memory_advice, start_run, to_device, train_step
from ffssl.stopping import StopRequest, stop_on_signals
from ffssl.tally import Meter, Tally

STEPS_BETWEEN_CHECKS = 50  # on a GPU reading the loss waits for the step; this often costs nothing and loses little
SECONDS_BETWEEN_CHECKS = 5.0  # fewer steps if these take longer: torchrun grants its processes half a minute to save and leave


def train(options: SimpleNamespace) -> None:
    """Train to the end, from the folder's checkpoint where there is one, with the other ranks where torchrun has started some.

    Raises UserError, FloatingPointError if the loss diverges, Stopped after a signal, and ConnectionError if another rank is lost.
    """
    folder = Path(options.run.folder)
    if options.run.wandb:
        require_wandb()  # before anything takes time
    device = local_device(choose_device(options.run.device))
    torch.manual_seed(options.run.seed)
    method = build(options, device)
    flops = count_flops(Plan(options, steps_per_epoch=1), method)  # of all ranks, as one process that takes the whole batch
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        stack.enter_context(process_group(device))
        first = rank() == 0  # it evaluates, writes and tells, once for all
        require_same(shared_options(options) | {"--training.amp": precision(options.training.amp, device)})
        check_batch(options.training.batch_size, options.training.accumulate)
        with failing_together():
            loader = stack.enter_context(open_loader(options, method))
            knn = stack.enter_context(contextlib.closing(OnlineKnn(options, device))) if options.data.validation and first else None
            data = identity(loader.beton)
        require_same({f"--data.train: {name}": value for name, value in data.items()})
        run = start_run(options, method, Plan(options, len(loader)), device)
        compiled = compile_passes(method, PASSES, options.training.compile, device)
        run.data = data
        for turn in (first, not first):  # rank 0 before the others, since it may have to put a damaged checkpoint aside
            with failing_together():
                if first and turn:
                    make_folder(folder, "--run.folder")
                    stack.enter_context(only_one_in(folder, "run", "--run.folder"))
                if turn:
                    resumed = resume(run, folder)
        require_same({f"--run.folder: {folder}": f"a checkpoint of epoch {run.epoch}, step {run.tally.steps}" if resumed else "no checkpoint"})
        log = saver = None
        if first:
            ranks = f", {world_size()} processes" if world_size() > 1 else ""
            print(f"{loader.describe_memory()}{', on each process' if ranks else ''}", flush=True)
            print(f"on {device}{ranks}: {describe_precision(options.training.amp, device)}; torch.compile {compiled}{run.energy_note}", flush=True)
            if knn and knn.label_field != LABEL:
                print(f"labels for the kNN: the field '{knn.label_field}'", flush=True)
            record_start(folder, device)
            log = stack.enter_context(contextlib.closing(open_log(run, folder, resumed)))
            saver = stack.enter_context(
                contextlib.closing(Saver(folder, device, keep=options.run.keep, minutes=options.run.checkpoint_minutes))
            )
        if not resumed:
            accuracy = evaluate(run, knn, stop) if options.data.validation else {}
            if accuracy:
                log.write({"epoch": 0, **run.spent, **accuracy})
                print(f"untrained: kNN {accuracy['knn']:.1%}", flush=True)
            if first:
                saver.save(run.state())

        epochs = options.training.epochs
        while run.epoch < epochs:
            trained = False
            with contextlib.suppress(torch.OutOfMemoryError):
                trained = train_epoch(run, loader, log, saver, stop)
            if not trained:  # the failed step's tensors are free again by now
                raise UserError(f"{out_of_memory(run, loader)}. The last checkpoint is untouched")
            run.tally.share()
            accuracy, done = {}, run.epoch + 1
            if options.data.validation and (done == epochs or (options.evaluate.every and done % options.evaluate.every == 0)):
                if first:
                    saver.save(run.state())
                accuracy = evaluate(run, knn, stop)
            row = end_epoch(run, loader, flops) | accuracy
            if not first:
                continue
            log.write(row)
            saver.save(run.state())
            print(summary(row, epochs), flush=True)


def train_epoch(run: Run, loader: ViewLoader, log: RunLog | None, saver: Saver | None, stop: StopRequest) -> bool:
    """What is left of a pass over the training images. Shows its steps in the log and saves checkpoints when they are due, both of
    rank 0. Returns True; raises Stopped, after a checkpoint, when a signal has asked for that.
    """
    options, plan, epoch, tally = run.options, run.plan, run.epoch, run.tally
    resolution, magnitude = plan.resolution(epoch), plan.magnitude(epoch)
    loader.set_epoch(epoch, resolution, magnitude, first_batch=tally.steps)
    run.method.train()
    step, replaced, batch_size = epoch * plan.steps_per_epoch, tally.replaced, options.training.batch_size
    checked, steps_to_check = tally.steps, 1
    images, title = len(loader) * batch_size, f"epoch {epoch + 1}/{options.training.epochs}"

    with tqdm(total=images, initial=tally.steps * batch_size, unit="img", desc=title, leave=False, disable=None if log else True) as bar:
        batches = to_device((views for views, _, _ in loader), run.device)
        meter, lead = Meter(tally, run.joules), Lead(run.device)
        for i in range(tally.steps, len(loader)):
            asked = time.perf_counter()
            views = next(batches)
            tally.waited += time.perf_counter() - asked
            tally.replaced = replaced + loader.replaced
            # So that its random numbers (of dropout) don't depend on where a run was resumed, and each rank has its own.
            torch.manual_seed(options.run.seed + step + i + (rank() << 32))
            loss, spread = train_step(run, views, step + i)
            lead()
            tally.losses.append(loss)
            tally.spreads.append(spread)
            saving = bool(stop) or (saver is not None and saver.due())
            # Several ranks agree on what to do at the checks alone: for one, each step would have to wait for the GPU.
            if i + 1 == checked + steps_to_check or i + 1 == len(loader) or (saving and world_size() == 1):
                losses, pace = torch.stack(tally.losses[checked:]), meter.elapsed() / (i + 1 - checked)
                last, saving, pace = mean_over_ranks(torch.stack([losses.mean(), loss.new_tensor(saving), loss.new_tensor(pace)])).tolist()
                checked = i + 1
                steps_to_check = 1 if run.device.type == "cpu" else max(1, min(STEPS_BETWEEN_CHECKS, int(SECONDS_BETWEEN_CHECKS / pace)))
                if not math.isfinite(last):
                    raise FloatingPointError(diverged(run, step + i))
                meter.charge()
                learning_rate = plan.learning_rate_and_momentum(step + i)[0]
                if log:
                    log.write_step(step + i + 1, {"loss": last, "learning_rate": learning_rate})
                bar.set_postfix(loss=f"{last:.3f}", lr=f"{learning_rate:.3g}", res=resolution, wait=f"{tally.waited / tally.seconds:.0%}")
                if saving:
                    tally.share()
                    if saver:
                        saver.save(run.state())
                    stop.check()
            bar.update(batch_size)
        batches.close()
    return True


def end_epoch(run: Run, loader: ViewLoader, flops: dict[int, int]) -> dict[str, float]:
    """Count an epoch whose steps are done. flops: of a step of all ranks, by resolution. Returns its row in the log."""
    tally, run.tally = run.tally, Tally()
    run.epoch += 1
    run.spent["seconds"] += tally.seconds
    run.spent["flops"] += tally.steps * flops[loader.resolution]
    if tally.kwh is not None and (run.epoch == 1 or "kwh" in run.spent):
        run.spent["kwh"] = run.spent.get("kwh", 0.0) + tally.kwh * world_size()
    else:  # for good: what a part of the run has used would pass for the whole
        run.spent.pop("kwh", None)
    last = run.epoch * run.plan.steps_per_epoch - 1
    learning_rate, momentum = run.plan.learning_rate_and_momentum(last)
    broken = {"replaced": round(tally.replaced * world_size())} if loader.broken == "replace" else {}
    return {
        "epoch": run.epoch, **run.spent, "loss": torch.stack(tally.losses).mean().item(), "learning_rate": learning_rate, "momentum": momentum,
        "noise_scale": run.plan.noise_scale(last, len(loader.samples)), "resolution": loader.resolution,
        "magnitude": run.plan.magnitude(run.epoch - 1), "images_per_second": tally.steps * run.options.training.batch_size / tally.seconds,
        "data_wait": tally.waited / tally.seconds, "embedding_std": torch.stack(tally.spreads).mean().item(), **broken,
    }  # fmt: skip


def evaluate(run: Run, knn: OnlineKnn | None, stop: StopRequest) -> dict[str, float]:
    """The accuracy, on rank 0, which has `knn`; the others wait for it. Raises Stopped on all ranks when a signal to one has asked for that."""
    accuracy = {}
    with contextlib.suppress(Stopped):  # which all hear of below: none is left waiting
        if knn:
            with stop.at_once():
                accuracy["knn"] = knn.accuracy(run.method.backbone, run.amp)
    stop.check()
    return accuracy


def open_loader(options: SimpleNamespace, method: Method) -> ViewLoader:
    """A run's training views: this rank's share of every batch."""
    augment = options.augment
    policies = choose_policies(
        augment.policy or method.policy, crop_scale_min=augment.crop_scale_min, blur=augment.blur, jitter_form=augment.jitter_form
    )
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of labels, which are not trained on
        return ViewLoader(
            options.data.train, batch_size=options.training.batch_size // world_size(), views=augment.views, policy=policies,
            resolution=options.resolution.max, seed=options.run.seed, workers=options.data.workers or cores_per_rank(),
            batches_ahead=options.data.batches_ahead, scaled_decoding=options.data.scaled_decoding, broken=options.data.broken,
            rank=rank(), world_size=world_size(), loaders_here=ranks_here(), label_field=options.data.label_field,
        )  # fmt: skip


def open_log(run: Run, folder: Path, resumed: bool) -> RunLog:
    options = run.options
    return RunLog(
        folder, last_epoch=run.epoch if resumed else -1, tensorboard=options.run.tensorboard, wandb=options.run.wandb, options=as_dict(options)
    )


def resume(run: Run, folder: Path) -> bool:
    """Continue from the folder's checkpoint. Returns whether there was one. Raises UserError if it is of another experiment."""
    state = checkpoint.load(folder, mend=rank() == 0)
    if state is None:
        return False
    if run.options.run.resume == "never":
        raise UserError(f"--run.folder: {folder} holds a run already; choose another folder, or --run.resume=auto to continue it")
    now = as_dict(run.options)
    for section, options in state["options"].items():
        for name, before in options.items():
            if decides(section, name) and before != now[section][name]:
                raise UserError(
                    f"--{section}.{name}: the run in {folder} has {before!r}, not {now[section][name]!r}; choose another --run.folder"
                )
    data = state.get("data", {})
    if not same_samples(data, run.data):
        raise UserError(
            f"--data.train: {run.options.data.train} does not hold the images that the run in {folder} is trained on: it has "
            f"{run.data['samples']} others; put back the file of {data['samples']}, or choose another --run.folder"
        )
    run.restore(state)
    return True


def decides(section: str, name: str) -> bool:
    """Whether an option decides what is computed, and not only how, or what is shown of it."""
    if section in ("data", "run"):
        return name in ("scaled_decoding", "seed")
    return section != "evaluate" and (section, name) != ("training", "compile")


def summary(row: dict[str, float], epochs: int) -> str:
    """A finished epoch on one line."""
    knn = f"  kNN {row['knn']:.1%}" if "knn" in row else ""
    return (
        f"epoch {row['epoch']}/{epochs}  {row['resolution']} px  loss {row['loss']:.3f}  lr {row['learning_rate']:.3g}  "
        f"{row['images_per_second']:.0f} img/s, {row['data_wait']:.0%} waiting for data{knn}"
    )


def diverged(run: Run, step: int) -> str:
    return (
        f"the loss is not finite at step {step} (epoch {run.epoch + 1}); the last checkpoint in {run.options.run.folder} is "
        f"untouched. Try a smaller --training.learning_rate (now {run.options.training.learning_rate:g}) or a longer --training.warmup_epochs"
    )


def out_of_memory(run: Run, loader: ViewLoader) -> str:
    """What is told after a step on one of the loader's batches has not fitted into the device's memory."""
    views = (loader.batch_size, run.options.augment.views, 3, loader.resolution, loader.resolution)
    # Trying what fits takes all ranks, of which only this one may have run out of memory.
    advice = memory_advice(run, views) if world_size() == 1 else "take a larger --training.accumulate, or more GPUs"
    return (
        f"--training.batch_size: a step with {views[0]} images of {views[1]} views at {views[-1]} px needs more memory than {run.device} has; "
        f"{advice}"
    )


def main(options: SimpleNamespace) -> int:
    try:
        train(options)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"{stopped}; the same command continues where it was", file=sys.stderr)
        return stopped.status
    except BrokenPipeError:  # of its output, as any program's; it is a ConnectionError
        raise
    except ConnectionError as error:
        print(f"error: {error}; the same command continues after the last checkpoint", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(OPTIONS), interrupted="interrupted; the same command continues after the last checkpoint"))
