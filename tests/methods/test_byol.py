import copy

import pytest
import torch
from support.small_methods import (
    WideBackbone,
    assert_same_gradients,
    build,
    pair,
    randoms,
    unlike_the_student,
    views,
)
from torch import nn

from ffssl.methods import build_method


def byol_by_the_paper(p1, p2, t1, t2):
    """BYOL, eq. 2 and the symmetric loss below it: squared distances of the normalised vectors,
    both directions added.
    """

    def regression(p, t):
        return sum(((a / a.norm() - b / b.norm()) ** 2).sum() for a, b in zip(p, t)) / len(p)

    return regression(p1, t2) + regression(p2, t1)


def test_loss_and_every_gradient_are_the_papers_and_none_reaches_the_teacher():
    method = unlike_the_student(build("byol"))
    exact = copy.deepcopy(method).double()
    value, projections = method.loss(*views())
    value.backward()
    z = [exact.projector(exact.backbone(view)) for view in views().double()]
    p = [exact.predictor(zi) for zi in z]
    t = [
        exact.teacher.layers[1](exact.teacher.layers[0](view)).detach() for view in views().double()
    ]
    expected = byol_by_the_paper(*p, *t)
    expected.backward()
    torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(projections.double(), z[0], atol=1e-4, rtol=1e-4)
    assert_same_gradients(method, exact)
    assert method.backbone.layer.weight.grad.abs().max() > 1e-3


def test_loss_is_lightlys():
    lightly = pytest.importorskip("lightly.loss").NegativeCosineSimilarity()
    p, t = pair(16, 12)
    torch.testing.assert_close(
        build("byol").distances(p[:, None], t[:, None]).mean(), 2 + 2 * lightly(p, t)
    )


def test_heads_are_the_official_codes():
    method = build_method("byol", WideBackbone(), {})
    for head, inputs in ((method.projector, 2048), (method.predictor, 256)):
        first, norm, relu, last = head
        assert (first.in_features, first.out_features, first.bias is not None) == (
            inputs,
            4096,
            True,
        )
        assert isinstance(norm, nn.BatchNorm1d) and norm.affine and isinstance(relu, nn.ReLU)
        assert (last.in_features, last.out_features, last.bias) == (4096, 256, None)


def test_heads_compute_what_lightlys_do_but_for_the_biases_of_the_official_code():
    heads = pytest.importorskip("lightly.models.modules")
    method = build_method("byol", WideBackbone(), {})
    for ours, theirs, inputs in (
        (method.projector, heads.BYOLProjectionHead(2048, 4096, 256), 2048),
        (method.predictor, heads.BYOLPredictionHead(256, 4096, 256), 256),
    ):
        state = {key: value for key, value in ours.state_dict().items() if key != "0.bias"}
        theirs.layers.load_state_dict(state | {"3.bias": torch.zeros(256)})
        nn.init.zeros_(ours[0].bias)
        torch.testing.assert_close(ours(randoms(4, inputs)), theirs(randoms(4, inputs)))
