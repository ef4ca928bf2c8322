import copy

import pytest
import torch
from support.small_methods import (
    WideBackbone,
    assert_same_value_and_gradients,
    build,
    jointly,
    pair,
    randoms,
    views,
)

from ffssl.hard_augment import pairs
from ffssl.methods import build_method
from ffssl.methods.base import cosines
from ffssl.methods.simclr import nt_xent, nt_xent_of_pairs


def terms_by_the_paper(z1, z2, temperature):
    """SimCLR, algorithm 1, by loops: l(2k-1, 2k) and l(2k, 2k-1) of each image.

    Views 2k-1 and 2k of the paper are here z1[k], z2[k].
    """
    z = [row for pair in zip(z1, z2) for row in pair]
    s = [[torch.dot(a, b) / (a.norm() * b.norm()) for b in z] for a in z]

    def loss(i, j):
        others = sum(torch.exp(s[i][k] / temperature) for k in range(len(z)) if k != i)
        return -torch.log(torch.exp(s[i][j] / temperature) / others)

    return [(loss(2 * k, 2 * k + 1), loss(2 * k + 1, 2 * k)) for k in range(len(z1))]


def simclr_by_the_paper(z1, z2, temperature):
    return sum(a + b for a, b in terms_by_the_paper(z1, z2, temperature)) / (2 * len(z1))


@pytest.mark.parametrize("n, temperature", [(2, 0.5), (9, 0.07), (9, 1.0)])
def test_nt_xent_and_its_gradient_are_the_papers(n, temperature):
    ours, exact = (
        [z.requires_grad_() for z in pair(n, 6, dtype)] for dtype in (torch.float32, torch.float64)
    )
    value, expected = nt_xent(*ours, temperature), simclr_by_the_paper(*exact, temperature)
    assert_same_value_and_gradients(ours, exact, value, expected, rtol=1e-3)


def test_nt_xent_of_one_image_is_zero():
    assert nt_xent(*pair(1, 6), 0.1).item() == pytest.approx(0, abs=1e-6)


def test_nt_xent_and_its_gradient_are_lightlys():
    lightly = pytest.importorskip("lightly.loss").NTXentLoss(temperature=0.2)
    ours, theirs = ([z.requires_grad_() for z in pair(16, 12)] for _ in range(2))
    assert_same_value_and_gradients(ours, theirs, nt_xent(*ours, 0.2), lightly(*theirs))


def test_nt_xent_is_computed_in_float32_whatever_the_precision_around_it():
    z1, z2 = pair(32, 64, torch.bfloat16)
    expected = nt_xent(z1.float(), z2.float(), 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(nt_xent(z1, z2, 0.1), expected, atol=1e-6, rtol=1e-6)


def test_loss_is_the_papers_on_its_projections():
    method = build("simclr", temperature=0.3)
    exact = copy.deepcopy(method).double()
    value, projections = method.loss(*views())
    z = jointly(lambda images: exact.projector(exact.backbone(images)), views().double())
    torch.testing.assert_close(value.double(), simclr_by_the_paper(*z, 0.3), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(projections.double(), z[0], atol=1e-4, rtol=1e-4)


def test_nt_xent_of_pairs_holds_the_papers_terms_of_every_image_and_pair():
    z = randoms(5, 4, 6)
    losses = nt_xent_of_pairs(z, 0.2)
    assert losses.shape == (5, 4, 4)
    for i in range(4):
        for j in range(4):
            if i != j:
                terms = terms_by_the_paper(z[:, i].double(), z[:, j].double(), 0.2)
                torch.testing.assert_close(
                    losses[:, i, j].double(),
                    torch.stack([(a + b) / 2 for a, b in terms]),
                    atol=1e-5,
                    rtol=1e-5,
                )


def test_the_projector_computes_what_lightlys_does():
    heads = pytest.importorskip("lightly.models.modules")
    ours, theirs = (
        build_method("simclr", WideBackbone(), {}).projector,
        heads.SimCLRProjectionHead(2048, 2048, 128),
    )
    theirs.layers.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(randoms(4, 2048)), theirs(randoms(4, 2048)))


def test_the_cosine_ranks_the_pairs_of_an_image_as_the_loss_does():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 1, 32, generator=generator)
    z = images + 0.8 * torch.randn(64, 6, 32, generator=generator)
    candidates = pairs(6)
    by_loss, by_cosine = (
        losses[:, candidates[:, 0], candidates[:, 1]]
        for losses in (nt_xent_of_pairs(z, 0.2), -cosines(z, z))
    )
    chosen = by_cosine.argmax(1)
    assert (chosen == by_loss.argmax(1)).float().mean() > 0.8
    mean, hardest = by_loss.mean(), by_loss.max(1).values.mean()
    assert by_loss.gather(1, chosen[:, None]).mean() - mean > 0.98 * (hardest - mean)
