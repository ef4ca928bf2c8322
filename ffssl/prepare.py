"""Everything a run needs before its first step, checked against the other ranks and resumed."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ffssl.config import Options, Role, dotted, shared_options
from ffssl.cost import count_flops
from ffssl.data.beton.description import identity, same_samples
from ffssl.data.beton.read import LABEL
from ffssl.data.loader import ViewLoader
from ffssl.errors import UserError
from ffssl.evaluate.online import OnlineKnn
from ffssl.files import exclusive_folder, make_folder
from ffssl.parallel.device import choose_device, describe_precision, precision
from ffssl.parallel.ranks import (
    check_batch,
    errors_on_all_ranks,
    local_device,
    process_group,
    rank,
    require_same,
    world_size,
)
from ffssl.run_folder import checkpoint
from ffssl.run_folder.background_writer import Saver
from ffssl.run_folder.log import RunLog, require_wandb
from ffssl.run_folder.provenance import record_start
from ffssl.training.build import build, first_backbone, random_backbone
from ffssl.training.classifier import online_classifier
from ffssl.training.compile import StageCompiler, describe_modes, stage_modes
from ffssl.training.loader import open_loader
from ffssl.training.precision import advise_bf16, require_bf16
from ffssl.training.record import RankZeroRecord, Record
from ffssl.training.run import Run, start_run
from ffssl.training.run_schedule import RunSchedule, StepShape
from ffssl.training.signals import StopRequest, stop_on_signals


@dataclass
class Prepared:
    """A run, and what it is trained with.

    knn: the evaluation, on rank 0 if there are validation images, else None.
    compiler: compiles the method at the beginning of a stage.
    flops: FLOPs of one step of all ranks, by the step's shape.
    """

    run: Run
    compiler: StageCompiler
    loader: ViewLoader
    knn: OnlineKnn | None
    record: Record
    stop: StopRequest
    flops: dict[StepShape, int]


@contextlib.contextmanager
def prepared(options: Options) -> Iterator[Prepared]:
    """Yield a run at its beginning or at its checkpoint, and close it when the block ends.

    Raise UserError for everything that can be refused before the first step.
    """
    if options.run.wandb:
        require_wandb()  # before anything takes time
    device = local_device(choose_device(options.run.device))
    torch.manual_seed(options.run.seed)
    folder = Path(options.run.folder)
    # A resumed run takes its weights from the checkpoint. The weights file may be gone.
    resumes = checkpoint.exists(folder)
    if not resumes:  # a run in bf16 may resume on a CPU that only emulates it
        require_bf16(options.training.amp, device)
    backbone, weights = (random_backbone(options), {}) if resumes else first_backbone(options)
    method = build(options, device, backbone)
    flops = count_flops(RunSchedule(options, steps_per_epoch=1), method)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        stack.enter_context(process_group(device))
        is_main = rank() == 0  # it evaluates, writes and prints for all ranks
        amp = precision(options.training.amp, device)
        require_same(
            shared_options(options)
            | {"--training.amp": amp, "--model.weights: sha256": weights.get("sha256")}
        )
        check_batch(options.training.batch_size, options.training.accumulate)

        knn = None
        with errors_on_all_ranks():
            loader = stack.enter_context(open_loader(options))
            if options.data.validation and is_main:
                knn = stack.enter_context(contextlib.closing(OnlineKnn(options, device)))
            data = identity(loader.beton)
        require_same({f"--data.train: {name}": value for name, value in data.items()})

        t = options.training
        # Before start_run, after which BatchNorm waits for the other ranks.
        advice = (
            advise_bf16(t.amp, device, method.backbone, options.resolution.max)
            if is_main and not resumes
            else ""
        )
        run = start_run(options, method, RunSchedule(options, len(loader)), device)
        modes = stage_modes(t.compile, flops, method, device, t.accumulate)
        run.data, run.weights = data, weights
        run.classifier = online_classifier(
            options, method.backbone, loader.beton.labels, total_steps=run.schedule.total_steps
        )
        stack.enter_context(resumed_from(folder, run))

        record = Record()
        if is_main:
            announce(run, loader, knn, describe_modes(modes), advice)
            record_start(folder, device, run.weights)
            record = stack.enter_context(contextlib.closing(open_record(run, folder)))
        yield Prepared(run, StageCompiler(method, modes), loader, knn, record, stop, flops)


@contextlib.contextmanager
def resumed_from(folder: Path, run: Run) -> Iterator[None]:
    """Continue from the folder's checkpoint, if there is one, and hold the folder in the block.

    Called by all ranks. Raise UserError on all of them, also if their checkpoints differ.
    """
    with contextlib.ExitStack() as stack:
        with errors_on_all_ranks():
            # Rank 0 first: it may have to rename a damaged checkpoint.
            if rank() == 0:
                make_folder(folder, "--run.folder")
                stack.enter_context(exclusive_folder(folder, "run", "--run.folder"))
                run.resumed = resume(run, folder)
        with errors_on_all_ranks():
            if rank() != 0:
                run.resumed = resume(run, folder)
        at = f"a checkpoint of epoch {run.epoch}, step {run.totals.steps}"
        require_same({f"--run.folder: {folder}": at if run.resumed else "no checkpoint"})
        yield


def announce(
    run: Run, loader: ViewLoader, knn: OnlineKnn | None, compiled: str, advice: str
) -> None:
    """Print the memory, the device, the precision and the labels that the run uses.

    compiled: the modes of torch.compile. advice: on the precision, or empty.
    """
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    print(f"{loader.describe_memory()}{', on each process' if processes else ''}", flush=True)
    precision = describe_precision(run.options.training.amp, run.device)
    print(
        f"on {run.device}{processes}: {precision}; torch.compile {compiled}{run.energy_note}",
        flush=True,
    )
    if advice:
        print(advice, flush=True)
    if run.resumed:
        print(describe_resumption(run), flush=True)
    elif run.weights:
        print(describe_start(run.weights), flush=True)
    if knn and knn.label_field != LABEL:
        print(f"labels for the kNN: the field '{knn.label_field}'", flush=True)
    if knn and knn.labelled < knn.images:
        print(f"{knn.labelled} of {knn.images} training images have a label", flush=True)
    done = run.epoch or run.totals.steps
    if run.classifier and done and not run.classifier.trained:
        print("the linear classifier begins anew: the checkpoint has none", flush=True)


def describe_resumption(run: Run) -> str:
    """Say in one line where a run stands that is continued."""
    epochs = run.options.training.epochs
    if run.epoch == epochs:
        return f"the run has finished already, with epoch {epochs} of {epochs}"
    more = f" and step {run.totals.steps} of the next" if run.totals.steps else ""
    return f"continues after epoch {run.epoch} of {epochs}{more}"


def describe_start(weights: dict[str, Any]) -> str:
    """Say in one line what a run starts from. weights: see `first_backbone`."""
    parts = [f"{weights['loaded']} tensors"]
    for key, what in (
        ("interpolated", "interpolated"),
        ("classifier", "of a classifier ignored"),
        ("ignored", "ignored"),
        ("left_at_random", "of the network left at random"),
    ):
        if names := weights[key]:
            parts.append(
                f"{len(names)} {what} ({', '.join(names[:2])}{', ...' * (len(names) > 2)})"
            )
    return f"starts from the weights of {weights['file']}: {'; '.join(parts)}"


def open_record(run: Run, folder: Path) -> Record:
    """Open the log and the checkpoint writer of a run."""
    r = run.options.run
    log = RunLog(
        folder,
        last_epoch=run.epoch if run.resumed else -1,
        tensorboard=r.tensorboard,
        wandb=r.wandb,
        options=run.options.as_dict(),
    )
    return RankZeroRecord(log, Saver(folder, run.device, keep=r.keep, minutes=r.checkpoint_minutes))


def resume(run: Run, folder: Path) -> bool:
    """Continue from the folder's checkpoint. Return whether there was one.

    Raise UserError if the checkpoint belongs to another experiment.
    """
    state = checkpoint.load(folder, mend=rank() == 0)
    if state is None:
        return False
    if run.options.run.resume == "never":
        raise UserError(
            f"--run.folder: {folder} holds a run already; choose another folder, or "
            "--run.resume=auto to continue it"
        )
    trained_with = dotted(state["options"])
    for name, now in dotted(run.options.of_role(Role.EXPERIMENT)).items():
        before = trained_with.get(name, now)
        if before != now:
            raise UserError(
                f"--{name}: the run in {folder} has {before!r}, not {now!r}; choose another "
                "--run.folder"
            )
    data = state.get("data", {})
    if not same_samples(data, run.data):
        raise UserError(
            f"--data.train: {run.options.data.train} does not hold the images that the run in "
            f"{folder} is trained on: it has {run.data['samples']} others; put back the file of "
            f"{data['samples']}, or choose another --run.folder"
        )
    run.restore(state)
    return True
