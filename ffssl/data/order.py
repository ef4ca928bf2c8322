"""The order in which an epoch visits the samples, and each rank's share of it."""

import numpy as np


def epoch_order(samples: int, *, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """Indices (int64) in the order in which all ranks together visit them in `epoch`."""
    return (
        np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(samples)
        if shuffle
        else np.arange(samples)
    )


def rank_part(order: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The part of an epoch's order that `rank` visits.

    The samples are dealt out one by one, so that batches of n on each rank, and equal parts of
    them, are together the batch of n * world_size, and its parts, of one process. The ranks' shares
    are disjoint and of equal length: the epoch leaves out up to world_size - 1 samples, others each
    time.
    """
    return order[rank : len(order) - len(order) % world_size : world_size]
