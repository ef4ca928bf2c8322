"""What the report shows of a run's data: views, the chosen pairs, embeddings, neighbours.

All of it is computed anew from the run's checkpoint and beton files. UserError is raised if a file
is gone.
"""

import contextlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ffssl.backbones import check_resolutions
from ffssl.data.beton.read import UNLABELLED, Beton
from ffssl.data.beton.several import read_betons
from ffssl.data.loader import ViewLoader
from ffssl.errors import UserError
from ffssl.evaluate.features import extract_features, open_views
from ffssl.evaluate.labels import shared_classes
from ffssl.hard_augment import by_pair, pairs, selection_losses, selection_pass
from ffssl.methods import Method
from ffssl.methods.base import Progress
from ffssl.printable import printable
from ffssl.report.runs import ReportedRun, describe_data
from ffssl.training.loader import open_loader

BATCH = 64  # images in a selection pass: BatchNorm normalises by them
SHOWN_IMAGES, SHOWN_EPOCHS = 4, 5
COMPARED_IMAGES = 256
OTHER_PASSES = (3 / 4, 3 / 2, 2)  # sides at which the pass might be run instead, over its own
EMBEDDED_IMAGES, EMBEDDED_CLASSES = 800, 8
QUERIES, NEIGHBOURS, BANK = 6, 8, 1500
THUMBNAIL = 112  # pixels at most


@dataclass(frozen=True)
class EpochViews:
    """The views of some images in one epoch.

    views: uint8 (n, m, 3, R, R). chosen: int64 (n, 2), the views to train on: an image's hardest
    pair, or a random one if the epoch's share of hard pairs leaves it out; None if the run does not
    choose by the loss.
    """

    epoch: int
    resolution: int
    magnitude: float
    views: Tensor
    chosen: Tensor | None


@dataclass(frozen=True)
class Choice:
    """Which of an image's pairs the selection pass chose.

    candidates: int64 (pairs, 2). positions: int64 (n,), the chosen pair's index among the
    candidates. ranks: int64 (n,), at the resolution of the training: 0 if the chosen pair has the
    largest loss there too. losses: mean loss there, of the chosen, the hardest and a random pair.
    reached: by the side of a pass, the hardness there of the pairs that it chooses, where random
    pairs have 0 and the hardest 1. Of the run's own pass and of a few others below `resolution`.
    """

    candidates: Tensor
    selection_resolution: int
    resolution: int
    positions: Tensor
    ranks: Tensor
    losses: dict[str, float]
    reached: dict[int, float]


@dataclass(frozen=True)
class Embedding:
    """Features in the plane.

    points: float32 (n, 2). labels: int64 (n,), -1 for none. explained: PCA's share of the variance,
    None for UMAP.
    """

    points: Tensor
    labels: Tensor
    class_names: list[str]
    classes: int
    explained: float | None


@dataclass(frozen=True)
class Neighbours:
    """Query images, and the training images nearest to each, nearest first.

    Images: uint8 (q, 3, R, R) and (q, k, 3, R, R), with labels. Cosines: (q, k).
    """

    queries: Tensor
    query_labels: Tensor
    found: Tensor
    found_labels: Tensor
    cosines: Tensor
    class_names: list[str]


def spread(total: int, count: int) -> np.ndarray:
    """Return at most `count` of `total` indices, evenly spaced from first to last: int64."""
    return np.linspace(0, total - 1, min(total, count)).round().astype(np.int64)


def class_name(names: Sequence[str], label: int) -> str:
    return printable(names[label]) if 0 <= label < len(names) else f"class {label}"


@contextlib.contextmanager
def _fixed_views(run: ReportedRun, count: int):
    """Return the run's training loader, over at most `count` images, always the same ones.

    Its views are those of the training, without local ones.
    """
    options = run.options.changed(augment={"local_views": 0})
    total = len(read_betons(options.data.train))
    with open_loader(options.changed(training={"batch_size": min(BATCH, total)})) as loader:
        loader.shuffle, loader.drop_last = False, False
        loader.samples = spread(total, count)
        yield loader


