"""The teachers of BYOL, MoCo and DINO."""

import copy
import math

import pytest
import torch
from support.small_methods import WITH_TEACHER, build, train_a_step, views
from torch import nn

from ffssl.methods.base import Progress
from ffssl.methods.teacher import Teacher


def parameters(modules):
    return [p for module in modules for p in module.parameters()]


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_it_starts_as_a_copy_of_the_student(name):
    method = build(name)
    pairs = list(zip(parameters(method.student()), method.teacher.parameters(), strict=True))
    assert pairs and all(
        torch.equal(s, t) and s is not t and s.data_ptr() != t.data_ptr() for s, t in pairs
    )


@pytest.mark.parametrize(
    "name, start, end", [("byol", 0.996, 1.0), ("dino", 0.996, 1.0), ("mocov2plus", 0.999, 0.999)]
)
def test_its_momentum_is_the_authors_at_every_step(name, start, end):
    method = build(name)
    for step in range(11):
        expected = end - (end - start) * (math.cos(math.pi * step / 10) + 1) / 2
        assert method.momentum(Progress(step, 10, epoch=0)) == pytest.approx(expected, abs=1e-12)
    assert method.momentum(Progress(0, 10, 0)) == pytest.approx(start) and method.momentum(
        Progress(10, 10, 0)
    ) == pytest.approx(end)


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_after_each_of_three_steps_it_is_the_average_by_hand(name):
    method = build(name, teacher_momentum=0.5, teacher_momentum_end=0.9)
    average = [p.detach().double() for p in method.teacher.parameters()]
    for step in range(3):
        progress = Progress(step, 3, epoch=5)
        train_a_step(method, progress, seed=step)
        m = 0.9 - 0.4 * (math.cos(math.pi * step / 3) + 1) / 2
        average = [
            m * t + (1 - m) * s.detach().double()
            for t, s in zip(average, parameters(method.student()), strict=True)
        ]
        for t, expected in zip(method.teacher.parameters(), average, strict=True):
            torch.testing.assert_close(t.double(), expected, atol=1e-6, rtol=1e-5)
    moved = max(
        (t - s).abs().max()
        for t, s in zip(method.teacher.parameters(), parameters(method.student()))
    )
    assert moved > 1e-3  # the student went on


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", WITH_TEACHER)
def test_its_batchnorm_normalises_by_the_batch_and_keeps_its_own_statistics(name, joint):
    method = build(name)
    method.joint_views = joint
    norm, students = method.teacher.layers[0].norm, method.backbone.norm
    with torch.no_grad():
        method.teacher.layers[0].layer.weight.mul_(3)
    first, second = views()
    seen = [method.teacher.layers[0].layer(view.flatten(1)).detach() for view in (first, second)]
    mean = (
        0.1 * torch.cat(seen).mean(0)
        if joint
        else 0.9 * (0.1 * seen[0].mean(0)) + 0.1 * seen[1].mean(0)
    )
    method(first, second)
    torch.testing.assert_close(norm.running_mean, mean)
    assert not torch.allclose(norm.running_mean, students.running_mean)
    kept = norm.running_mean.clone()
    method.after_step(Progress(0, 10, 0))
    assert torch.equal(norm.running_mean, kept)


def test_dropout_is_off_and_batchnorm_follows_the_methods_mode():
    teacher = Teacher(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)))
    images = torch.randn(6, 4)
    for mode in (True, False):
        model = nn.ModuleList([teacher]).train(mode)
        assert [m.training for m in model[0].layers[0]] == [False, mode, False]
        assert torch.equal(copy.deepcopy(teacher)(images), copy.deepcopy(teacher)(images))
