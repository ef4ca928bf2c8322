r"""Find the limits of the learning rate in a few hundred steps: the range test of section C.

    ffssl lr-range --config imagenette_efficient.yaml \
        --data.train=train.beton --data.validation=val.beton
    ffssl lr-range --config ... --data.train=train.beton --low=1e-4 --high=10 \
        --steps=100 --run.folder=runs/range

Trains with the config's method, views and optimiser while the learning rate rises exponentially.
The momentum is `training.momentum`. After every step it computes the loss on the same validation
views: of --data.validation, or of images held out from --data.train. Leaves `lr_range.json` and
`lr_range.png` in the run's folder (by default runs/lr_range), and no checkpoint.

The lower limit is where the smoothed validation loss has come down, for good, by a tenth of its
fall: there it starts to decrease. The upper limit is where it has come down by nine tenths: there
it has reached the floor from which it diverges. The upper limit is a --training.learning_rate.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ffssl.config import Options, read_options
from ffssl.config.command_line import Parser, exit_status
from ffssl.parallel.openmp import share_cores

if __name__ == "__main__":
    share_cores()

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm

from ffssl import schedules
from ffssl.data.beton.several import read_betons
from ffssl.data.loader import ViewLoader
from ffssl.errors import UserError
from ffssl.files import make_folder, write_json
from ffssl.hard_augment import choose_views, without_trace
from ffssl.methods import Method
from ffssl.parallel.device import choose_device
from ffssl.run_folder import checkpoint
from ffssl.run_folder import log as run_log
from ffssl.training.build import build, first_backbone
from ffssl.training.loader import open_loader
from ffssl.training.memory import with_memory_advice
from ffssl.training.run import Run, start_run
from ffssl.training.run_schedule import RunSchedule
from ffssl.training.step import train_step
from ffssl.training.views import Views, map_sizes

CURVE, PICTURE = "lr_range.json", "lr_range.png"
# Fractions of the validation loss's fall at the lower limit and at the upper.
FALL_STARTS, FALL_ENDS = 0.1, 0.9
SMOOTHING = 0.05  # width of the smoothing, as a fraction of the sweep
NOISE = 3  # a smaller fall, in standard deviations of the noise, does not count as one


@dataclass(frozen=True)
class Sweep(RunSchedule):
    """A run's schedule with a learning rate that rises from `low` to `high` in `steps` steps.

    The momentum is constant.
    """

    low: float
    high: float
    steps: int

    @property
    def total_steps(self) -> int:
        # At least the run's own: a method's schedules then go as at the start of the run.
        return max(super().total_steps, self.steps)

    def learning_rate_and_momentum(self, step: int) -> tuple[float, float]:
        rate = schedules.exponential(step, total=self.steps, low=self.low, high=self.high)
        return rate, self.options.training.momentum


@dataclass(frozen=True)
class Limits:
    """Learning rates between which the validation loss falls.

    rises: whether the loss rises again within the sweep.
    """

    low: float
    high: float
    rises: bool


def range_test(
    options: Options, *, low: float, high: float, steps: int, images: int
) -> list[dict[str, float]]:
    """Train while the learning rate rises from `low` to `high`.

    images: size of the validation batch, rounded down to whole batches of the training's size, one
        at least.

    Return one row a step, up to the first loss that is not finite. Raise UserError.
    """
    device = choose_device(options.run.device)
    torch.manual_seed(options.run.seed)
    backbone, _ = first_backbone(options)
    method = build(options, device, backbone)
    with open_loader(options) as loader:
        validation = validation_views(options, method, loader, images)
        run = start_run(options, method, Sweep(options, len(loader), low, high, steps), device)
        for group in run.optimizer.param_groups:
            group.pop("constant_lr", None)  # the test looks for the peak that it would stay at
        shapes = run.schedule.shape(0).of_batch(loader.batch_size)
        return with_memory_advice(run, shapes, lambda: sweep(run, loader, validation, steps))


def sweep(
    run: Run, loader: ViewLoader, validation: list[Tensor], steps: int
) -> list[dict[str, float]]:
    rows = []
    progress = tqdm(range(steps), unit="step", leave=False, disable=None)
    for step, views in zip(progress, batches(run, loader)):
        learning_rate, _ = run.schedule.learning_rate_and_momentum(step)
        result = train_step(run, map_sizes(lambda part: part.to(run.device), views), step)
        losses = {
            "training_loss": result.loss.item(),
            "validation_loss": validation_loss(run, validation),
        }
        if not np.isfinite([*losses.values()]).all():
            break
        rows.append(
            {
                "step": step,
                "learning_rate": learning_rate,
                **losses,
                "embedding_std": result.embedding_std.item(),
            }
        )
    return rows


def batches(run: Run, loader: ViewLoader) -> Iterator[Views]:
    """Yield views, epoch after epoch, at the resolution and magnitude of the run's first epoch."""
    while True:
        loader.set_epoch(
            run.epoch, magnitude=run.schedule.magnitude(0), **run.schedule.shape(0).for_loader
        )
        for views, _, _ in loader:
            yield views
        run.epoch += 1


