"""Pre-train an image encoder without labels.

    python ffssl/train.py --config rn50_configs/efficient.yaml --data.train=train.beton --run.folder=runs/efficient
    python ffssl/train.py --config rn50_configs/efficient.yaml ... --training.epochs=50     # any option can be overridden
    python ffssl/train.py --help                                                            # all options

The same command again continues a run that was interrupted, from the start of the epoch.
"""

import sys

from ffssl.command_line import exit_status
from ffssl.config import as_dict, command_line_options
from ffssl.openmp import share_cores

if __name__ == "__main__":  # before torch is imported, which takes seconds: --help and a mistyped option are answered at once
    OPTIONS = command_line_options(__doc__)
    share_cores()

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ffssl import checkpoint, hard_augment
from ffssl.backbones import build_backbone, check_resolutions
from ffssl.cost import count_flops
from ffssl.data.loader import ViewLoader
from ffssl.data.policy import choose_policies
from ffssl.device import choose_device, mixed_precision
from ffssl.errors import UserError
from ffssl.evaluate.online import OnlineKnn
from ffssl.images import to_input
from ffssl.methods import Method, build_method
from ffssl.methods.base import Progress
from ffssl.optimizers import build_optimizer, set_learning_rate_and_momentum
from ffssl.plan import Plan, input_sides
from ffssl.run_log import RunLog, require_wandb
from ffssl.run_record import record_start

STEPS_BETWEEN_CHECKS = 50  # on a GPU reading the loss waits for the step; this often costs nothing and loses little


@dataclass
class Run:
    """What a run trains, and how far it has come."""

    options: SimpleNamespace
    plan: Plan
    device: torch.device
    amp: torch.autocast
    method: Method
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    flops_per_step: dict[int, int]  # by resolution
    epoch: int = 0  # epochs finished
    spent: dict[str, float] = field(default_factory=lambda: {"seconds": 0.0, "flops": 0.0})

    def state(self) -> dict:
        return {
            "epoch": self.epoch,
            "spent": self.spent,
            "options": as_dict(self.options),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict) -> None:
        self.epoch, self.spent = state["epoch"], state["spent"]
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def train(options: SimpleNamespace) -> None:
    """Train to the end, from the folder's checkpoint where there is one. Raises UserError, and FloatingPointError if the loss diverges."""
    folder = Path(options.run.folder)
    if options.run.wandb:
        require_wandb()  # before anything takes time
    device = choose_device(options.run.device)
    torch.manual_seed(options.run.seed)
    method = build(options, device)
    with contextlib.ExitStack() as stack:
        loader = stack.enter_context(open_loader(options, method))
        print(loader.describe_memory(), flush=True)
        knn = stack.enter_context(contextlib.closing(OnlineKnn(options, device))) if options.data.validation else None
        amp, scaler = mixed_precision(options.training.amp, device)
        optimizer = optimizer_of(method, options, device)
        plan = Plan(options, len(loader))
        run = Run(options, plan, device, amp, method, optimizer, scaler, count_flops(plan, method))
        resumed = resume(run, folder)
        record_start(folder, device)
        log = stack.enter_context(contextlib.closing(open_log(run, folder, resumed)))
        if not resumed:
            if knn:
                row = {"epoch": 0, **run.spent, "knn": knn.accuracy(method.backbone, amp)}
                log.write(row)
                print(f"untrained: kNN {row['knn']:.1%}", flush=True)
            checkpoint.save(folder, run.state())

        epochs = options.training.epochs
        while run.epoch < epochs:
            row = train_epoch(run, loader, log)
            if knn and (run.epoch == epochs or (options.evaluate.every and run.epoch % options.evaluate.every == 0)):
                row["knn"] = knn.accuracy(method.backbone, amp)
            log.write(row)
            checkpoint.save(folder, run.state())
            print(summary(row, epochs), flush=True)


