"""The order in which an epoch visits the samples, and each rank's part of it."""

import numpy as np


def epoch_order(samples: int, *, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """Return all indices, int64 (samples,), in the order of `epoch`, for all ranks together."""
    if not shuffle:
        return np.arange(samples)
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(samples)


def rank_part(order: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Return the part of an epoch's order that `rank` visits.

    The samples are dealt out one by one. So the ranks' batches of n are together the batch of
    n * world_size of a single process; the same holds for equal parts of a batch. All ranks' parts
    have the same length, and no sample is in two. An epoch therefore leaves out up to
    world_size - 1 samples, other ones each time.
    """
    return order[rank : len(order) - len(order) % world_size : world_size]