def validation_views(
    options: Options, method: Method, loader: ViewLoader, images: int
) -> list[Tensor]:
    """Return two views of each validation image, in uint8 batches (B, 2, 3, R, R).

    B is the training's batch size, since a loss may depend on it. Without data.validation the
    images are taken from those that `loader` serves. Raise UserError if there are too few.
    """
    size = options.training.batch_size
    count = max(images // size, 1)
    changed: dict[str, dict[str, object]] = {"augment": {"views": 2, "local_views": 0}}
    if options.data.validation:
        found = len(read_betons(options.data.validation))
        if found < count * size:
            raise UserError(
                f"--data.validation: {options.data.validation} has {found} images, of which "
                f"{count * size} are to be taken, in whole batches of {size}; give fewer "
                "--validation-images, or a smaller --training.batch_size, or another file"
            )
        changed["data"] = {"train": options.data.validation}
    with open_loader(options.changed(**changed)) as source:
        if not options.data.validation:
            source.samples, loader.samples = held_out(loader, count * size, options.run.seed)
        schedule = RunSchedule(options, len(source))
        source.set_epoch(0, schedule.resolution(0), schedule.magnitude(0))
        return [views.clone() for _, (views, _, _) in zip(range(count), source)]


def held_out(loader: ViewLoader, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `count` of the loader's samples, drawn at random, and the others.

    Raise UserError if the others do not fill a batch.
    """
    total = len(loader.samples)
    if total < count + loader.batch_size:
        raise UserError(
            f"{loader.beton.name}: of {total} images, {count} can't be held out and batches of "
            f"{loader.batch_size} be trained on; give --data.validation, or fewer "
            "--validation-images, or a smaller --training.batch_size"
        )
    shuffled = np.random.Generator(np.random.Philox(seed)).permutation(loader.samples)
    return np.sort(shuffled[:count]), np.sort(shuffled[count:])


def validation_loss(run: Run, validation: list[Tensor]) -> float:
    """Return the method's loss on the views, with BatchNorm by parts of a batch as in training.

    Changes nothing in the run.
    """
    losses = []
    with without_trace(run.method, run.device), run.amp:
        # Dropout, if there is any, drops the same every time.
        torch.manual_seed(run.options.run.seed)
        accumulate = run.options.training.accumulate
        for views in (part for batch in validation for part in batch.chunk(accumulate)):
            pair = choose_views(run.method, views.to(run.device))
            # Copies, since the loss writes to a queue or a centre.
            buffers = {name: buffer.clone() for name, buffer in run.method.named_buffers()}
            loss, _ = functional_call(run.method, buffers, pair)
            losses.append(loss)
    return torch.stack(losses).mean().item()


def suggest_limits(
    learning_rates: np.ndarray, losses: np.ndarray, *, complete: bool = True
) -> Limits | None:
    """Return the limits, or None if the loss does not fall.

    learning_rates: (n,), rising.
    losses: (n,), validation losses.
    complete: whether all losses of the sweep were finite.

    The fall of the smoothed loss is measured from the highest point before its lowest point.
    """
    if len(losses) < 3:
        return None
    smoothed = smooth(losses)
    lowest = int(smoothed.argmin())
    highest = int(smoothed[: lowest + 1].argmax())
    fall = smoothed[highest] - smoothed[lowest]
    # A robust standard deviation, from the median absolute deviation.
    noise = 1.4826 * np.median(np.abs(losses - smoothed))
    if fall <= NOISE * noise:
        return None
    done = (smoothed[highest] - smoothed[highest : lowest + 1]) / fall
    # For good: noise before the fall may reach as far.
    starts = np.flatnonzero(done < FALL_STARTS)[-1] + 1
    ends = starts + (done[starts:] >= FALL_ENDS).argmax()
    low, high = (float(learning_rates[highest + at]) for at in (starts, ends))
    rises = not complete or bool(smoothed[lowest:].max() - smoothed[lowest] > FALL_STARTS * fall)
    return Limits(low, high, rises)


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the running mean of the running median.

    The neighbourhoods are smaller at the ends. A single outlier leaves no trace.
    """
    half = max(round(SMOOTHING * len(values) / 2), 1)
    for middle in (np.median, np.mean):
        values = np.array(
            [middle(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))]
        )
    return values


def draw(rows: list[dict[str, float]], limits: Limits | None, path: Path) -> None:
    """Plot both losses over the learning rate, as in the paper's Figure 4.

    A third panel has the standard deviation of the embeddings, which is 0 after a collapse.
    """
    panels = {
        "training_loss": "training loss",
        "validation_loss": "validation loss",
        "embedding_std": "spread of the embeddings",
    }
    rates = [row["learning_rate"] for row in rows]
    figure, axes = plt.subplots(1, len(panels), figsize=(15, 4), layout="constrained")
    for axis, (name, title) in zip(axes, panels.items()):
        values = np.array([row[name] for row in rows])
        smoothed = smooth(values)
        axis.plot(rates, values, color="tab:blue", alpha=0.35, linewidth=1)
        axis.plot(rates, smoothed, color="tab:blue")
        for limit in (limits.low, limits.high) if limits else ():
            axis.axvline(limit, color="tab:red", linestyle="--", linewidth=1, label=f"{limit:.2g}")
        if limits and name != "embedding_std":  # a divergence would flatten all else
            low, high = np.percentile(smoothed, (0, 75))
            axis.set_ylim(low - 0.3 * (high - low), high + 0.6 * (high - low))
        axis.set(xscale="log", xlabel="learning rate", title=title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[2].set_ylim(bottom=0)
    if limits:
        axes[1].legend(title="limits")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def describe(
    limits: Limits | None, rows: list[dict[str, float]], *, low: float, high: float, steps: int
) -> str:
    ended = more = ""
    if len(rows) < steps:
        ended = f"the loss was not finite at step {len(rows)} of {steps}; the sweep ends there\n"
    if limits is None:
        return (
            f"{ended}the validation loss does not fall between {low:g} and {high:g}: no limits; "
            "try others (--low, --high)"
        )
    if not limits.rises:
        more = f"\nit does not rise again: a --high of more than {high:g} may show a larger limit"
    return (
        f"{ended}the validation loss falls from a learning rate of {limits.low:.2g} to one of "
        f"{limits.high:.2g}{more}"
    )


def main() -> None:
    parser = Parser(
        "lr-range",
        usage="%(prog)s --config FILE --data.train=FILE [options] [--section.option=value ...]",
        description=__doc__,
    )
    parser.add_argument(
        "--low",
        type=float,
        default=1e-3,
        help="learning rate of the first step (default: %(default)g)",
    )
    parser.add_argument(
        "--high",
        type=float,
        default=1.0,
        help="learning rate of the last step (default: %(default)g)",
    )
    parser.add_argument(
        "--steps", type=int, default=200, help="optimiser steps between them (default: %(default)s)"
    )
    parser.add_argument(
        "--validation-images",
        type=int,
        default=1,
        metavar="N",
        help="in whole batches (default: one batch; the paper has 4096 images)",
    )
    arguments, words = parser.parse_known_args()
    test = {"low": arguments.low, "high": arguments.high, "steps": arguments.steps}
    if not 0 < arguments.low < arguments.high < float("inf"):
        raise UserError(
            f"--low, --high: expected 0 < low < high, got {arguments.low:g} and {arguments.high:g}"
        )
    if arguments.steps < 10:
        raise UserError(
            f"--steps: {arguments.steps} are too few to find limits among; give 10 or more"
        )
    options = read_options(words, defaults={"run.folder": "runs/lr_range"})
    folder = Path(options.run.folder)
    claim(folder)
    rows = range_test(options, **test, images=arguments.validation_images)
    rates, losses = (
        np.array([row[name] for row in rows]) for name in ("learning_rate", "validation_loss")
    )
    limits = suggest_limits(rates, losses, complete=len(rows) == arguments.steps)
    found = {
        **test,
        "limits": limits and asdict(limits),
        "options": options.as_dict(),
        "curve": rows,
    }
    write_json(folder / CURVE, found)
    draw(rows, limits, folder / PICTURE)
    print(f"{describe(limits, rows, **test)}\ncurve: {folder / CURVE}, picture: {folder / PICTURE}")


def claim(folder: Path) -> None:
    """Make the folder. Raise UserError if that fails, or if the folder holds a run."""
    if (folder / checkpoint.NAME).exists() or (folder / run_log.NAME).exists():
        raise UserError(
            f"--run.folder: {folder} holds a run; choose another folder for the range test"
        )
    make_folder(folder, "--run.folder")


if __name__ == "__main__":
    sys.exit(exit_status(main, interrupted=""))