def views_by_epoch(run: ReportedRun, method: Method) -> list[EpochViews]:
    """Return the views of a few images in a few epochs, from the first to the last.

    The pairs are chosen with the checkpoint's weights.
    """
    schedule, shown = run.schedule, []
    device = next(method.parameters()).device
    method.train()  # as the selection pass sees it: BatchNorm takes the batch's statistics
    with _fixed_views(run, BATCH) as loader:
        kept = spread(len(loader.samples), SHOWN_IMAGES)
        for epoch in spread(run.options.training.epochs, SHOWN_EPOCHS).tolist():
            resolution, magnitude = schedule.resolution(epoch), schedule.magnitude(epoch)
            selection = schedule.selection(epoch)
            loader.set_epoch(epoch, resolution, magnitude, views=schedule.views(epoch))
            method.before_step(
                Progress(epoch * schedule.steps_per_epoch, schedule.total_steps, epoch)
            )
            for views, _, _ in loader:
                chosen = None
                if selection.select == "hard":
                    pass_alone = replace(selection, extra_targets=False)
                    chosen, _ = selection_pass(method, views.to(device), pass_alone, epoch)
                    chosen = chosen.cpu()[kept]
                shown.append(EpochViews(epoch, resolution, magnitude, views[kept].clone(), chosen))
    return shown


def examine_choice(run: ReportedRun, method: Method) -> Choice:
    """Find how the pair that the cheap pass chooses ranks at the resolution trained on.

    The weights are the checkpoint's, and the views are of its epoch.
    """
    schedule = run.schedule
    device = next(method.parameters()).device
    method.train()
    epoch = max(run.epoch - 1, schedule.selection_start)
    selection = schedule.selection(epoch)
    method.before_step(Progress(epoch * schedule.steps_per_epoch, schedule.total_steps, epoch))
    resolution = schedule.resolution(epoch)
    cheap = min(selection.resolution, resolution)
    sides = _sides_of_passes(run, method, cheap, resolution)
    losses: dict[int, list[Tensor]] = {side: [] for side in (*sides, resolution)}
    with _fixed_views(run, COMPARED_IMAGES) as loader:
        loader.set_epoch(epoch, resolution, schedule.magnitude(epoch), views=schedule.views(epoch))
        for views, _, _ in loader:
            images = views.to(device)
            for side, found in losses.items():
                at_it = replace(selection, resolution=side)
                found.append(selection_losses(method, images, at_it).float().cpu())
    candidates = pairs(views.shape[1], policies=selection.policies)
    of_pairs = {side: by_pair(torch.cat(found), candidates) for side, found in losses.items()}
    trained = of_pairs[resolution]
    chosen = {side: of_pairs[side].argmax(1) for side in losses}
    means = {side: trained.gather(1, pair[:, None]).mean().item() for side, pair in chosen.items()}
    random, hardest = trained.mean().item(), means[resolution]
    # With two views there is one pair, and nothing to reach.
    reached = {
        side: (means[side] - random) / (hardest - random) for side in sides if hardest > random
    }
    return Choice(
        candidates,
        cheap,
        resolution,
        chosen[cheap],
        rank_of(trained, chosen[cheap]),
        {"chosen": means[cheap], "hardest": hardest, "random": random},
        reached,
    )


def _sides_of_passes(run: ReportedRun, method: Method, cheap: int, resolution: int) -> list[int]:
    """Return the sides below `resolution` of the run's pass and of those that might replace it.

    Those that the backbone can't take are left out.
    """
    sides = []
    for side in (cheap, *(round(cheap * times) for times in OTHER_PASSES)):
        with contextlib.suppress(UserError):
            check_resolutions(run.options.model.backbone, method.backbone, {side: "side"})
            sides.append(side)
    return sorted(side for side in sides if side < resolution)


def rank_of(losses: Tensor, chosen: Tensor) -> Tensor:
    """Return how many pairs of the image have a larger loss than the chosen one: int64 (B,).

    losses: (B, pairs). chosen: int64 (B,), an index into the pairs.
    """
    return (losses > losses.gather(1, chosen[:, None])).sum(1)


def _centre_crops(run: ReportedRun, path: str, resolution: int, indices: np.ndarray) -> ViewLoader:
    """Return a loader of centre crops.

    `data.broken` covers training images that do not decode; others stop the loader.
    """
    data = run.options.data
    return open_views(
        path,
        data,
        resolution,
        indices=indices,
        broken=data.broken if path == data.train else "stop",
    )


