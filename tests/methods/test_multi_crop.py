"""Local views: each predicts the global views of its image, and none is a target."""

import copy

import pytest
import torch
from support.small_methods import build, pair, randoms, unlike_the_student, views
from torch.nn import functional as F

from ffssl.methods import METHODS
from ffssl.methods.simclr import nt_xent, nt_xent_of_local

TAKERS = ("simsiam", "byol", "simclr", "mocov2plus", "dino")
N, LOCAL = 10, 3


def local_views():
    return randoms(N, LOCAL, 3, 4, 4, seed=5)


def test_the_methods_that_take_local_views_say_so():
    assert {name for name, method in METHODS.items() if method.takes_local_views} == {*TAKERS}


def one_pair(name, method, prediction, target):
    """The loss of one prediction (d,) against one target (d,), by the papers' formulas."""
    if name in ("simsiam", "byol"):
        cosine = prediction @ target / prediction.norm() / target.norm()
        return -cosine if name == "simsiam" else 2 - 2 * cosine
    if name == "mocov2plus":
        q, k = (v / v.norm() for v in (prediction, target))
        logits = torch.stack([q @ k, *(q @ (old / old.norm()) for old in method.queue)]) / 0.2
        return torch.log(torch.exp(logits).sum()) - logits[0]
    target = torch.exp((target - method.centre) / 0.04)
    return -(target / target.sum() * torch.log_softmax(prediction / 0.1, 0)).sum()


@pytest.mark.parametrize("name", ["simsiam", "byol", "mocov2plus", "dino"])
def test_the_loss_is_the_mean_over_all_pairs_of_a_prediction_and_another_views_target(name):
    method = build(name).eval()  # BatchNorm does not mix the images
    if hasattr(method, "teacher"):
        unlike_the_student(method)
    exact = copy.deepcopy(method).double()
    value, projections = method.loss(*views(), local=local_views())

    every = [*views().double(), *local_views().double().unbind(1)]
    with torch.no_grad():
        predictions = [exact.predict(exact.project(images)) for images in every]
        targets = [exact.targets(images) for images in every[:2]]
    terms = [
        sum(one_pair(name, exact, p, t) for p, t in zip(predictions[v], targets[iq])) / N
        for iq in range(2)
        for v in range(2 + LOCAL)
        if v != iq
    ]
    weight = 2 if name in ("byol", "mocov2plus") else 1  # these add the two directions
    assert len(terms) == 2 + 2 * LOCAL
    torch.testing.assert_close(
        value.double(), weight * sum(terms) / len(terms), atol=1e-4, rtol=1e-4
    )
    with torch.no_grad():
        torch.testing.assert_close(projections, method.project(views()[0]))


def test_dinos_loss_with_local_views_is_lightlys():
    lightly = pytest.importorskip("lightly.loss").DINOLoss(
        output_dim=30, student_temp=0.1, teacher_temp=0.04, center_momentum=0.9
    )
    method = unlike_the_student(build("dino")).eval()
    value, _ = method.loss(*views(), local=local_views())
    with torch.no_grad():
        every = [*views(), *local_views().unbind(1)]
        student = [method.predict(method.project(images)) for images in every]
        teacher = [method.teacher(images) for images in every[:2]]
    torch.testing.assert_close(value, lightly(teacher, student))
    torch.testing.assert_close(method.centre, lightly.center.flatten())


def test_simclrs_local_views_find_the_global_views_among_those_of_all_images():
    (z1, z2), z = pair(N, 12), randoms(N, LOCAL, 12, seed=3)
    value = nt_xent_of_local(z, z1, z2, 0.2)
    z, z1, z2 = (F.normalize(one.double(), dim=-1) for one in (z, z1, z2))
    terms = []
    for i in range(N):
        others = [g[j] for g in (z1, z2) for j in range(N) if j != i]
        for anchor in z[i]:
            for positive in (z1[i], z2[i]):
                logits = torch.stack([anchor @ positive, *(anchor @ g for g in others)]) / 0.2
                terms.append(-torch.log_softmax(logits, 0)[0])
    torch.testing.assert_close(value.double(), torch.stack(terms).mean(), atol=1e-5, rtol=1e-5)


def test_all_pairs_of_simclr_have_one_weight():
    method = build("simclr", temperature=0.3).eval()
    value, _ = method.loss(*views(), local=local_views())
    with torch.no_grad():
        z1, z2 = (method.project(images) for images in views())
        z = method.project(local_views().flatten(0, 1)).unflatten(0, (N, LOCAL))
        # 2 N pairs of global views, and 2 N LOCAL with a local one.
        expected = (nt_xent(z1, z2, 0.3) + LOCAL * nt_xent_of_local(z, z1, z2, 0.3)) / (1 + LOCAL)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("name", TAKERS)
def test_gradients_pass_through_the_local_views_and_the_teacher_never_sees_them(name):
    method, local = build(name), local_views().requires_grad_()
    seen = []
    if hasattr(method, "teacher"):
        method.teacher.register_forward_pre_hook(lambda _, images: seen.append(len(images[0])))
    value, _ = method(*views(), local=local)
    value.backward()
    assert (local.grad.flatten(2).abs().amax(2) > 0).all()
    assert sum(seen) == (2 * N if hasattr(method, "teacher") else 0)
    plain, _ = build(name)(*views())
    assert value != plain
