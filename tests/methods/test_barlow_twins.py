import copy

import pytest
import torch
from support.small_methods import (
    WideBackbone,
    assert_same_gradients,
    assert_same_value_and_gradients,
    build,
    pair,
    randoms,
    views,
)
from torch import nn

from ffssl.methods import build_method
from ffssl.methods.barlow_twins import redundancy_reduction


def barlow_twins_by_the_paper(z1, z2, weight, eps=0.0):
    """Barlow Twins, eqs. 1 and 2, by loops over the dimensions."""
    z1, z2 = ((z - z.mean(0)) / (z.var(0, unbiased=False) + eps).sqrt() for z in (z1, z2))
    loss = 0.0
    for i in range(z1.shape[1]):
        for j in range(z1.shape[1]):
            c = torch.dot(z1[:, i], z2[:, j]) / len(z1)
            loss = loss + ((1 - c) ** 2 if i == j else weight * c**2)
    return loss


def normalised(z):
    return (z - z.mean(0)) / z.std(0, unbiased=False)


def test_loss_and_its_gradient_are_the_papers():
    ours, exact = (
        [z.requires_grad_() for z in pair(15, 6, dtype)] for dtype in (torch.float32, torch.float64)
    )
    value = redundancy_reduction(*map(normalised, ours), 0.3)
    assert_same_value_and_gradients(ours, exact, value, barlow_twins_by_the_paper(*exact, 0.3))


def test_loss_and_its_gradient_are_lightlys():
    lightly = pytest.importorskip("lightly.loss").BarlowTwinsLoss(lambda_param=0.0051)
    norm = build("barlow_twins").norm
    ours, theirs = ([z.requires_grad_() for z in pair(32, 12)] for _ in range(2))
    assert_same_value_and_gradients(
        ours, theirs, redundancy_reduction(norm(ours[0]), norm(ours[1]), 0.0051), lightly(*theirs)
    )


def test_the_methods_loss_and_every_gradient_are_the_papers():
    method = build("barlow_twins", redundancy=0.1)
    exact = copy.deepcopy(method).double()
    value, projections = method.loss(*views(n=40))
    value.backward()
    z = [exact.projector(exact.backbone(view)) for view in views(n=40).double()]
    expected = barlow_twins_by_the_paper(*z, 0.1, eps=1e-5)
    expected.backward()
    torch.testing.assert_close(value.double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(projections.double(), z[0], atol=1e-4, rtol=1e-4)
    assert_same_gradients(method, exact, atol=5e-4, rtol=1e-2)
    assert method.backbone.layer.weight.grad.abs().max() > 0.01


def test_defaults_and_projector_are_the_official_codes():
    heads = pytest.importorskip("lightly.models.modules")
    with torch.device("meta"):
        method = build_method("barlow_twins", WideBackbone(), {})
    assert method.redundancy == 0.0051 and not method.norm.affine
    assert [
        (x.in_features, x.out_features, x.bias)
        for x in method.projector
        if isinstance(x, nn.Linear)
    ] == [
        (2048, 8192, None),
        (8192, 8192, None),
        (8192, 8192, None),
    ]
    ours = build_method("barlow_twins", WideBackbone(), {"hidden": 64, "projection": 32}).projector
    theirs = heads.BarlowTwinsProjectionHead(2048, 64, 32)
    # Lightly's last layer has a bias.
    theirs.layers.load_state_dict(ours.state_dict() | {"6.bias": torch.zeros(32)})
    torch.testing.assert_close(ours(randoms(4, 2048)), theirs(randoms(4, 2048)))
