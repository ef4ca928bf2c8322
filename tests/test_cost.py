"""FLOPs against numbers known from elsewhere: published ones, and the paper's tables."""

import functools
from pathlib import Path

import pytest
from torch import nn

from ffssl.backbones import build_backbone
from ffssl.config import read_options
from ffssl.cost import step_flops
from ffssl.methods import build_method
from ffssl.methods.base import Method
from ffssl.plan import Plan

CONFIGS = Path(__file__).parent.parent / "rn50_configs"
IMAGENETTE, IMAGENET = 9469, 1_281_167


class BackboneAlone(Method):
    def project(self, images):
        return self.backbone(images)

    def loss(self, first, second):
        z = self.backbone(first)
        return self.backbone(second).mean(), z


@functools.cache
def build(name, backbone):
    return build_method(name, build_backbone(backbone), {})


def simsiam(backbone):
    return build("simsiam", backbone)


@pytest.mark.parametrize("name, forward", [("resnet50", 8.174e9), ("resnet18", 3.627e9)])
def test_forward_pass_of_a_backbone_costs_what_is_known(name, forward):
    method = BackboneAlone(build_backbone(name))
    assert step_flops(method, batch_size=2, resolution=224, backward=0) == pytest.approx(2 * 2 * forward, rel=0.005)


def test_a_linear_layer_costs_two_flops_a_weight():
    class Linear(BackboneAlone):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 10)))

    assert step_flops(Linear(), batch_size=7, resolution=4, backward=0) == 2 * 7 * 2 * 48 * 10


def test_a_step_is_a_forward_pass_its_gradient_and_the_selection_pass():
    options = {"batch_size": 4, "resolution": 64}
    method = simsiam("resnet18")
    forward = step_flops(method, backward=0, **options)
    assert step_flops(method, backward=1, **options) == 2 * forward
    assert step_flops(method, **options) == 3 * forward
    predictor = 2 * 2 * 2048 * 512  # runs in the loss, not in the selection pass
    cosine = 2 * 2048  # of a prediction and a target, or of two projections
    one_view = (forward - 4 * 4 * cosine) // 8 - predictor
    for resolution in (64, 128):  # a selection pass never enlarges the views
        hard = step_flops(method, views=6, hard_augment={"select": "hard", "resolution": resolution}, **options)
        assert hard == 3 * forward + 4 * (6 * one_view + 6 * 6 * cosine)


@pytest.mark.parametrize("name, heads", [("byol", 1.005), ("mocov2plus", 1.005), ("dino", 1.01)])
def test_a_teacher_costs_a_forward_pass_whatever_a_backward_pass_counts(name, heads):
    backbone = 8.174e9
    for backward in (0, 1, 2):
        flops = step_flops(build(name, "resnet50"), batch_size=2, resolution=224, backward=backward) / 2
        assert 1 <= flops / (2 * backbone * (1 + backward) + 2 * backbone) < heads


def test_each_low_resolution_pass_is_counted_where_it_is_run():
    flops = {
        (name, tuple(options.items())): step_flops(build(name, "resnet18"), batch_size=2, resolution=224, views=6, hard_augment=options)
        for name in ("simsiam", "byol")
        for options in (
            {}, {"select": "random"}, {"select": "hard"}, {"select": "hard", "loss": "method"}, {"select": "hard", "extra_targets": True},
            {"select": "hard", "loss": "method", "extra_targets": True}, {"select": "random", "extra_targets": True},
        )
    }  # fmt: skip
    small = 3.627e9 * (64 / 224) ** 2
    for name, views in (("simsiam", (0, 0, 6, 6, 6, 6, 4)), ("byol", (0, 0, 6, 12, 10, 12, 4))):
        plain, *others = [cost for (method, _), cost in flops.items() if method == name]
        passes = [(cost - plain) / 2 / small for cost in (plain, *others)]
        assert passes == pytest.approx(views, rel=0.09, abs=0.01)  # heads do not shrink


@pytest.mark.parametrize("heads, tolerance", [(False, 1e-3), (True, 0.04)])  # the paper leaves out the heads, which do not shrink
def test_hard_augments_overhead_is_the_papers(heads, tolerance):
    method = simsiam("resnet50") if heads else BackboneAlone(simsiam("resnet18").backbone)
    plain = step_flops(method, batch_size=2, resolution=224)
    for views, overhead in ((6, 0.0816),) if heads else ((4, 0.0544), (5, 0.0680), (6, 0.0816), (8, 0.1088)):
        hard = step_flops(method, batch_size=2, resolution=224, views=views, hard_augment={"select": "hard", "resolution": 64})
        assert hard / plain - 1 == pytest.approx(overhead, rel=tolerance)


@pytest.mark.parametrize(
    "name, backbone, images, epochs, petaflops",
    [
        ("simsiam", "resnet50", IMAGENETTE, 800, 248.6), ("simclr", "resnet50", IMAGENETTE, 800, 247.7),
        ("simsiam", "resnet50", IMAGENET, 200, 8408), ("simsiam", "resnet18", IMAGENET, 200, 3742),
        ("byol", "resnet50", IMAGENETTE, 800, 371.5), ("mocov2plus", "resnet50", IMAGENETTE, 800, 371.5), ("dino", "resnet50", IMAGENETTE, 800, 372),
    ],
)  # fmt: skip
def test_totals_by_the_papers_count_are_its_tables(name, backbone, images, epochs, petaflops):
    total = step_flops(build(name, backbone), batch_size=2, resolution=224, backward=1) / 2 * images * epochs
    assert total / 1e15 == pytest.approx(petaflops, rel=0.006)


@pytest.mark.parametrize("name", ["simsiam", "mocov2plus"])
def test_counting_leaves_the_method_as_it_was(name):
    method = build(name, "resnet18").eval()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    step_flops(method, batch_size=2, resolution=64, views=3, hard_augment={"select": "hard", "resolution": 32})
    assert not method.training
    assert all((before[name] == value).all() and value.device.type == "cpu" for name, value in method.state_dict().items())


def total_flops(config):
    options = read_options(["--config", str(CONFIGS / config), "--data.train=x", "--run.folder=x"])
    plan = Plan(options, steps_per_epoch=1)
    sides = [plan.resolution(epoch) for epoch in range(options.training.epochs)]
    method = BackboneAlone(simsiam("resnet18").backbone)  # the ratio is that of any ResNet; heads would make it 0.6 % less
    cost = {
        side: step_flops(method, batch_size=2, resolution=side, views=options.augment.views, hard_augment=vars(options.hard_augment))
        for side in set(sides)
    }
    return sum(cost[side] for side in sides)


def test_the_efficient_recipe_on_imagenette_saves_what_the_design_states():
    assert total_flops("imagenette_baseline.yaml") / total_flops("imagenette_efficient.yaml") == pytest.approx(2.356, abs=5e-4)
