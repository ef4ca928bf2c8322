"""Hard Augment (section 3.3): of m views of an image, train on the pair with the largest loss.

The loss of all pairs comes from one forward pass over all views of the batch, without gradient, at a low resolution. The views that
were not chosen may serve, at that resolution, as extra targets of the chosen two (the paper's Table 9).
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ffssl.device import autocast_dtype
from ffssl.distributed import rank, world_size
from ffssl.errors import UserError
from ffssl.images import to_input
from ffssl.methods.base import Method, cosines, full_precision
from ffssl.methods.prediction import PredictionMethod


def check(method: Method, *, loss: str, extra_targets: bool, **_) -> None:
    """Raise UserError for what these options ask of a method that has no such thing."""
    if loss == "method" and type(method).pair_losses is Method.pair_losses:
        raise UserError(f"--hard_augment.loss: {method.name} has no loss of single images; use --hard_augment.loss=cosine")
    if extra_targets and not isinstance(method, PredictionMethod):
        raise UserError(f"--hard_augment.extra_targets: {method.name} does not predict targets; leave it false")


def choose_views(
    method: Method, views: Tensor, *, select: str = "off", resolution: int = 64, loss: str = "cosine", extra_targets: bool = False, seed: int = 0
) -> tuple[Tensor, ...]:
    """What `method.loss` takes of uint8 views (B, m, 3, R, R): two views of each image, normalised, in autocast's dtype, (B, 3, R, R)
    and channels_last, and the extra targets (B, m - 2, d) if there are to be any.

    select: "off" (the first two views), "hard", or "random", drawn by `seed`. resolution: of the selection pass and the extra
    targets. loss: by which pairs are compared, "cosine" (negative cosine of the projections) or "method" (the method's own).
    Changes nothing: neither BatchNorm's statistics, teacher, queue or centre, nor the random state.
    """
    pair, targets = (views[:, 0], views[:, 1]), None
    if select == "hard":
        chosen, targets = select_hardest(method, views, resolution, loss=loss, extra_targets=extra_targets)
        pair = take_pair(views, chosen)
    elif select == "random":
        device = views.device if views.device.type == "cuda" else "cpu"  # numbers drawn on the GPU need not wait to get there
        everyones = random_pair(len(views) * world_size(), views.shape[1], torch.Generator(device).manual_seed(seed))
        chosen = everyones[rank() :: world_size()].to(views.device)  # as the images are dealt out
        pair = take_pair(views, chosen)
        targets = targets_of(method, take_rest(views, chosen), resolution) if extra_targets else None
    pair = tuple(to_input(view, autocast_dtype(views.device)) for view in pair)
    return pair if targets is None else (*pair, targets)


def pairs(views: int, device: torch.device | None = None) -> Tensor:
    """All m(m-1)/2 pairs (i, j) with i < j of `views` views: int64 (pairs, 2)."""
    return torch.triu_indices(views, views, offset=1, device=device).T


def hardest_pair(losses: Tensor) -> Tensor:
    """Of each image the pair of views with the largest loss. losses: (B, m, m), symmetric. Returns int64 (B, 2)."""
    candidates = pairs(losses.shape[1], losses.device)
    return candidates[losses[:, candidates[:, 0], candidates[:, 1]].argmax(1)]


def random_pair(batch: int, views: int, generator: torch.Generator) -> Tensor:
    """A random pair of views of each image, the comparison to `hardest_pair`: int64 (batch, 2)."""
    candidates = pairs(views, generator.device)
    return candidates[torch.randint(len(candidates), (batch,), generator=generator, device=generator.device)]


@contextmanager
def batch_statistics_untracked(model: nn.Module) -> Iterator[None]:
    """In training mode, let BatchNorm normalise by the batch and leave its running statistics alone."""
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
    """Forward passes inside leave neither gradients nor statistics, and the random state as it was (dropout draws from it)."""
    random_state = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with torch.no_grad(), random_state, batch_statistics_untracked(method):
        yield


def select_hardest(
    method: Method, views: Tensor, resolution: int, *, loss: str = "cosine", extra_targets: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The selection pass: int64 (B, 2), the chosen views of each image, and targets (B, m - 2, d) from the others if asked for.

    views: uint8 (B, m, 3, R, R). The extra targets come from the same pass where it has them: where they are the student's
    projections, or the pairs are compared by the method's loss. Otherwise the teacher sees the other views too.
    """
    batch = views.shape[:2]
    with without_trace(method, views.device):
        losses, projections, targets = _compare(method, small_input(views, resolution), batch, loss)
        chosen = hardest_pair(losses)
        if not extra_targets:
            return chosen, None
        if targets is not None:
            return chosen, take_rest(targets, chosen)
        return chosen, targets_of(method, take_rest(views, chosen), resolution, take_rest(projections, chosen))


def losses_of_pairs(method: Method, views: Tensor, resolution: int, *, loss: str = "cosine") -> Tensor:
    """What the selection pass compares: (B, m, m), symmetric, of uint8 views (B, m, 3, R, R)."""
    with without_trace(method, views.device):
        return _compare(method, small_input(views, resolution), views.shape[:2], loss)[0]


def _compare(method: Method, images: Tensor, batch: tuple[int, int], loss: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of images (B m, 3, R, R) the pairs' losses (B, m, m), the projections (B, m, d) and, where the loss takes them, the targets."""
    projections = method.project(images).unflatten(0, batch)
    if loss == "cosine":
        return -cosines(projections, projections), projections, None
    targets = method.targets(images, projections.flatten(0, 1)).unflatten(0, batch)
    return method.pair_losses(projections, targets), projections, targets


def targets_of(method: Method, views: Tensor, resolution: int, projections: Tensor | None = None) -> Tensor:
    """The method's targets (B, n, d) of uint8 views (B, n, 3, R, R) at `resolution`. projections (B, n, d'): theirs, if they are known."""
    with without_trace(method, views.device):
        targets = method.targets(small_input(views, resolution), None if projections is None else projections.flatten(0, 1))
    return targets.unflatten(0, views.shape[:2])


def small_input(views: Tensor, resolution: int) -> Tensor:
    """A network's input (B n, 3, r, r) from uint8 views (B, n, 3, R, R): downsampled to `resolution`, with antialiasing, where they are
    larger, then normalised in float32, channels_last.
    """
    images = views.flatten(0, 1)
    if images.shape[-1] > resolution:  # first, since normalising all views at full resolution would take longer than this does
        images = shrunk(images, resolution)
    return to_input(images)


def shrunk(images: Tensor, resolution: int) -> Tensor:
    """uint8 images (..., R, R) downsampled with antialiasing: levels (..., resolution, resolution), float32, or float16 on a GPU that computes
    in half precision.
    """
    # On a CPU as matrix products, in a quarter of the time of the interpolation of views of 48 pixels. Not on the meta device: there
    # FLOPs are counted, which are to be those of networks alone.
    dtype = torch.float32
    if images.device.type == "cuda" and autocast_dtype(images.device) != torch.float32:
        dtype = torch.float16  # which has the levels exactly, and between them eight steps where bf16 has one
    elif images.device.type != "cpu":
        return F.interpolate(images.float(), (resolution, resolution), mode="bilinear", antialias=True)
    shrink = shrinking_matrix(images.shape[-1], resolution, dtype, images.device)
    with full_precision(images):
        return shrink @ (images.to(dtype) @ shrink.T)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def shrinking_matrix(
    side: int, resolution: int, dtype: torch.dtype = torch.float32, device: torch.device = torch.device("cpu")
) -> Tensor:  # fmt: skip
    """What antialiased bilinear downsampling is along an axis: (resolution, side). Copied to the device once: that makes the host wait."""
    matrix = F.interpolate(torch.eye(side)[None, None], (resolution, side), mode="bilinear", antialias=True)[0, 0]
    return matrix.to(device, dtype).contiguous()


def take_pair(views: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen two views of each image. views: (B, m, ...), chosen: (B, 2). Returns two of (B, ...)."""
    image = torch.arange(len(views), device=views.device)
    return views[image, chosen[:, 0]], views[image, chosen[:, 1]]


def take_rest(values: Tensor, chosen: Tensor) -> Tensor:
    """What belongs to the views that were not chosen, in their order. values: (B, m, ...), chosen: (B, 2). Returns (B, m - 2, ...)."""
    batch, m = values.shape[:2]
    taken = torch.zeros(batch, m, dtype=torch.uint8, device=values.device).scatter(1, chosen, 1)
    rest = taken.argsort(dim=1, stable=True)[:, : m - 2]
    return values[torch.arange(batch, device=values.device)[:, None], rest]
