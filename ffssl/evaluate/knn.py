"""Weighted k-nearest-neighbour classification on frozen features (Wu et al. 2018), in blocks that
keep to a given memory.
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
    """Predicted labels, int64 (Q,), where the queries are.

    bank: (N, d) features, bank_labels: int64 (N,), any numbers, queries: (Q, d). Features are
    L2-normalised here, in float32; each of the k nearest votes with weight exp(cosine /
    temperature); k is cut to N. Of equal votes the smallest label wins. memory: bytes taken at most
    besides the arguments, the result and what libraries hold. ValueError where even single vectors
    need more. device: where to compute, by default where the bank is. Bank and queries may be
    anywhere and of any float type: they go there, and become float32, block by block.
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
    """Cosines (q, k) of unit vectors (q, d) and the k nearest of the bank, in no order, and the
    labels (q, k) of these.
    """
    cosines, labels = (
        queries.new_empty(len(queries), 0),
        bank_labels.new_empty(len(queries), 0, device=queries.device),
    )
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
    """How many queries and how many vectors of the bank to compare at once.

    ValueError where `memory` (bytes) is too little for one of each.
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
    """Share (0..1) of the queries whose label `knn_predict` finds."""
    return (
        (knn_predict(bank, bank_labels, queries, **options) == query_labels).float().mean().item()
    )