def train_epoch(run: Run, loader: ViewLoader, log: RunLog) -> dict[str, float]:
    """One pass over the training images. Shows its steps in the log, and returns the log's row."""
    options, plan, epoch = run.options, run.plan, run.epoch
    resolution, magnitude = plan.resolution(epoch), plan.magnitude(epoch)
    torch.manual_seed(options.run.seed + epoch)  # so that an epoch's random numbers don't depend on where a run was resumed
    loader.set_epoch(epoch, resolution, magnitude)
    run.method.train()
    step = epoch * plan.steps_per_epoch
    losses, spreads, waited, started = [], [], 0.0, time.perf_counter()
    check_every = 1 if run.device.type == "cpu" else STEPS_BETWEEN_CHECKS

    with tqdm(total=len(loader) * loader.batch_size, unit="img", desc=f"epoch {epoch + 1}/{options.training.epochs}", leave=False, disable=None) as bar:
        batches = iter(loader)
        for i in range(len(loader)):
            asked = time.perf_counter()
            views, _, _ = next(batches)
            waited += time.perf_counter() - asked
            loss, spread = train_step(run, views, step + i)
            losses.append(loss)
            spreads.append(spread)
            if (i + 1) % check_every == 0 or i + 1 == len(loader):
                last = torch.stack(losses[-check_every:]).mean().item()
                if not torch.isfinite(torch.tensor(last)):
                    raise FloatingPointError(diverged(run, step + i))
                elapsed, learning_rate = time.perf_counter() - started, plan.learning_rate_and_momentum(step + i)[0]
                log.write_step(step + i + 1, {"loss": last, "learning_rate": learning_rate})
                bar.set_postfix(loss=f"{last:.3f}", lr=f"{learning_rate:.3g}", res=resolution, wait=f"{waited / elapsed:.0%}")
            bar.update(len(views))
        batches.close()

    seconds = time.perf_counter() - started
    run.epoch += 1
    run.spent = {"seconds": run.spent["seconds"] + seconds, "flops": run.spent["flops"] + len(loader) * run.flops_per_step[resolution]}
    learning_rate, momentum = plan.learning_rate_and_momentum(step + len(loader) - 1)
    return {
        "epoch": run.epoch, **run.spent, "loss": torch.stack(losses).mean().item(), "learning_rate": learning_rate, "momentum": momentum,
        "noise_scale": plan.noise_scale(step + len(loader) - 1, len(loader.samples)), "resolution": resolution, "magnitude": magnitude,
        "images_per_second": len(loader) * loader.batch_size / seconds, "data_wait": waited / seconds,
        "embedding_std": torch.stack(spreads).mean().item(),
    }  # fmt: skip


def train_step(run: Run, views: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """One optimiser step on uint8 views (B, m, 3, R, R). Returns the loss and the spread of the embeddings, without waiting for them."""
    learning_rate, momentum = run.plan.learning_rate_and_momentum(step)
    set_learning_rate_and_momentum(run.optimizer, learning_rate, momentum, peak=run.options.training.learning_rate)

    progress = Progress(step, run.plan.total_steps, run.epoch)
    run.method.before_step(progress)
    images = to_input(views, run.device)
    with run.amp:
        chosen = hard_augment.choose_views(run.method, images, seed=run.options.run.seed + step, **vars(run.options.hard_augment))
        loss, embeddings = run.method(*chosen)
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.method.after_step(progress)
    return loss.detach(), embedding_spread(embeddings.detach())


def embedding_spread(embeddings: Tensor) -> Tensor:
    """Standard deviation of the L2-normalised embeddings (N, d) times sqrt(d): 1 for directions at random, 0 after a collapse."""
    z = F.normalize(embeddings.float(), dim=1)
    return z.std(0).mean() * z.shape[1] ** 0.5


def build(options: SimpleNamespace, device: torch.device) -> Method:
    model = options.model
    backbone = build_backbone(model.backbone, zero_init_residual=model.zero_init_residual, stem=model.stem)
    check_resolutions(model.backbone, backbone, input_sides(options))
    settings = {name: value for name, value in vars(options.method).items() if name != "name"}
    method = build_method(options.method.name, backbone, settings)
    method.check(options.training.batch_size)
    hard_augment.check(method, **vars(options.hard_augment))
    return method.to(device, memory_format=torch.channels_last)


def optimizer_of(method: Method, options: SimpleNamespace, device: torch.device) -> torch.optim.Optimizer:
    t = options.training
    return build_optimizer(
        t.optimizer, method.parameter_groups(t.weight_decay), weight_decay=t.weight_decay, decay_norm_and_bias=t.decay_norm_and_bias,
        momentum=t.momentum, device=device,
    )  # fmt: skip


def open_loader(options: SimpleNamespace, method: Method) -> ViewLoader:
    augment = options.augment
    policies = choose_policies(
        augment.policy or method.policy, crop_scale_min=augment.crop_scale_min, blur=augment.blur, jitter_form=augment.jitter_form
    )
    return ViewLoader(
        options.data.train, batch_size=options.training.batch_size, views=augment.views, policy=policies,
        resolution=options.resolution.max, seed=options.run.seed, workers=options.data.workers, batches_ahead=options.data.batches_ahead,
        scaled_decoding=options.data.scaled_decoding,
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
            if before != now[section][name]:
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


def main() -> int:
    try:
        train(OPTIONS)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main, interrupted="interrupted; the same command continues after the last whole epoch"))
