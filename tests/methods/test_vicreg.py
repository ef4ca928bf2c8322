import pytest
import torch
from support.small_methods import (
    WideBackbone,
    assert_same_value_and_gradients,
    build,
    pair,
    randoms,
    views,
)
from torch import nn

from ffssl.methods import build_method
from ffssl.methods.vicreg import vicreg


def vicreg_by_the_paper(z1, z2, invariance, variance, covariance):
    """VICReg, eqs. 1 to 6, by loops, with the official code's means over dimensions in the
    invariance and halves in the variance term.
    """
    n, d = z1.shape
    agreement = sum(((a - b) ** 2).sum() for a, b in zip(z1, z2)) / (n * d)
    v = c = 0.0
    for z in (z1, z2):
        z = z - sum(z) / n
        for i in range(d):
            v = v + torch.relu(1 - ((z[:, i] ** 2).sum() / (n - 1) + 1e-4).sqrt()) / d
            for j in range(d):
                if i != j:
                    c = c + (torch.dot(z[:, i], z[:, j]) / (n - 1)) ** 2 / d
    return invariance * agreement + variance * v / 2 + covariance * c


@pytest.mark.parametrize("weights", [(25, 25, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_loss_and_its_gradient_are_the_papers(weights):
    ours, exact = (
        [(0.9 * z).requires_grad_() for z in pair(15, 6, dtype)]
        for dtype in (torch.float32, torch.float64)
    )
    assert_same_value_and_gradients(
        ours, exact, vicreg(*ours, *weights), vicreg_by_the_paper(*exact, *weights)
    )


def test_loss_and_its_gradient_are_lightlys():
    lightly = pytest.importorskip("lightly.loss").VICRegLoss()
    ours, theirs = ([(0.9 * z).requires_grad_() for z in pair(32, 12)] for _ in range(2))
    assert_same_value_and_gradients(ours, theirs, vicreg(*ours, 25, 25, 1), lightly(*theirs))


def test_the_methods_loss_is_the_papers_on_its_projections():
    method = build("vicreg").eval()
    assert method.weights == (25, 25, 1)
    value, projections = method.loss(*views())
    z = [method.project(view) for view in views()]
    torch.testing.assert_close(
        value.double(),
        vicreg_by_the_paper(*(zi.double() for zi in z), 25, 25, 1),
        atol=1e-4,
        rtol=1e-5,
    )
    assert torch.equal(projections, z[0])


def test_a_collapse_costs_the_whole_variance_term():
    z = torch.ones(8, 6)
    torch.testing.assert_close(vicreg(z, z, 25, 25, 1), torch.tensor(25 * 0.99))


def test_expander_is_the_official_codes():
    heads = pytest.importorskip("lightly.models.modules.heads")
    with torch.device("meta"):
        method = build_method("vicreg", WideBackbone(), {})
    assert [
        (x.in_features, x.out_features, x.bias is not None)
        for x in method.projector
        if isinstance(x, nn.Linear)
    ] == [
        (2048, 8192, True),
        (8192, 8192, True),
        (8192, 8192, False),
    ]
    ours, theirs = (
        build_method("vicreg", WideBackbone(), {"hidden": 64, "projection": 32}).projector,
        heads.VICRegProjectionHead(2048, 64, 32),
    )
    state = {
        key: value for key, value in ours.state_dict().items() if key not in ("0.bias", "3.bias")
    }
    # Lightly has its biases the other way round; BatchNorm removes ours.
    theirs.layers.load_state_dict(state | {"6.bias": torch.zeros(32)})
    torch.testing.assert_close(
        ours(randoms(4, 2048)), theirs(randoms(4, 2048)), atol=1e-5, rtol=1e-4
    )
