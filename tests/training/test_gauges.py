import copy
import math

import numpy as np
import pytest
import torch
from test_hard_augment import build, uint8_views, without_dropout
from torch.nn import functional as F

from ffssl.data.normalise import to_input
from ffssl.hard_augment import Selection, choose_views, random_pairs
from ffssl.methods import METHODS
from ffssl.training.gauges import (
    STEPS_BETWEEN,
    effective_rank,
    hardness,
    is_due,
    predictor_cosine,
)


def test_the_effective_rank_is_that_of_its_definition():
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((40, 12), (12, 40)):
        z = torch.randn(rows, columns, generator=generator)
        singular = torch.linalg.svdvals(z.double())
        shares = singular / singular.sum()
        expected = math.exp(-sum(p * math.log(p) for p in shares.tolist()))
        assert effective_rank(z) == pytest.approx(expected, rel=1e-6)


def test_the_effective_rank_of_k_equal_directions_is_k():
    basis = torch.linalg.qr(torch.randn(16, 5, generator=torch.Generator().manual_seed(0)))[0].T
    assert effective_rank(basis.repeat(8, 1)) == pytest.approx(5, rel=1e-6)
    assert effective_rank(torch.ones(30, 16)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_effective_rank_of_numbers_that_are_not_finite_is_none(value):
    z = torch.ones(30, 16)
    z[3, 5] = value
    assert math.isnan(effective_rank(z))


@pytest.mark.parametrize("steps", [1, 2, 10, 62, 63, 64, 65, 200, 2500])
def test_an_epoch_is_measured_once_in_so_many_steps_and_at_least_once(steps):
    due = [step for step in range(steps) if is_due(step, steps)]
    assert 1 <= len(due) <= max(1, math.ceil(steps / STEPS_BETWEEN))
    assert all(b - a == STEPS_BETWEEN for a, b in zip(due, due[1:]))


@pytest.mark.parametrize("name", METHODS)
def test_the_hardness_is_the_difference_of_the_losses_of_chosen_and_random_pairs(name):
    method = without_dropout(build(name)).eval()  # where views do not depend on their batch
    views = uint8_views(9, 4, 3, 32, 32)
    selection = Selection("hard", 16)
    chosen = choose_views(method, views, selection)
    found, variance = hardness(method, views, chosen, selection, seed=5)
    drawn = random_pairs(9, 4, torch.Generator().manual_seed(5))
    every = to_input(views.flatten(0, 1)).unflatten(0, (9, 4))
    differences = []
    for i in range(4):  # half of the images
        random = [every[i : i + 1, view] for view in drawn[i].tolist()]
        hard = [view[i : i + 1] for view in chosen]
        if name in ("simclr", "barlow_twins", "vicreg"):  # whose loss is among a batch
            continue
        losses = [copy.deepcopy(method).loss(*pair)[0].item() for pair in (hard, random)]
        differences.append(losses[0] - losses[1])
    if differences:
        assert found.item() == pytest.approx(np.mean(differences), abs=1e-5)
        assert variance.item() == pytest.approx(np.var(differences, ddof=1) / 4, abs=1e-6)
    assert torch.isfinite(torch.stack([found, variance])).all()


@pytest.mark.parametrize("name", METHODS)
def test_measuring_leaves_no_trace(name):
    method = build(name)
    views = uint8_views(8, 4, 3, 32, 32)
    pair = choose_views(method, views)
    before, random_state = copy.deepcopy(method.state_dict()), torch.get_rng_state()
    hardness(method, views, pair, Selection("hard", 16), seed=5)
    predictor_cosine(method, torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(before[key], value) for key, value in method.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(p.grad is None for p in method.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_the_predictors_cosine_is_of_a_projection_and_its_own_prediction(name):
    method = without_dropout(build(name))
    z = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    found = predictor_cosine(method, z)
    if name not in ("simsiam", "byol"):
        assert found is None
        return
    expected = F.cosine_similarity(copy.deepcopy(method).predictor(z), z).mean()
    torch.testing.assert_close(found, expected.detach())
