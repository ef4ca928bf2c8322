"""The demo's picture: both runs' schedules, what their accuracy cost, and the views that Hard Augment chose among."""

from pathlib import Path
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from ffssl import checkpoint
from ffssl.data.loader import ViewLoader
from ffssl.data.policy import EVALUATION
from ffssl.evaluate.knn import knn_accuracy
from ffssl.hard_augment import select_hardest
from ffssl.images import to_input
from ffssl.plan import Plan
from ffssl.train import build, open_loader

COLOURS = {"baseline": "tab:red", "efficient": "tab:blue"}
SHOWN_IMAGES = 14


def raw_pixel_accuracy(options: SimpleNamespace) -> float:
    """kNN accuracy (0..1) on centred pixels instead of features: what the data gives away without any network."""
    pixels, labels = {}, {}
    for name in ("train", "validation"):
        settings = {"batch_size": 256, "views": 1, "resolution": options.resolution.max, "policy": EVALUATION, "drop_last": False}
        with ViewLoader(getattr(options.data, name), **settings) as loader:
            batches = [(views.flatten(1).float(), batch_labels) for views, batch_labels, _ in loader]
        pixels[name], labels[name] = (torch.cat(part) for part in zip(*batches))
    mean = pixels["train"].mean(0)
    return knn_accuracy(
        pixels["train"] - mean, labels["train"], pixels["validation"] - mean, labels["validation"],
        k=options.evaluate.k, temperature=options.evaluate.temperature,
    )  # fmt: skip


def draw_report(options: dict[str, SimpleNamespace], logs: dict[str, list[dict]], path: Path) -> None:
    """Write the picture of the runs called "baseline" and "efficient"."""
    figure = plt.figure(figsize=(13, 9.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.1])
    axes = top.subplots(2, 3)
    for name in options:
        _draw_schedules(axes[:, :2], name, Plan(options[name], _steps_per_epoch(options[name])))
        _draw_accuracy(axes[:, 2], name, logs[name])
    axes[0, 0].legend(frameon=False)
    _draw_views(bottom, options["efficient"])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _steps_per_epoch(options: SimpleNamespace) -> int:
    with open_loader(options, build(options, torch.device("cpu"))) as loader:
        return len(loader)


def _draw_schedules(axes: np.ndarray, name: str, plan: Plan) -> None:
    steps = np.arange(plan.total_steps)
    epochs = np.arange(plan.options.training.epochs)
    pairs = np.array([plan.learning_rate_and_momentum(step) for step in steps])
    curves = (
        (axes[0, 0], steps / plan.steps_per_epoch, pairs[:, 0], "learning rate", "default"),
        (axes[0, 1], steps / plan.steps_per_epoch, pairs[:, 1], "momentum", "default"),
        (axes[1, 0], epochs, [plan.resolution(e) for e in epochs], "resolution (pixels)", "steps-post"),
        (axes[1, 1], epochs, [plan.magnitude(e) for e in epochs], "augmentation magnitude", "steps-post"),
    )
    for axis, x, y, title, style in curves:
        axis.plot(x, y, color=COLOURS[name], label=name, drawstyle=style)
        axis.set(title=title, xlabel="epoch")
        axis.spines[["top", "right"]].set_visible(False)


def _draw_accuracy(axes: np.ndarray, name: str, rows: list[dict]) -> None:
    measured = [row for row in rows if "knn" in row]
    for axis, key, scale, label in ((axes[0], "flops", 1e-12, "TFLOP"), (axes[1], "seconds", 1, "seconds of training")):
        axis.plot([row[key] * scale for row in measured], [100 * row["knn"] for row in measured], "o-", ms=3, color=COLOURS[name])
        axis.set(title="kNN accuracy (%)", xlabel=label)
        axis.spines[["top", "right"]].set_visible(False)


def _draw_views(figure: plt.Figure, options: SimpleNamespace) -> None:
    """Views of a few training images as in the run's last epoch, and the pair that the selection pass chooses with its weights."""
    method = build(options, torch.device("cpu"))
    method.load_state_dict(checkpoint.load(Path(options.run.folder))["method"])
    method.train()
    plan = Plan(options, 1)
    last = options.training.epochs - 1
    with open_loader(options, method) as loader:
        loader.set_epoch(last, plan.resolution(last), plan.magnitude(last))
        for views, _, _ in loader:
            images, settings = to_input(views, torch.device("cpu")), options.hard_augment
            chosen, _ = select_hardest(method, images, settings.resolution, loss=settings.loss)
            break
    count = views.shape[1]
    figure.suptitle(f"{SHOWN_IMAGES} images, a column each: their {count} views, and framed the pair with the largest loss, which Hard Augment trains on")
    axes = figure.subplots(count, SHOWN_IMAGES)
    for image, view in np.ndindex(SHOWN_IMAGES, count):
        _draw_view(axes[view, image], views[image, view], framed=view in chosen[image])


def _draw_view(axis: Axes, view: torch.Tensor, *, framed: bool) -> None:
    axis.imshow(view.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.axis("off")
    if framed:
        axis.add_patch(Rectangle((0, 0), 1, 1, transform=axis.transAxes, fill=False, edgecolor="tab:orange", linewidth=4, clip_on=False))
