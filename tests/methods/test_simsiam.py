import copy

import pytest
import torch
from support.small_methods import WideBackbone, assert_same_gradients, build, pair, views
from torch import nn

from ffssl.methods import build_method
from ffssl.methods.base import cosines


def simsiam_by_the_paper(p1, p2, z1, z2):
    """SimSiam, algorithm 1."""

    def D(p, z):
        z = z.detach()
        return -(p / p.norm(dim=1, keepdim=True) * (z / z.norm(dim=1, keepdim=True))).sum(1).mean()

    return D(p1, z2) / 2 + D(p2, z1) / 2


def test_loss_and_gradients_are_the_papers_with_stopped_projections():
    method = build("simsiam")
    exact = copy.deepcopy(method).double()
    value, projections = method.loss(*views())
    value.backward()
    z = [exact.projector(exact.backbone(view)) for view in views().double()]
    p = [exact.predictor(zi) for zi in z]
    expected = simsiam_by_the_paper(*p, *z)
    expected.backward()
    torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(projections.double(), z[0], atol=1e-4, rtol=1e-4)
    assert_same_gradients(method, exact)
    # That the comparison is not of zeros.
    assert method.backbone.layer.weight.grad.abs().max() > 1e-3


def test_loss_is_lightlys():
    lightly = pytest.importorskip("lightly.loss").NegativeCosineSimilarity()
    p, z = pair(16, 12)
    distances = build("simsiam").distances(p[:, None], z[:, None])
    torch.testing.assert_close(distances.mean(), lightly(p, z))


def test_cosines_are_computed_in_float32_whatever_the_precision_around_them():
    a, b = pair(32, 64, torch.bfloat16)
    expected = cosines(a.float(), b.float())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(cosines(a, b), expected, atol=1e-6, rtol=1e-6)


def layers_of(head):
    return [
        (type(layer).__name__, layer.in_features, layer.out_features, layer.bias is not None)
        if isinstance(layer, nn.Linear)
        else (type(layer).__name__, getattr(layer, "affine", None))
        for layer in head
    ]


def test_heads_are_the_official_codes():
    method = build_method("simsiam", WideBackbone(), {})
    norm, relu = ("BatchNorm1d", True), ("ReLU", None)
    linear = ("Linear", 2048, 2048, False)
    assert layers_of(method.projector) == [
        linear,
        norm,
        relu,
        linear,
        norm,
        relu,
        linear,
        ("BatchNorm1d", False),
    ]
    assert layers_of(method.predictor) == [
        ("Linear", 2048, 512, False),
        norm,
        relu,
        ("Linear", 512, 2048, True),
    ]
    count = sum(
        p.numel() for head in (method.projector, method.predictor) for p in head.parameters()
    )
    assert count == 3 * 2048**2 + 2 * 2 * 2048 + 2048 * 512 + 2 * 512 + 512 * 2048 + 2048


def test_heads_compute_what_lightlys_do():
    heads = pytest.importorskip("lightly.models.modules")
    method = build_method("simsiam", WideBackbone(), {})
    features = torch.randn(4, 2048, generator=torch.Generator().manual_seed(0))
    for ours, theirs in (
        (method.projector, heads.SimSiamProjectionHead(2048, 2048, 2048)),
        (method.predictor, heads.SimSiamPredictionHead(2048, 512, 2048)),
    ):
        theirs.layers.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(features), theirs(features))


@pytest.mark.parametrize("constant", [True, False])
def test_only_the_predictor_may_keep_its_learning_rate_and_all_parameters_decay(constant):
    method = build("simsiam", constant_predictor_lr=constant)
    groups = method.parameter_groups(0.01)
    held = [p for group in groups if group.get("constant_lr") for p in group["params"]]
    assert {id(p) for p in held} == (
        {id(p) for p in method.predictor.parameters()} if constant else set()
    )
    assert all(group["weight_decay"] == 0.01 for group in groups)
