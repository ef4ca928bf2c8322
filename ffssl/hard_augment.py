"""Hard Augment (section 3.3): of m views of an image, train on the pair with the largest loss.

The loss of all pairs comes from one forward pass over all views of the batch, without gradient, at
a low resolution. It is the loss that is trained (eq. 10). The views that were not chosen may serve,
at that resolution, as extra targets of the chosen two (the paper's Table 9).
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ffssl.data.normalise import to_input
from ffssl.errors import UserError
from ffssl.methods.base import Method, cosines, full_precision
from ffssl.methods.prediction import PredictionMethod
from ffssl.parallel.device import autocast_dtype
from ffssl.parallel.ranks import rank, world_size


@dataclass(frozen=True)
class Selection:
    """How the pair of an image's views that is trained on is chosen.

    select: "off" (the first two views), "hard" (the pair with the largest loss), or "random".
    resolution: side in pixels of the selection pass and of the extra targets.
    loss: what pairs are compared by: "method" (the loss that is trained), "cosine" (the negative
        cosine of the projections: the comment of the paper's Algorithm 1), or None, the method's
        `pair_loss`.
    extra_targets: the views not chosen serve as further targets.
    share: of the images, those that get their hardest pair; the others get a random one.
    policies: number of view policies, which views are dealt out to in turn. With more than one,
        only pairs of views by different policies are candidates.
    """

    select: str = "off"
    resolution: int = 64
    loss: str | None = None
    extra_targets: bool = False
    share: float = 1.0
    policies: int = 1


def check(method: Method, selection: Selection) -> None:
    """Raise UserError for what a selection asks of a method that has no such thing."""
    if selection.loss == "method" and not method.has_pair_losses:
        raise UserError(
            f"--hard_augment.loss: {method.name} has no loss of single images; "
            "use --hard_augment.loss=cosine, or leave it out"
        )
    if selection.extra_targets and not isinstance(method, PredictionMethod):
        raise UserError(
            f"--hard_augment.extra_targets: {method.name} does not predict targets; leave it false"
        )


def choose_views(
    method: Method, views: Tensor, selection: Selection = Selection(), seed: int = 0
) -> tuple[Tensor, ...]:
    """Arguments for `method.loss`, from uint8 views (B, m, 3, R, R).

    They are two normalised views per image, each (B, 3, R, R) in autocast's dtype and
    channels_last, followed by the extra targets (B, m - 2, d) if there are any. Of two views, both
    are taken. seed: of random pairs. BatchNorm's statistics, teacher, queue, centre and the random
    state stay as they are.
    """
    pair, targets = (views[:, 0], views[:, 1]), None
    if selection.select != "off" and views.shape[1] > 2:
        if selection.select == "hard":
            chosen, targets = select_hardest(method, views, selection, seed)
        else:
            chosen, _ = random_choice(views, selection, seed)
            if selection.extra_targets:
                targets = targets_of(method, take_rest(views, chosen), selection.resolution)
        pair = take_pair(views, chosen)
    pair = tuple(to_input(view, autocast_dtype(views.device)) for view in pair)
    return pair if targets is None else (*pair, targets)


def pairs(views: int, device: torch.device | None = None, policies: int = 1) -> Tensor:
    """The candidate pairs (i, j), i < j, of `views` views: int64 (pairs, 2).

    All m(m-1)/2 with one policy; with more, those whose views were drawn by different ones.
    """
    if policies == 1:
        return torch.triu_indices(views, views, offset=1, device=device).T
    # By distance, from ranges: a list would have to be copied to a GPU, which waits.
    distances = (d for d in range(1, views) if d % policies)
    firsts = ((torch.arange(views - d, device=device), d) for d in distances)
    return torch.cat([torch.stack([first, first + d], dim=1) for first, d in firsts])


def hardest_pair(losses: Tensor, policies: int = 1) -> Tensor:
    """The pair of each image's views with the largest loss: int64 (B, 2).

    losses: (B, m, m), symmetric.
    """
    candidates = pairs(losses.shape[1], losses.device, policies)
    return candidates[losses[:, candidates[:, 0], candidates[:, 1]].argmax(1)]


def random_pair(batch: int, views: int, generator: torch.Generator, policies: int = 1) -> Tensor:
    """A random pair of views of each image, the comparison to `hardest_pair`: int64 (batch, 2)."""
    candidates = pairs(views, generator.device, policies)
    drawn = torch.randint(len(candidates), (batch,), generator=generator, device=generator.device)
    return candidates[drawn]


def random_choice(views: Tensor, selection: Selection, seed: int) -> tuple[Tensor, Tensor]:
    """What chance decides for this rank's views (B, m, ...), as one process would for all ranks'.

    Returns a random pair of each image, int64 (B, 2), and whether it gets its hardest one,
    bool (B,), by `selection.share`.
    """
    # A GPU draws its own: numbers of the host would have to wait to get there.
    device = views.device if views.device.type == "cuda" else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    images = len(views) * world_size()
    drawn = random_pair(images, views.shape[1], generator, selection.policies)
    hard = torch.rand(images, generator=generator, device=device) < selection.share
    # As the images are dealt out.
    return drawn[rank() :: world_size()].to(views.device), hard[rank() :: world_size()].to(
        views.device
    )


@contextmanager
def batch_statistics_untracked(model: nn.Module) -> Iterator[None]:
    """In training mode, let BatchNorm normalise by the batch and leave its running statistics
    alone.
    """
    tracking = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


@contextmanager
def without_trace(method: Method, device: torch.device) -> Iterator[None]:
    """Forward passes inside leave neither gradients nor statistics, and the random state as it was
    (dropout draws from it).
    """
    random_state = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with torch.no_grad(), random_state, batch_statistics_untracked(method):
        yield


def select_hardest(
    method: Method, views: Tensor, selection: Selection, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """The selection pass over uint8 views (B, m, 3, R, R).

    Returns the chosen views of each image, int64 (B, 2), and the extra targets (B, m - 2, d) if
    there are to be any. They reuse this pass if it already computed them (no teacher, or pairs
    compared by the method's loss); otherwise the teacher runs on the remaining views.
    """
    with without_trace(method, views.device):
        losses, projections, targets = _compare_small(method, views, selection)
        chosen = hardest_pair(losses, selection.policies)
        if selection.share < 1:
            others, hard = random_choice(views, selection, seed)
            chosen = torch.where(hard[:, None], chosen, others)
        if not selection.extra_targets:
            return chosen, None
        if targets is not None:
            return chosen, take_rest(targets, chosen)
        rest, their_projections = take_rest(views, chosen), take_rest(projections, chosen)
        return chosen, targets_of(method, rest, selection.resolution, their_projections)


def losses_of_pairs(method: Method, views: Tensor, selection: Selection) -> Tensor:
    """What the selection pass compares, of uint8 views (B, m, 3, R, R): (B, m, m), symmetric."""
    with without_trace(method, views.device):
        return _compare_small(method, views, selection)[0]


def _compare_small(
    method: Method, views: Tensor, selection: Selection
) -> tuple[Tensor, Tensor, Tensor | None]:
    images = small_input(views, selection.resolution)
    return compare(method, images, views.shape[:2], selection.loss or method.pair_loss)


def compare(
    method: Method, images: Tensor, batch: tuple[int, int], loss: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `Method.compare`, by the loss "method" or "cosine", which takes no targets."""
    if loss == "method":
        return method.compare(images, batch)
    projections = method.project(images).unflatten(0, batch)
    return -cosines(projections, projections), projections, None


def targets_of(
    method: Method, views: Tensor, resolution: int, projections: Tensor | None = None
) -> Tensor:
    """The method's targets (B, n, d) of uint8 views (B, n, 3, R, R) at `resolution`. projections
    (B, n, d'): theirs, if they are known.
    """
    with without_trace(method, views.device):
        targets = method.targets(
            small_input(views, resolution),
            None if projections is None else projections.flatten(0, 1),
        )
    return targets.unflatten(0, views.shape[:2])


def small_input(views: Tensor, resolution: int) -> Tensor:
    """A network's input (B n, 3, r, r) from uint8 views (B, n, 3, R, R): downsampled to
    `resolution`, with antialiasing, where they are larger, then normalised in float32,
    channels_last.
    """
    images = views.flatten(0, 1)
    # First, since normalising all views at full resolution would take longer than this does.
    if images.shape[-1] > resolution:
        images = shrunk(images, resolution)
    return to_input(images)


def shrunk(images: Tensor, resolution: int) -> Tensor:
    """uint8 images (..., R, R) downsampled with antialiasing: levels (..., resolution, resolution),
    float32, or float16 on a GPU that computes in half precision.
    """
    # On a CPU as matrix products, in a quarter of the time of the interpolation of views of 48
    # pixels. Not on the meta device: there FLOPs are counted, which are to be those of networks
    # alone.
    dtype = torch.float32
    if images.device.type == "cuda" and autocast_dtype(images.device) != torch.float32:
        # Which has the levels exactly, and between them eight steps where bf16 has one.
        dtype = torch.float16
    elif images.device.type != "cpu":
        return F.interpolate(
            images.float(), (resolution, resolution), mode="bilinear", antialias=True
        )
    shrink = shrinking_matrix(images.shape[-1], resolution, dtype, images.device)
    with full_precision(images):
        return shrink @ (images.to(dtype) @ shrink.T)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def shrinking_matrix(
    side: int,
    resolution: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device = torch.device("cpu"),
) -> Tensor:
    """What antialiased bilinear downsampling is along an axis: (resolution, side).

    Copied to the device once: that makes the host wait.
    """
    matrix = F.interpolate(
        torch.eye(side)[None, None], (resolution, side), mode="bilinear", antialias=True
    )[0, 0]
    return matrix.to(device, dtype).contiguous()


def take_pair(views: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen two views of each image.

    views: (B, m, ...), chosen: (B, 2). Returns two of (B, ...).
    """
    image = torch.arange(len(views), device=views.device)
    return views[image, chosen[:, 0]], views[image, chosen[:, 1]]


def take_rest(values: Tensor, chosen: Tensor) -> Tensor:
    """What belongs to the views that were not chosen, in their order.

    values: (B, m, ...), chosen: (B, 2). Returns (B, m - 2, ...).
    """
    batch, m = values.shape[:2]
    taken = torch.zeros(batch, m, dtype=torch.uint8, device=values.device).scatter(1, chosen, 1)
    rest = taken.argsort(dim=1, stable=True)[:, : m - 2]
    return values[torch.arange(batch, device=values.device)[:, None], rest]
