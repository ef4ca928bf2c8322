"""What every contender of the loader benchmark has to do."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ffssl.data.policy import ViewPolicy

# Batches without end. Each is a sequence of uint8 arrays or tensors, (batch, 3, R, R) for one view
# or (batch, views, 3, R, R). One that is asked for may lie where the one before did.
Batches = Iterator[Sequence[Any]]


class Size(NamedTuple):
    """Views of one size and one policy."""

    views: int
    side: int
    policy: ViewPolicy


@dataclass(frozen=True)
class Workload:
    """The same images as a beton file and as a folder of JPEG files, and what to make of each."""

    beton: Path
    folder: Path
    sizes: tuple[Size, ...]
    workers: int
    batch_size: int
