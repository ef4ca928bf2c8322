"""Losses and heads against the authors' formulas in float64, and against lightly where it is installed."""

import copy

import pytest
import torch
from torch import nn

from ffssl.errors import UserError
from ffssl.methods import METHODS, build_method
from ffssl.methods.simclr import nt_xent
from ffssl.methods.simsiam import negative_cosine


class TinyBackbone(nn.Module):
    features = 24

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * 4 * 4, self.features)

    def forward(self, images):
        return self.layer(images.flatten(1)).relu()


def build(name, **options):
    torch.manual_seed(0)
    return build_method(name, TinyBackbone(), options)


def random_pair(n, d, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, generator=generator).to(dtype) for _ in range(2)]


def simclr_by_the_paper(z1, z2, temperature):
    """SimCLR, algorithm 1, by loops. Views 2k-1 and 2k of the paper are here z1[k] and z2[k]."""
    z = [row for pair in zip(z1, z2) for row in pair]
    s = [[torch.dot(a, b) / (a.norm() * b.norm()) for b in z] for a in z]

    def loss(i, j):
        others = sum(torch.exp(s[i][k] / temperature) for k in range(len(z)) if k != i)
        return -torch.log(torch.exp(s[i][j] / temperature) / others)

    return sum(loss(2 * k, 2 * k + 1) + loss(2 * k + 1, 2 * k) for k in range(len(z1))) / len(z)


def simsiam_by_the_paper(p1, p2, z1, z2):
    """SimSiam, algorithm 1."""

    def D(p, z):
        z = z.detach()
        return -(p / p.norm(dim=1, keepdim=True) * (z / z.norm(dim=1, keepdim=True))).sum(1).mean()

    return D(p1, z2) / 2 + D(p2, z1) / 2


@pytest.mark.parametrize("n, temperature", [(1, 0.1), (2, 0.5), (9, 0.07), (9, 1.0)])
def test_nt_xent_and_its_gradient_are_the_papers(n, temperature):
    ours, exact = random_pair(n, 6), random_pair(n, 6, torch.float64)
    for z in (*ours, *exact):
        z.requires_grad_()
    value, expected = nt_xent(*ours, temperature), simclr_by_the_paper(*exact, temperature)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-5, rtol=1e-4)


def test_losses_are_lightlys():
    loss = pytest.importorskip("lightly.loss")
    z1, z2 = random_pair(16, 12)
    torch.testing.assert_close(nt_xent(z1, z2, 0.2), loss.NTXentLoss(temperature=0.2)(z1, z2))
    torch.testing.assert_close(negative_cosine(z1, z2), loss.NegativeCosineSimilarity()(z1, z2))


@pytest.mark.parametrize("loss", [lambda z1, z2: nt_xent(z1, z2, 0.1), negative_cosine], ids=["nt_xent", "negative_cosine"])
def test_losses_are_computed_in_float32_whatever_the_precision_around_them(loss):
    z1, z2 = random_pair(32, 64, torch.bfloat16)
    expected = loss(z1.float(), z2.float())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(z1, z2), expected, atol=1e-6, rtol=1e-6)


def test_simsiams_loss_and_every_gradient_are_the_papers_with_the_gradient_stopped_at_the_projections():
    method = build("simsiam", hidden=20, projection=12, predictor=5)
    exact = copy.deepcopy(method).double()
    views = torch.randn(2, 10, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    value, projections = method.loss(*views)
    value.backward()
    z = [exact.projector(exact.backbone(view)) for view in views.double()]
    p = [exact.predictor(zi) for zi in z]
    expected = simsiam_by_the_paper(*p, *z)
    expected.backward()
    torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(projections.double(), z[0], atol=1e-4, rtol=1e-4)
    for (name, a), b in zip(method.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=2e-5, rtol=1e-3, msg=name)
    assert method.backbone.layer.weight.grad.abs().max() > 1e-3  # that the comparison is not of zeros


def test_simclrs_loss_is_the_papers_on_its_projections():
    method = build("simclr", hidden=20, projection=12, temperature=0.3)
    exact = copy.deepcopy(method).double()
    views = torch.randn(2, 6, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    value, projections = method.loss(*views)
    z = [exact.projector(exact.backbone(view)) for view in views.double()]
    torch.testing.assert_close(value.double(), simclr_by_the_paper(*z, 0.3), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(projections.double(), z[0], atol=1e-4, rtol=1e-4)


class WideBackbone(nn.Identity):
    features = 2048


def layers_of(head):
    return [
        (type(layer).__name__, layer.in_features, layer.out_features, layer.bias is not None)
        if isinstance(layer, nn.Linear)
        else (type(layer).__name__, getattr(layer, "affine", None))
        for layer in head
    ]


def test_simsiams_heads_are_the_official_codes():
    method = build_method("simsiam", WideBackbone(), {})
    norm, relu = ("BatchNorm1d", True), ("ReLU", None)
    linear = ("Linear", 2048, 2048, False)
    assert layers_of(method.projector) == [linear, norm, relu, linear, norm, relu, linear, ("BatchNorm1d", False)]
    assert layers_of(method.predictor) == [("Linear", 2048, 512, False), norm, relu, ("Linear", 512, 2048, True)]
    count = sum(p.numel() for head in (method.projector, method.predictor) for p in head.parameters())
    assert count == 3 * 2048**2 + 2 * 2 * 2048 + 2048 * 512 + 2 * 512 + 512 * 2048 + 2048


def test_heads_compute_what_lightlys_do():
    heads = pytest.importorskip("lightly.models.modules")
    simsiam, simclr = build_method("simsiam", WideBackbone(), {}), build_method("simclr", WideBackbone(), {})
    for ours, theirs in (
        (simsiam.projector, heads.SimSiamProjectionHead(2048, 2048, 2048)),
        (simsiam.predictor, heads.SimSiamPredictionHead(2048, 512, 2048)),
        (simclr.projector, heads.SimCLRProjectionHead(2048, 2048, 128)),
    ):
        theirs.layers.load_state_dict(ours.state_dict())
        features = torch.randn(4, 2048, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(ours(features), theirs(features))


@pytest.mark.parametrize("constant", [True, False])
def test_only_simsiams_predictor_may_keep_its_learning_rate_and_all_parameters_decay(constant):
    method = build("simsiam", constant_predictor_lr=constant)
    groups = method.parameter_groups(0.01)
    held = [p for group in groups if group.get("constant_lr") for p in group["params"]]
    assert {id(p) for p in held} == ({id(p) for p in method.predictor.parameters()} if constant else set())
    assert all(group["weight_decay"] == 0.01 for group in groups)


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_is_in_one_group(name):
    method = build(name)
    grouped = [id(p) for group in method.parameter_groups(0.01) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in method.parameters())


def test_simclr_does_not_decay_biases_and_normalisation():
    method = build("simclr")
    rate = {id(p): group["weight_decay"] for group in method.parameter_groups(0.01) for p in group["params"]}
    for module in method.modules():
        for name, parameter in module.named_parameters(recurse=False):
            assert rate[id(parameter)] == (0.01 if isinstance(module, nn.Linear) and name == "weight" else 0)


def test_unknown_methods_and_options_are_named():
    with pytest.raises(UserError, match="'simsim'.*simsiam, simclr"):
        build("simsim")
    with pytest.raises(UserError, match=r"method\.temperature: simsiam"):
        build("simsiam", temperature=0.1)
    assert build("simsiam", temperature=None, hidden=7).projector[0].out_features == 7
