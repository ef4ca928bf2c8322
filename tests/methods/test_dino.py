import copy

import pytest
import torch
from support.small_methods import (
    WideBackbone,
    assert_same_gradients,
    assert_same_value_and_gradients,
    build,
    jointly,
    pair,
    randoms,
    train_a_step,
    unlike_the_student,
    views,
)
from torch.nn import functional as F

from ffssl.methods import build_method
from ffssl.methods.base import Progress


def dino_by_the_paper(student, teacher, centre, student_temperature, teacher_temperature):
    """DINO, algorithm 1: H(t1, s2) / 2 + H(t2, s1) / 2, by loops.

    student, teacher: the two views' outputs.
    """

    def H(t, s):
        total = 0.0
        for t_row, s_row in zip(t, s):
            target = torch.exp((t_row - centre) / teacher_temperature)
            prediction = torch.exp(s_row / student_temperature)
            total = total - (target / target.sum() * torch.log(prediction / prediction.sum())).sum()
        return total / len(t)

    return H(teacher[0], student[1]) / 2 + H(teacher[1], student[0]) / 2


def with_a_centre(method):
    method.centre += 0.1 * randoms(*method.centre.shape)
    return unlike_the_student(method)


def test_loss_and_every_gradient_are_the_papers_and_none_reaches_the_teacher():
    method = with_a_centre(build("dino", temperature=0.2, teacher_temperature=0.07))
    exact = copy.deepcopy(method).double()
    value, projections = method.loss(*views())
    value.backward()
    z = jointly(lambda images: exact.projector(exact.backbone(images)), views().double())
    expected = dino_by_the_paper(
        [exact.last_layer(zi) for zi in z],
        jointly(exact.teacher, views().double()),
        exact.centre,
        0.2,
        0.07,
    )
    expected.backward()
    torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(projections.double(), z[0], atol=1e-4, rtol=1e-4)
    assert_same_gradients(method, exact, without=("teacher.", "original0"))
    assert method.backbone.layer.weight.grad.abs().max() > 1e-4


def test_cross_entropy_gradient_and_centre_are_lightlys():
    lightly = pytest.importorskip("lightly.loss").DINOLoss(
        output_dim=30, student_temp=0.1, teacher_temp=0.05, center_momentum=0.9
    )
    method = build("dino", teacher_temperature=0.05)
    (ours,), (theirs,) = ([randoms(2, 8, 30).requires_grad_()] for _ in range(2))
    for step in range(3):  # the first with the centre at zero
        teacher = randoms(2, 8, 30, seed=step + 1)
        distances = method.distances(ours.transpose(0, 1), teacher.transpose(0, 1))
        value = (distances[:, 0, 1].mean() + distances[:, 1, 0].mean()) / 2
        method.remember(teacher.transpose(0, 1))
        assert_same_value_and_gradients(
            [ours], [theirs], value, lightly(list(teacher), list(theirs))
        )
        torch.testing.assert_close(method.centre, lightly.center.flatten())


def test_the_centre_averages_the_teachers_outputs_and_counts_a_step_later():
    method = with_a_centre(build("dino"))
    centre = method.centre.double()
    for step in range(3):
        before = copy.deepcopy(method).double()
        outputs = torch.cat(jointly(before.teacher, views(seed=step).double()))
        value, _ = method.loss(*views(seed=step))
        student = jointly(
            lambda images: before.last_layer(before.projector(before.backbone(images))),
            views(seed=step).double(),
        )
        torch.testing.assert_close(
            value.double(),
            dino_by_the_paper(student, outputs.chunk(2), centre, 0.1, 0.04),
            atol=1e-4,
            rtol=1e-4,
        )
        centre = 0.9 * centre + 0.1 * outputs.mean(0)
        torch.testing.assert_close(method.centre.double(), centre, atol=1e-5, rtol=1e-5)


