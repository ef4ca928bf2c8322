"""Hard Augment (section 3.3): of m views of an image, train on the pair with the largest loss.

One forward pass over all views of the batch gives the losses of all pairs, without gradient and at
a low resolution. The loss is the one that is trained (eq. 10). Some methods take a cheaper one,
which ranks pairs nearly alike (`Method.compares_pairs_by`). The views that were not chosen may
serve, at that resolution, as extra targets of the chosen two (the paper's Table 9).
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ffssl.backbones import all_patches
from ffssl.data.normalise import to_input
from ffssl.errors import UserError
from ffssl.methods.base import Method, cosines
from ffssl.methods.prediction import PredictionMethod
from ffssl.methods.teacher import TeacherMethod
from ffssl.parallel.device import autocast_dtype, full_precision
from ffssl.parallel.ranks import rank, world_size


@dataclass(frozen=True)
class Selection:
    """How to choose the pair of an image's views to train on.

    select: "off" (the first two views), "hard" (the pair with the largest loss), or "random".
    resolution: side in pixels of the selection pass and of the extra targets.
    loss: how pairs are compared: by "method" (the training loss), by "student" (the same with the
        student in its teacher's place), by "cosine" (the negative cosine of the projections: the
        comment of the paper's Algorithm 1). None: what the method's `compares_pairs_by` says.
    extra_targets: use the views not chosen as further targets.
    share: fraction of the images that get their hardest pair; the others get a random one.
    policies: number of view policies, to which views are assigned in turn. With more than one, the
        candidates are the pairs of views of different policies.
    """

    select: str = "off"
    resolution: int = 64
    loss: str | None = None
    extra_targets: bool = False
    share: float = 1.0
    policies: int = 1


def check(method: Method, selection: Selection) -> None:
    """Raise UserError if the selection asks for something that the method does not have."""
    if selection.loss == "method" and not method.has_pair_losses:
        raise UserError(
            f"--hard_augment.loss: {method.name} has no loss of single images; "
            "use --hard_augment.loss=cosine, or leave it out"
        )
    if selection.loss == "student" and not isinstance(method, TeacherMethod):
        raise UserError(
            f"--hard_augment.loss: {method.name} has no teacher; use --hard_augment.loss=method, "
            "or leave it out"
        )
    if selection.extra_targets and not isinstance(method, PredictionMethod):
        raise UserError(
            f"--hard_augment.extra_targets: {method.name} does not predict targets; leave it false"
        )


def choose_views(
    method: Method, views: Tensor, selection: Selection = Selection(), seed: int = 0
) -> tuple[Tensor, ...]:
    """Return the arguments for `method.loss`, from uint8 views (B, m, 3, R, R).

    They are two normalised views per image, each (B, 3, R, R) in autocast's dtype and
    channels_last, followed by the extra targets (B, m - 2, d) when `extra_targets` is set. With m =
    2 both views are taken.

    seed: seed of random pairs.

    The statistics of BatchNorm, the teacher, queue, centre and the random state do not change.
    """
    pair, targets = (views[:, 0], views[:, 1]), None
    if selection.select != "off" and views.shape[1] > 2:
        if selection.select == "hard":
            chosen, targets = selection_pass(method, views, selection, seed)
        else:
            chosen, _ = draw_pairs(views, selection, seed)
            if selection.extra_targets:
                targets = targets_of(method, take_rest(views, chosen), selection.resolution)
        pair = take_pair(views, chosen)
    first, second = (to_input(view, autocast_dtype(views.device)) for view in pair)
    return (first, second) if targets is None else (first, second, targets)


def local_argument(local: Tensor | None) -> dict[str, Tensor]:
    """Return the further argument for `method.loss`, from uint8 local views (B, n, 3, r, r).

    They are normalised like the pair, (B, n, 3, r, r). Pairs are chosen among the global views
    alone.
    """
    if local is None:
        return {}
    images = to_input(local.flatten(0, 1), autocast_dtype(local.device))
    return {"local": images.unflatten(0, local.shape[:2])}


def pairs(views: int, device: torch.device | None = None, policies: int = 1) -> Tensor:
    """Return the candidate pairs (i, j), i < j, of `views` views: int64 (pairs, 2).

    With one policy they are all m(m-1)/2 pairs; with more, the pairs of views of different
    policies.
    """
    if policies == 1:
        return torch.triu_indices(views, views, offset=1, device=device).T
    # By distance j - i, from ranges made on the device: copying a list to a GPU makes the host
    # wait.
    distances = (d for d in range(1, views) if d % policies)
    firsts = ((torch.arange(views - d, device=device), d) for d in distances)
    return torch.cat([torch.stack([first, first + d], dim=1) for first, d in firsts])


def hardest_pairs(losses: Tensor, policies: int = 1) -> Tensor:
    """Return the pair of views with the largest loss, for each image: int64 (B, 2).

    losses: (B, m, m), symmetric.
    """
    candidates = pairs(losses.shape[1], losses.device, policies)
    return candidates[by_pair(losses, candidates).argmax(1)]


def by_pair(losses: Tensor, candidates: Tensor) -> Tensor:
    """Return the losses (B, pairs) of `candidates`, int64 (pairs, 2), from losses (B, m, m)."""
    return losses[:, candidates[:, 0], candidates[:, 1]]


def random_pairs(batch: int, views: int, generator: torch.Generator, policies: int = 1) -> Tensor:
    """Return a random pair of views for each image: int64 (batch, 2).

    The control of `hardest_pairs`.
    """
    candidates = pairs(views, generator.device, policies)
    drawn = torch.randint(len(candidates), (batch,), generator=generator, device=generator.device)
    return candidates[drawn]


def draw_pairs(views: Tensor, selection: Selection, seed: int) -> tuple[Tensor, Tensor]:
    """Draw a random pair for each of this rank's images, and whether it gets its hardest instead.

    views: (B, m, ...). The draws do not depend on the number of ranks. Return the pairs, int64 (B,
    2), and whether the image gets its hardest pair, bool (B,), with probability `selection.share`.
    """
    # A GPU draws its own numbers: copying them from the host would make it wait.
    device = views.device if views.device.type == "cuda" else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    images = len(views) * world_size()
    drawn = random_pairs(images, views.shape[1], generator, selection.policies)
    hard = torch.rand(images, generator=generator, device=device) < selection.share
    mine = slice(rank(), None, world_size())  # the ranks take the images in turn
    return drawn[mine].to(views.device), hard[mine].to(views.device)


@contextmanager
def batch_statistics_untracked(model: nn.Module) -> Iterator[None]:
    """Keep BatchNorm from updating its running statistics inside the block.

    In training mode it normalises by the batch, as usual.
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
def without_trace(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run forward passes that leave no gradients and no statistics.

    The random state, from which dropout draws, is restored when the block ends. No patches are
    dropped: views are compared by the whole of what they show.
    """
    random_state = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with torch.no_grad(), random_state, batch_statistics_untracked(model), all_patches(model):
        yield


def selection_pass(
    method: Method, views: Tensor, selection: Selection, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Run the selection pass over uint8 views (B, m, 3, R, R).

    Return the indices of the chosen views of each image, int64 (B, 2), and the extra targets (B, m
    - 2, d) when `extra_targets` is set, else None. The extra targets reuse this pass if it already
    computed them (no teacher, or pairs compared by the method's loss). Otherwise the teacher runs
    on the remaining views.
    """
    with without_trace(method, views.device):
        losses, projections, targets = _compare_at_low_resolution(method, views, selection)
        chosen = hardest_pairs(losses, selection.policies)
        if selection.share < 1:
            others, hard = draw_pairs(views, selection, seed)
            chosen = torch.where(hard[:, None], chosen, others)
        if not selection.extra_targets:
            return chosen, None
        if targets is not None:
            return chosen, take_rest(targets, chosen)
        rest, their_projections = take_rest(views, chosen), take_rest(projections, chosen)
        return chosen, targets_of(method, rest, selection.resolution, their_projections)


def selection_losses(method: Method, views: Tensor, selection: Selection) -> Tensor:
    """Return the losses that the selection pass compares: (B, m, m), symmetric.

    views: uint8 (B, m, 3, R, R).
    """
    with without_trace(method, views.device):
        return _compare_at_low_resolution(method, views, selection)[0]


def _compare_at_low_resolution(
    method: Method, views: Tensor, selection: Selection
) -> tuple[Tensor, Tensor, Tensor | None]:
    images = small_input(views, selection.resolution)
    return compare_by(method, images, views.shape[:2], selection.loss or method.compares_pairs_by)


def compare_by(
    method: Method, images: Tensor, batch: Sequence[int], loss: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compare all pairs of views by the loss "method", "student" or "cosine".

    Arguments and results are those of `Method.compare`. Only "method" computes targets; the others
    return None in their place.
    """
    if loss == "method":
        return method.compare(images, batch)
    projections = method.project(images).unflatten(0, batch)
    if loss == "student":
        assert isinstance(method, TeacherMethod)  # `check` refuses the others
        return method.student_pair_losses(projections), projections, None
    return -cosines(projections, projections), projections, None


def targets_of(
    method: Method, views: Tensor, resolution: int, projections: Tensor | None = None
) -> Tensor:
    """Return the method's targets (B, n, d) of uint8 views (B, n, 3, R, R) at `resolution`.

    projections: (B, n, d'), the projections of these views if they are known.
    """
    with without_trace(method, views.device):
        targets = method.targets(
            small_input(views, resolution),
            None if projections is None else projections.flatten(0, 1),
        )
    return targets.unflatten(0, views.shape[:2])


def small_input(views: Tensor, resolution: int) -> Tensor:
    """Return a network's input (B n, 3, r, r) from uint8 views (B, n, 3, R, R).

    They are `small_images`, normalised in float32, channels_last.
    """
    # Downsample first: normalising all views at full resolution would take longer than this does.
    return to_input(small_images(views, resolution))


def small_images(views: Tensor, resolution: int) -> Tensor:
    """Return views (B, n, C, R, R), uint8 or floating, as images (B n, C, r, r).

    Those larger than `resolution` are `shrunk` to it.
    """
    images = views.flatten(0, 1)
    return shrunk(images, resolution) if images.shape[-1] > resolution else images


def shrunk(images: Tensor, resolution: int) -> Tensor:
    """Downsample images (..., R, R), uint8 or floating, with antialiasing.

    Return them (..., resolution, resolution) in the same range: in float32, or in float16 on a GPU
    whose autocast is in half precision.
    """
    # On a CPU two matrix products take a quarter of the time of the interpolation, for views of 48
    # pixels. The meta device interpolates: there FLOPs are counted, and only networks are to count.
    dtype = torch.float32
    if images.device.type == "cuda" and autocast_dtype(images.device) != torch.float32:
        # float16 holds the levels exactly, with eight steps between two levels where bf16 has one.
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
    """Return the matrix (resolution, side) of antialiased bilinear downsampling along an axis.

    It is cached, since copying it to the device makes the host wait.
    """
    identity = torch.eye(side)[None, None]
    matrix = F.interpolate(identity, (resolution, side), mode="bilinear", antialias=True)[0, 0]
    return matrix.to(device, dtype).contiguous()


def take_pair(views: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the chosen two views of each image, each (B, ...).

    views: (B, m, ...).
    chosen: (B, 2).
    """
    image = torch.arange(len(views), device=views.device)
    return views[image, chosen[:, 0]], views[image, chosen[:, 1]]


def take_rest(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the values of the views that were not chosen, in order: (B, m - 2, ...).

    values: (B, m, ...).
    chosen: (B, 2).
    """
    batch, m = values.shape[:2]
    taken = torch.zeros(batch, m, dtype=torch.uint8, device=values.device).scatter(1, chosen, 1)
    rest = taken.argsort(dim=1, stable=True)[:, : m - 2]
    return values[torch.arange(batch, device=values.device)[:, None], rest]