def _features(
    run: ReportedRun, method: Method, path: str, indices: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Return L2-normalised features (n, d) and labels (n,), on the CPU."""
    device = next(method.parameters()).device
    with _centre_crops(run, path, run.options.resolution.max, indices) as loader:
        features, labels = extract_features(
            method.backbone, loader, device, contextlib.nullcontext()
        )
    return F.normalize(features, dim=1).cpu(), labels.cpu()


def _thumbnails(run: ReportedRun, path: str, indices: np.ndarray) -> Tensor:
    with _centre_crops(run, path, min(run.options.resolution.max, THUMBNAIL), indices) as loader:
        return torch.cat([views[:, 0].clone() for views, _, _ in loader])


def evaluation_path(run: ReportedRun) -> str:
    """Return the validation file, or the training file if there is none."""
    return run.options.data.validation or run.options.data.train


def embed(run: ReportedRun, method: Method) -> Embedding:
    """Return the features of a few hundred images in the plane.

    If there are many classes, the images are of a few of them.
    """
    path = evaluation_path(run)
    beton = read_betons(path, run.options.data.label_field)
    labels = np.full(len(beton), UNLABELLED) if beton.labels is None else beton.labels
    classes = _classes(beton)
    indices = np.arange(len(beton))
    if len(classes):
        indices = np.flatnonzero(np.isin(labels, classes[spread(len(classes), EMBEDDED_CLASSES)]))
    indices = indices[spread(len(indices), EMBEDDED_IMAGES)]
    features, labels = _features(run, method, path, indices)
    points, explained = project(features)
    return Embedding(points, labels, describe_data(path).class_names, len(classes), explained)


def project(features: Tensor) -> tuple[Tensor, float | None]:
    """Return features (n, d) as points (n, 2), and the share of variance that they keep.

    UMAP is used if umap-learn is installed, else PCA. The share is None for UMAP.
    """
    if importlib.util.find_spec("umap") and len(features) > 15:
        import umap

        return torch.from_numpy(
            umap.UMAP(metric="cosine", random_state=0, n_jobs=1).fit_transform(features.numpy())
        ), None
    centred = features - features.mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    # Else arbitrary.
    signs = directions[:2].gather(1, directions[:2].abs().argmax(1, keepdim=True)).sign()
    variances = values.square()
    return centred @ (directions[:2] * signs).T, (
        variances[:2].sum() / variances.sum().clamp(min=1e-12)
    ).item()


def _classes(beton: Beton) -> np.ndarray:
    """Return the labels that occur, ascending."""
    return np.setdiff1d([] if beton.labels is None else beton.labels, UNLABELLED)


def _examples(beton: Beton, count: int) -> np.ndarray:
    """Return images of different classes, if there are labels."""
    classes = _classes(beton)
    if not len(classes):
        return spread(len(beton), count)
    firsts = [
        np.flatnonzero(beton.labels == one)[0] for one in classes[spread(len(classes), count)]
    ]
    return np.array(firsts, np.int64)


def nearest_neighbours(run: ReportedRun, method: Method) -> Neighbours:
    """Find the training images whose features are closest to those of a few validation images.

    Closest is by the cosine, among at most BANK training images.

    Raise UserError if both files have labels, but of different classes.
    """
    path, bank_path = evaluation_path(run), run.options.data.train
    asked, trained = (read_betons(one, run.options.data.label_field) for one in (path, bank_path))
    if all(len(_classes(beton)) for beton in (asked, trained)) and path != bank_path:
        shared_classes(trained, asked)
    queries, bank = _examples(asked, QUERIES), spread(len(trained), BANK)
    if path == bank_path:
        bank = np.setdiff1d(bank, queries)
    features, query_labels = _features(run, method, path, queries)
    bank_features, bank_labels = _features(run, method, bank_path, bank)
    cosines, found = (features @ bank_features.T).topk(min(NEIGHBOURS, len(bank)), dim=1)
    thumbnails = _thumbnails(run, bank_path, bank[found.flatten().numpy()]).unflatten(
        0, found.shape
    )
    return Neighbours(
        _thumbnails(run, path, queries),
        query_labels,
        thumbnails,
        bank_labels[found],
        cosines,
        describe_data(bank_path).class_names,
    )
