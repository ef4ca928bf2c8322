import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from ffssl.evaluate.knn import block_sizes, knn_accuracy, knn_predict


def data(n=60, queries=25, d=8, classes=5):
    generator = torch.Generator().manual_seed(0)
    bank, asked = (
        torch.randn(n, d, generator=generator) * 3,
        torch.randn(queries, d, generator=generator) * 0.1,
    )
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
    assert knn_predict(
        bank, labels, queries, k=k, temperature=temperature
    ).tolist() == by_definition(bank, labels, queries, k, temperature)


@pytest.mark.parametrize("more", [0, 100, 1000, 5000, 20_000])
def test_blocks_change_nothing(more):
    bank, labels, queries = data()
    least = 2 * 8 * 4 + 6 * 9 * 12 + 5 * 4 + 2 * 8 * 4 + 16 * torch.get_num_threads() + 8 + 4
    with pytest.raises(ValueError, match=f"memory: {least - 1} bytes .* need {least}"):
        knn_predict(bank, labels, queries, k=9, memory=least - 1)
    assert knn_predict(bank, labels, queries, k=9, memory=least + more).tolist() == by_definition(
        bank, labels, queries, 9, 0.1
    )


def test_blocks_of_imagenet_are_large_and_fit():
    queries, bank = block_sizes(
        1 << 30, queries=50_000, bank=1_281_167, width=2048, k=200, classes=1000
    )
    assert queries > 1000 and bank > 1000
    assert 4 * (2 * 2048 * (queries + bank) + queries * bank) < 1 << 30
    assert block_sizes(1 << 30, queries=10, bank=20, width=8, k=5, classes=3) == (10, 20)


def test_half_precision_costs_nothing_where_neighbours_are_told_apart():
    bank, labels, queries = data(d=64)
    half = torch.nn.functional.normalize(bank, dim=1).half()
    assert knn_predict(half, labels, queries.half(), k=5).tolist() == by_definition(
        half, labels, queries.half(), 5, 0.1
    )


def test_predictions_are_scikit_learns():
    neighbors = pytest.importorskip("sklearn.neighbors")
    bank, labels, queries = data(n=300, queries=50, d=16)
    peer = neighbors.KNeighborsClassifier(
        20,
        metric="cosine",
        algorithm="brute",
        weights=lambda distances: np.exp((1 - distances) / 0.1),
    )
    peer.fit(bank.double().numpy(), labels.numpy())
    assert (
        knn_predict(bank, labels, queries, k=20).tolist()
        == peer.predict(queries.double().numpy()).tolist()
    )


PEAK = """
import torch
from ffssl.evaluate.knn import knn_predict

def resident(kind):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(kind + ":"))

torch.manual_seed(0)
bank, labels = torch.randn(40_000, 64).half(), torch.randint(10, (40_000,))
queries = torch.randn(1500, 64)
knn_predict(bank[:500], labels[:500], queries[:100], memory=1 << 22)  # what libraries take once
before = resident("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak is counted anew
knn_predict(bank, labels, queries, memory=1 << 25)
print(resident("VmHWM") - before)
"""


def test_memory_at_its_peak_is_what_was_given():
    """Here 32 MB; the whole matrix of similarities would take 240 MB."""
    result = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    # What the product of matrices takes for itself varies with the threads.
    assert int(result.stdout) < (1 << 25) + 32e6


def test_a_low_temperature_does_not_overflow_and_the_nearest_decides():
    bank, labels, queries = data()
    assert torch.equal(
        knn_predict(bank, labels, queries, k=30, temperature=1e-3),
        knn_predict(bank, labels, queries, k=1),
    )


def test_of_equal_votes_the_smallest_label_wins():
    bank = torch.tensor([[1.0, 0], [1, 0]])
    assert knn_predict(bank, torch.tensor([3, 2]), torch.tensor([[1.0, 0]]), k=2).tolist() == [2]


def test_accuracy_is_the_share_of_right_answers():
    bank, labels, queries = data()
    answers = torch.tensor(by_definition(bank, labels, queries, 10, 0.1))
    answers[:5] = (answers[:5] + 1) % 5
    assert knn_accuracy(bank, labels, queries, answers, k=10) == pytest.approx(20 / 25)