def test_the_last_layer_is_left_alone_for_the_first_epoch():
    method = build("dino", frozen_epochs=2)
    weight = method.last_layer.parametrizations.weight
    optimizer = torch.optim.SGD(method.parameter_groups(0.1), lr=0.1, momentum=0.9)
    start, backbone = (
        weight.original1.detach().clone(),
        method.backbone.layer.weight.detach().clone(),
    )
    for epoch in range(3):
        assert torch.equal(weight.original1, start)
        progress = Progress(epoch, 3, epoch)
        method.before_step(progress)
        loss, _ = method(*views(seed=epoch))
        optimizer.zero_grad()
        loss.backward()
        method.after_backward(progress)
        optimizer.step()
    assert not torch.equal(weight.original1, start)
    assert not torch.equal(method.backbone.layer.weight, backbone)


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_prototypes_keep_length_1_if_norm_last_layer(norm_last_layer):
    method = build("dino", norm_last_layer=norm_last_layer, frozen_epochs=0)
    torch.testing.assert_close(method.last_layer.weight.norm(dim=1), torch.ones(30))
    assert len([p for p in method.last_layer.parameters() if p.requires_grad]) == (
        1 if norm_last_layer else 2
    )
    for step in range(2):
        train_a_step(method, Progress(step, 2, epoch=1), seed=step)
    lengths = method.last_layer.weight.norm(dim=1)
    assert torch.allclose(lengths, torch.ones(30), atol=1e-5) == norm_last_layer


def test_the_teachers_temperature_warms_up_linearly_by_the_epoch():
    method = build("dino", teacher_temperature=0.07, teacher_temperature_epochs=4)
    seen = []
    for epoch in range(6):
        method.before_step(Progress(epoch, 6, epoch))
        seen.append(method.teacher_temperature.item())
    # Numpy's linspace, as the authors'.
    assert seen == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    method.before_step(Progress(0, 6, 0))
    assert method.teacher_temperature.item() == pytest.approx(0.04)
    assert build("dino").teacher_temperature.item() == pytest.approx(0.04)


@pytest.mark.parametrize("head_norm", [False, True])
def test_the_head_computes_what_lightlys_does(head_norm):
    heads = pytest.importorskip("lightly.models.modules")
    method = build_method("dino", WideBackbone(), {"prototypes": 100, "head_norm": head_norm})
    theirs = heads.DINOProjectionHead(2048, 2048, 256, 100, batch_norm=head_norm)
    # With biases before BatchNorm, as the authors have it, which are without effect.
    ours = method.projector.state_dict()
    theirs.layers.load_state_dict({key: ours[key] for key in theirs.layers.state_dict()})
    with torch.no_grad():
        theirs.last_layer.weight_v.copy_(method.last_layer.parametrizations.weight.original1)
        theirs.last_layer.weight_g.copy_(method.last_layer.parametrizations.weight.original0)
    features = randoms(4, 2048)
    torch.testing.assert_close(method.predict(method.project(features)), theirs(features))
    torch.testing.assert_close(method.project(features).norm(dim=1), torch.ones(4))


def test_the_heads_initial_weights_are_the_authors():
    layers = build_method("dino", WideBackbone(), {"prototypes": 100}).projector[:-1:2]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [
        (2048, 2048),
        (2048, 2048),
        (2048, 256),
    ]
    for layer in layers:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02) and not layer.bias.any()


def test_cross_entropy_is_computed_in_float32_whatever_the_precision_around_it():
    method = build("dino")
    p, t = (10 * x for x in pair(8, 30, torch.bfloat16))
    expected = method.distances(p[:, None].float(), t[:, None].float())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(method.distances(p[:, None], t[:, None]), expected)


def test_identical_views_cost_the_entropy_of_the_assignment():
    method = build("dino", temperature=0.04)
    t = randoms(6, 1, 30)
    q = F.softmax(t / 0.04, dim=-1)
    torch.testing.assert_close(
        method.distances(t, t).flatten(),
        -(q * q.clamp_min(1e-30).log()).sum(-1).flatten(),
        atol=1e-5,
        rtol=1e-4,
    )
