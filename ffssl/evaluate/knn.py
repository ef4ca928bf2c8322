"""Weighted k-nearest-neighbour classification on frozen features (Wu et al. 2018), in blocks."""

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def knn_predict(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, k: int = 200, temperature: float = 0.1, classes: int | None = None, block: int = 1024
) -> Tensor:
    """Predicted labels, int64 (Q,).

    bank: (N, d) features, bank_labels: int64 (N,) in 0..classes-1, queries: (Q, d). Features are L2-normalised here; each of the
    k nearest votes with weight exp(cosine / temperature); k is cut to N. Of equal votes the smallest label wins.
    """
    bank = F.normalize(bank.float(), dim=1)
    classes = classes or int(bank_labels.max()) + 1
    k = min(k, len(bank))
    predictions = []
    for part in queries.split(block):
        similarity, nearest = (F.normalize(part.float(), dim=1) @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(part), classes, device=part.device)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # relative to the nearest: neither over- nor underflows
        votes.scatter_add_(1, bank_labels[nearest], weights)
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, **options) -> float:
    """Share (0..1) of the queries whose label `knn_predict` finds."""
    return (knn_predict(bank, bank_labels, queries, **options) == query_labels).float().mean().item()
