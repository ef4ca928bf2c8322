"""Hard Augment for any network: of an image's views, the two with the largest loss."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ffssl.errors import UserError
from ffssl.hard_augment import hardest_pairs, pairs, small_images, take_pair, without_trace
from ffssl.methods.base import cosines


def hardest_views(
    embed: Callable[[Tensor], Any],
    views: Tensor | Sequence[Tensor],
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    resolution: int = 64,
    normalise: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return two views of each image, each (B, C, R, R): the pair with the largest loss.

    One pass of all views at a low resolution finds them (section 3.3 of the paper). It leaves no
    gradient. The running statistics of BatchNorm and the random state stay as they were.

    embed: a module, a method of one, or a function that names the modules it calls. It gets images
        (B m, C, r, r) and returns embeddings (B m, d), or a tuple of such tensors. For BatchNorm
        the batch is all views.
    views: m >= 3 views of each image: (B, m, C, R, R), or a list of m tensors (B, C, R, R); uint8
        or floating.
    loss: what is trained, of each image. It gets what `embed` returns for one view of the images
        and for another, and returns (B,). It is called for each of the m (m - 1) / 2 pairs. By
        default it is the negative cosine of the embeddings. For a method with a predictor
        (SimSiam, BYOL) give its own: pairs of the least alike projections teach a predictor the
        wrong thing.
    resolution: side in pixels of the pass. Larger views are downsampled to it, with antialiasing.
    normalise: makes the network's input of small views in the range of `views`, which are of a
        floating type: `ffssl.to_input`, or what your loop has. uint8 views need it. Floating views
        go to `embed` as they are without it.

    The two views are of the type of `views`, and not normalised.

    Raise UserError for fewer than three views, for views of another type or shape, and for a
    `loss` or an `embed` whose results are not of one number or vector for each image.
    """
    stacked = _stacked(views)
    _check(stacked, resolution, normalise)
    if isinstance(embed, DistributedDataParallel):
        embed = embed.module  # a call of the wrapper would copy rank 0's statistics to the others
    modules = _modules_of(embed)
    if not modules:
        raise UserError(
            f"hardest_views: {embed!r} names no module whose BatchNorm is to be left alone; "
            "give a module, a method of one, or a function over modules"
        )
    if loss is not None:
        modules += _modules_of(loss)
    with without_trace(nn.ModuleList(modules), stacked.device):
        outputs = _outputs(
            embed, _small(stacked, resolution, normalise), (len(stacked), stacked.shape[1])
        )
        losses = _losses(outputs, loss)
    # Before torch 2.10 autocast keeps the weights that it has cast here, without gradient, and no
    # gradient would reach the real ones.
    torch.clear_autocast_cache()
    return take_pair(stacked, hardest_pairs(losses))


def _stacked(views: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the views as one tensor (B, m, C, R, R)."""
    if isinstance(views, Tensor):
        return views
    if not (isinstance(views, list | tuple) and all(isinstance(view, Tensor) for view in views)):
        raise UserError("hardest_views: views must be a tensor, or a list of tensors")
    shapes = {tuple(view.shape) for view in views}
    if len(shapes) > 1:
        raise UserError(
            f"hardest_views: views of different shapes, {' and '.join(map(str, sorted(shapes)))}; "
            "give those of one size"
        )
    return torch.stack(tuple(views), dim=1) if views else torch.empty(0)


def _check(views: Tensor, resolution: int, normalise: object) -> None:
    if views.ndim != 5 or views.shape[-1] != views.shape[-2]:
        raise UserError(
            f"hardest_views: views of shape {tuple(views.shape)}, must be (images, views, "
            "channels, side, side), or a list of (images, channels, side, side)"
        )
    if views.shape[1] < 3:
        raise UserError(
            f"hardest_views: {views.shape[1]} views of each image leave nothing to choose; give "
            "three or more"
        )
    if views.dtype != torch.uint8 and not views.is_floating_point():
        raise UserError(f"hardest_views: views of {views.dtype}, must be uint8 or floating")
    if views.dtype == torch.uint8 and normalise is None:
        raise UserError(
            "hardest_views: uint8 views need normalise=, what makes a network's input of levels in "
            "0..255: ffssl.to_input, or what your loop has"
        )
    if resolution < 1:
        raise UserError(f"hardest_views: resolution is {resolution}, must be at least 1 pixel")


def _modules_of(function: object) -> list[nn.Module]:
    """Return the modules that a function calls, as far as it says so.

    They are the function itself, the object whose method it is, or the variables that it names.
    """
    owner = getattr(function, "__self__", function)
    if isinstance(owner, nn.Module):
        return [owner]
    if not inspect.isfunction(function):
        return []
    scope = inspect.getclosurevars(function)
    named = [*scope.nonlocals.values(), *scope.globals.values()]
    return [value for value in named if isinstance(value, nn.Module)]


def _small(views: Tensor, resolution: int, normalise: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Return the input (B m, C, r, r) of the pass."""
    images = small_images(views, resolution)
    if not images.is_floating_point():
        images = images.float()
    return images if normalise is None else normalise(images)


def _outputs(
    embed: Callable[[Tensor], Any], images: Tensor, batch: tuple[int, int]
) -> Tensor | tuple[Tensor, ...]:
    """Return what `embed` makes of the images, each tensor as (B, m, ...)."""
    outputs = embed(images)
    parts = outputs if isinstance(outputs, list | tuple) else (outputs,)
    for part in parts:
        if not isinstance(part, Tensor) or part.ndim < 2 or len(part) != len(images):
            told = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise UserError(
                f"hardest_views: embed gives {told} for {len(images)} images, must be "
                f"({len(images)}, d), or a tuple of such tensors"
            )
    split = tuple(part.unflatten(0, batch) for part in parts)
    return split if isinstance(outputs, list | tuple) else split[0]


def _losses(
    outputs: Tensor | tuple[Tensor, ...], loss: Callable[[Any, Any], Tensor] | None
) -> Tensor:
    """Return the loss of each image's pairs of views (i, j): (B, m, m), symmetric."""
    if loss is None:
        if not isinstance(outputs, Tensor):
            raise UserError(
                f"hardest_views: embed gives {len(outputs)} tensors; say by what loss= pairs of "
                "views are compared"
            )
        embeddings = outputs.flatten(2)
        return -cosines(embeddings, embeddings)

    parts = outputs if isinstance(outputs, tuple) else (outputs,)
    images, views = parts[0].shape[:2]
    losses = torch.zeros(images, views, views, device=parts[0].device)
    for i, j in pairs(views).tolist():
        first, second = (
            outputs[:, v] if isinstance(outputs, Tensor) else tuple(part[:, v] for part in outputs)
            for v in (i, j)
        )
        values = loss(first, second)
        if not isinstance(values, Tensor) or values.shape != (images,):
            told = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise UserError(
                f"hardest_views: loss gives {told} for {images} images, must be one number for "
                f"each, ({images},): leave out its mean"
            )
        losses[:, i, j] = losses[:, j, i] = values.float()
    return losses
