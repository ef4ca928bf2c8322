"""Small networks and random tensors for the tests of the methods."""

import torch
from torch import nn

from ffssl.methods import build_method

WIDTHS = {"hidden": 20, "projection": 12}
OPTIONS = {
    "simsiam": {**WIDTHS, "predictor": 5},
    "byol": {**WIDTHS, "predictor": 9},
    "simclr": WIDTHS,
    "mocov2plus": {**WIDTHS, "queue": 40},
    "dino": {**WIDTHS, "prototypes": 30},
    "barlow_twins": WIDTHS,
    "vicreg": WIDTHS,
}
WITH_TEACHER = ["byol", "mocov2plus", "dino"]


class TinyBackbone(nn.Module):
    features = 24

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * 4 * 4, self.features)
        self.norm = nn.BatchNorm1d(self.features)

    def forward(self, images):
        return self.norm(self.layer(images.flatten(1))).relu()


class WideBackbone(nn.Identity):
    features = 2048


def build(name, **options):
    torch.manual_seed(0)
    return build_method(name, TinyBackbone(), OPTIONS.get(name, {}) | options)


def randoms(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair(n, d, dtype=torch.float32, seed=0):
    return [z.clone() for z in randoms(2, n, d, seed=seed, dtype=dtype)]


def views(n=10, seed=1):
    return randoms(2, n, 3, 4, 4, seed=seed)


def unlike_the_student(method):
    """With a teacher that differs from the student, as after some steps."""
    with torch.no_grad():
        for i, p in enumerate(method.teacher.parameters()):
            p += 0.1 * randoms(*p.shape, seed=i)
    return method


def jointly(network, views):
    """What a network makes of both views (2, N, ...), passed as one batch: (N, d) each."""
    return network(views.flatten(0, 1)).chunk(2)


def train_a_step(method, progress, seed, n=10):
    """A step of plain SGD at 0.1, as the training loop takes it."""
    method.before_step(progress)
    loss, _ = method(*views(n, seed))
    method.zero_grad()
    loss.backward()
    method.after_backward(progress)
    with torch.no_grad():
        for p in method.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
    method.after_step(progress)
    return loss.detach()


def assert_same_gradients(method, exact, *, without=("teacher.",), atol=2e-5, rtol=1e-3):
    """Of all parameters, but for those with such a part in their names, which have none.

    exact: a copy of the method in float64.
    """
    for (name, a), b in zip(method.named_parameters(), exact.parameters(), strict=True):
        if any(part in name for part in without):
            assert a.grad is None
        else:
            torch.testing.assert_close(a.grad.double(), b.grad, atol=atol, rtol=rtol, msg=name)


def assert_same_value_and_gradients(ours, exact, value, expected, rtol=1e-4):
    """value and expected are computed from the lists of tensors `ours` (float32) and `exact`
    (float64).
    """
    gradients, expected_gradients = (
        torch.autograd.grad(value, ours),
        torch.autograd.grad(expected, exact),
    )
    torch.testing.assert_close(value.double(), expected.double(), atol=1e-5, rtol=1e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=1e-6, rtol=rtol)
        assert b.abs().max() > 1e-4  # that the comparison is not of zeros
