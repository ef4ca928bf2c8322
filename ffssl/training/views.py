"""The views of a batch: of one size, or global and local ones.

Views of one size are a tensor, uint8 (B, m, 3, R, R). With local views they are a tuple of two such
tensors, the global ones first.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from torch import Tensor

Views: TypeAlias = Tensor | tuple[Tensor, ...]


def map_sizes(function: Callable[..., Tensor], *views: Views) -> Views:
    """Apply a function to the tensors of each size."""
    if isinstance(views[0], tuple):
        return tuple(map(function, *views))
    return function(*views)


def make_views(make: Callable[[Sequence[int]], Tensor], shapes: Iterable[Sequence[int]]) -> Views:
    """Return views of the given shapes, one for each size."""
    tensors = tuple(map(make, shapes))
    return tensors[0] if len(tensors) == 1 else tensors


def global_and_local(views: Views) -> tuple[Tensor, Tensor | None]:
    if isinstance(views, Tensor):
        return views, None
    whole, local = views
    return whole, local


def split_batch(views: Views, count: int) -> list[Views]:
    """Return `count` equal parts of a batch, one after the other."""
    if isinstance(views, Tensor):
        return list(views.chunk(count))
    return list(zip(*(of_size.chunk(count) for of_size in views)))
