import math

import pytest
import torch
from torch.nn import functional as F

from ffssl.errors import UserError
from ffssl.evaluate.linear import (
    Recipe,
    cached_batches,
    top_accuracies,
    train_probe,
    usual_batch_size,
)
from ffssl.run_folder import checkpoint

CPU = torch.device("cpu")


def data(n=50, d=6, classes=4):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (n,), generator=generator)
    return torch.randn(n, d, generator=generator) + 2 * F.one_hot(labels, d), labels


def probe(folder, recipe, name="linear.pt"):
    features, labels = data()
    return train_probe(
        cached_batches(features, labels, recipe),
        recipe,
        images=50,
        features=6,
        classes=4,
        device=CPU,
        folder=folder,
        name=name,
    )


def by_definition(recipe, batches, classifier):
    """Softmax regression by LARS (You et al. 2017, algorithm 1; the bias by plain SGD) with
    hand-made gradients, in float64.
    """
    (w, b), (v, u) = classifier, (torch.zeros_like(classifier[0]), torch.zeros_like(classifier[1]))
    total = recipe.epochs * math.ceil(50 / recipe.batch_size)
    steps = [batch for epoch in range(recipe.epochs) for batch in batches(epoch)]
    assert len(steps) == total
    for t, (x, y) in enumerate(steps):
        rate = recipe.learning_rate * (1 + math.cos(math.pi * t / total)) / 2
        error = ((x.double() @ w.T + b).softmax(1) - F.one_hot(y, len(w))) / len(x)
        gradient = error.T @ x.double()
        v = 0.9 * v + 0.001 * w.norm() / gradient.norm() * gradient
        u = 0.9 * u + error.sum(0)
        w, b = w - rate * v, b - rate * u
    return w, b


def test_training_is_lars_with_momentum_on_a_cosine(tmp_path):
    recipe = Recipe(epochs=4, learning_rate=5.0, batch_size=16)
    first = probe(tmp_path, Recipe(epochs=0), "none.pt")
    start = first.weight.detach().double(), first.bias.detach().double()
    trained = probe(tmp_path, recipe)
    weight, bias = by_definition(recipe, cached_batches(*data(), recipe), start)
    torch.testing.assert_close(trained.weight.detach().double(), weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(trained.bias.detach().double(), bias, rtol=1e-4, atol=1e-6)
    # So that the comparison is one.
    assert (trained.weight - first.weight).norm() > 0.02 * first.weight.norm()


def test_weights_start_small_and_differ_by_seed(tmp_path):
    a, b = (probe(tmp_path, Recipe(epochs=0, seed=seed), f"{seed}.pt") for seed in (0, 1))
    assert (
        0.005 < a.weight.std() < 0.02 and not a.bias.any() and not torch.equal(a.weight, b.weight)
    )


def test_every_image_is_visited_once_an_epoch_in_another_order():
    features, labels = torch.arange(50.0).view(50, 1), torch.arange(50)
    batches = cached_batches(features, labels, Recipe(batch_size=16))
    orders = [torch.cat([y for _, y in batches(epoch)]) for epoch in range(2)]
    assert all(order.sort().values.tolist() == list(range(50)) for order in orders)
    assert not torch.equal(*orders)
    assert all(torch.equal(x[:, 0].long(), y) for x, y in batches(1))


def test_an_interrupted_probe_ends_in_the_same_weights(tmp_path, interrupted_after):
    recipe = Recipe(epochs=5, batch_size=16, cached=True)
    unbroken = probe(tmp_path, recipe, "unbroken.pt")
    with interrupted_after(2):
        probe(tmp_path, recipe)
    assert checkpoint.load(tmp_path, name="linear.pt")["epoch"] == 2
    assert torch.equal(probe(tmp_path, recipe).weight, unbroken.weight)
    # Finished: nothing is left to train.
    assert torch.equal(probe(tmp_path, recipe).weight, unbroken.weight)


def test_a_loss_that_is_not_finite_is_told_and_spares_the_checkpoint(tmp_path):
    with pytest.raises(UserError, match="not finite in epoch .*--learning-rate below 1e\\+38"):
        probe(tmp_path, Recipe(epochs=3, learning_rate=1e38, batch_size=16))
    state = checkpoint.load(tmp_path, name="linear.pt")
    assert state is None or torch.isfinite(state["classifier"]["weight"]).all()


@pytest.mark.parametrize("classes", [3, 5, 6, 12])
def test_accuracies_are_those_of_a_sorted_list(classes):
    generator = torch.Generator().manual_seed(1)
    classifier, features = torch.nn.Linear(4, classes), torch.randn(70, 4, generator=generator)
    labels = torch.randint(classes, (70,), generator=generator)
    ranks = (-classifier(features)).argsort(1).tolist()
    share = {k: sum(y in rank[:k] for rank, y in zip(ranks, labels.tolist())) / 70 for k in (1, 5)}
    found = top_accuracies(classifier, features, labels, batch_size=16)
    assert found == {
        "top1": pytest.approx(share[1]),
        "top5": pytest.approx(share[5]) if classes > 5 else None,
    }


def test_a_small_set_has_enough_steps():
    assert usual_batch_size(1_281_167) == 2048
    assert [
        math.ceil(images / usual_batch_size(images)) for images in (131_071, 9469, 4000, 64, 3)
    ] == [65, 65, 65, 64, 3]
