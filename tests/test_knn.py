import math

import pytest
import torch

from ffssl.evaluate.knn import knn_accuracy, knn_predict


def data(n=60, queries=25, d=8, classes=5):
    generator = torch.Generator().manual_seed(0)
    bank, asked = torch.randn(n, d, generator=generator) * 3, torch.randn(queries, d, generator=generator) * 0.1
    return bank, torch.randint(classes, (n,), generator=generator), asked


def by_definition(bank, labels, queries, k, temperature):
    """Wu et al. 2018, section 3.4, one neighbour at a time in float64."""
    predictions = []
    for query in queries.double():
        cosines = [(torch.dot(query, x) / (query.norm() * x.norm())).item() for x in bank.double()]
        votes = [0.0] * (int(labels.max()) + 1)
        for i in sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]:
            votes[labels[i]] += math.exp(cosines[i] / temperature)
        predictions.append(votes.index(max(votes)))
    return predictions


@pytest.mark.parametrize("k", [1, 5, 20, 60, 200])
@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
def test_predictions_follow_the_definition(k, temperature):
    bank, labels, queries = data()
    assert knn_predict(bank, labels, queries, k=k, temperature=temperature).tolist() == by_definition(bank, labels, queries, k, temperature)


@pytest.mark.parametrize("block", [1, 7, 24, 25, 26])
def test_blocks_change_nothing(block):
    bank, labels, queries = data()
    assert torch.equal(knn_predict(bank, labels, queries, k=9, block=block), knn_predict(bank, labels, queries, k=9))


def test_a_low_temperature_does_not_overflow_and_the_nearest_decides():
    bank, labels, queries = data()
    assert torch.equal(knn_predict(bank, labels, queries, k=30, temperature=1e-3), knn_predict(bank, labels, queries, k=1))


def test_of_equal_votes_the_smallest_label_wins():
    bank = torch.tensor([[1.0, 0], [1, 0]])
    assert knn_predict(bank, torch.tensor([3, 2]), torch.tensor([[1.0, 0]]), k=2).tolist() == [2]


def test_accuracy_is_the_share_of_right_answers():
    bank, labels, queries = data()
    answers = torch.tensor(by_definition(bank, labels, queries, 10, 0.1))
    answers[:5] = (answers[:5] + 1) % 5
    assert knn_accuracy(bank, labels, queries, answers, k=10) == pytest.approx(20 / 25)
