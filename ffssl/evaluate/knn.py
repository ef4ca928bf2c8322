"""Weighted k-nearest-neighbour classification on frozen features (Wu et al. 2018).

It works in blocks, and keeps to a given amount of memory.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

MEMORY = 1 << 30


@torch.no_grad()
def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
    memory: int = MEMORY,
    device: torch.device | None = None,
) -> Tensor:
    """Return the predicted labels, int64 (Q,), on the device of the queries.

    Features are L2-normalised here, in float32. Each of the k nearest votes with weight exp(cosine
    / temperature). Of equal votes the smallest label wins.

    bank: (N, d) features. bank_labels: int64 (N,), any numbers. queries: (Q, d). Bank and queries
    may be on any devices and of any float type: they are moved and become float32 block by block.
    k: cut to N. device: where to compute, by default where the bank is. memory: the most bytes to
    take, besides the arguments, the result and what libraries hold. Raise ValueError if even single
    vectors need more.
    """
    device = device or bank.device
    # Sorted: a column for each class, whatever its number.
    known, bank_labels = bank_labels.unique(return_inverse=True)
    known, classes, k = known.to(queries.device), len(known), min(k, len(bank))
    query_block, bank_block = block_sizes(
        memory, queries=len(queries), bank=len(bank), width=bank.shape[1], k=k, classes=classes
    )
    predictions = []
    for part in queries.split(query_block):
        cosines, labels = _nearest(
            F.normalize(part.to(device, torch.float32), dim=1), bank, bank_labels, k, bank_block
        )
        # Relative to the nearest: neither over- nor underflows.
        weights = ((cosines - cosines.amax(1, keepdim=True)) / temperature).exp()
        votes = torch.zeros(len(part), classes, device=device).scatter_add_(1, labels, weights)
        predictions.append(known[votes.argmax(1).to(queries.device)])
    return torch.cat(predictions)


def _nearest(
    queries: Tensor, bank: Tensor, bank_labels: Tensor, k: int, block: int
) -> tuple[Tensor, Tensor]:
    """Return the cosines (q, k) of the k nearest of the bank, and their labels (q, k).

    They are in no order. queries: unit vectors (q, d).
    """
    cosines = queries.new_empty(len(queries), 0)
    labels = bank_labels.new_empty(len(queries), 0, device=queries.device)
    for vectors, vector_labels in zip(bank.split(block), bank_labels.split(block)):
        found, where = _topk(
            queries @ F.normalize(vectors.to(queries.device, torch.float32), dim=1).T, k
        )
        cosines = torch.cat([cosines, found], 1)
        labels = torch.cat([labels, vector_labels.to(queries.device)[where]], 1)
        cosines, where = _topk(cosines, k)
        labels = labels.gather(1, where)
    return cosines, labels


def _topk(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return similarity.topk(min(k, similarity.shape[1]), dim=1, sorted=False)


def block_sizes(
    memory: int, *, queries: int, bank: int, width: int, k: int, classes: int
) -> tuple[int, int]:
    """Return how many queries and how many vectors of the bank to compare at once.

    Raise ValueError if `memory` (bytes) is too little for one of each.
    """
    float32, int64 = 4, 8
    # A vector, as a copy and normalised. A query's k best, twice: with those of a block, joined,
    # and chosen from.
    per_query = 2 * width * float32 + 2 * 3 * k * (float32 + int64) + classes * float32
    # topk sorts a row of (cosine, index) in each thread; the vector's label.
    per_vector = 2 * width * float32 + 2 * torch.get_num_threads() * int64 + int64
    least = per_query + per_vector + float32
    if memory < least:
        raise ValueError(
            f"memory: {memory} bytes are too little for vectors of {width} numbers and k = "
            f"{k}; they need {least}"
        )
    query_block = max(1, min(queries, memory // 2 // per_query))
    bank_block = max(
        1, min(bank, (memory - query_block * per_query) // (per_vector + query_block * float32))
    )
    return query_block, bank_block


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, **options
) -> float:
    """Return the share (0..1) of the queries that `knn_predict` labels rightly."""
    from torchmetrics.functional.classification import multiclass_accuracy  # takes seconds

    predicted = knn_predict(bank, bank_labels, queries, **options)
    # Labels are any numbers. The micro average asks only which are equal, not how many there are.
    micro = {"num_classes": 1, "average": "micro", "validate_args": False}
    return multiclass_accuracy(predicted, query_labels, **micro).item()
