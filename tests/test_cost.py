"""FLOPs against numbers known from elsewhere: published ones, and the paper's tables."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.options import NETWORK
from support.printed_tables import rows_of
from torch import nn

from ffssl.backbones import build_backbone
from ffssl.config import read_options
from ffssl.config.command_line import exit_status
from ffssl.cost import __main__ as program
from ffssl.cost import count_flops, count_step
from ffssl.cost.paper import HA, agrees, figures, full_epochs, ours_of, paper_table
from ffssl.cost.runs import IMAGES, RunCosts, petaflop
from ffssl.data.convert.conversion import convert
from ffssl.data.convert.sources.embedded import Embedded
from ffssl.errors import UserError
from ffssl.hard_augment import Selection
from ffssl.methods import build_method
from ffssl.methods.base import Method
from ffssl.training.run_schedule import RunSchedule, StepShape

CONFIGS = Path(__file__).parent.parent / "rn50_configs"
IMAGENETTE, IMAGENET = IMAGES["imagenette"], IMAGES["imagenet"]


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
    assert count_step(method, StepShape(224, 2), batch_size=2).total(0) == pytest.approx(
        2 * 2 * forward, rel=0.005
    )


def tiny_vit_forward(side, share):
    """FLOPs of an image through a ViT-Ti/16 that drops a share of the patches, by hand."""
    width, patches = 192, (side // 16) ** 2
    tokens = 1 + int(patches * (1 - share))
    attention = 2 * 2 * tokens * tokens * width
    weights = (3 + 1 + 4 + 4) * width * width
    return 2 * patches * 3 * 16 * 16 * width + 12 * (2 * tokens * weights + attention)


def tiny_vit(share):
    with torch.device("meta"):
        return build_backbone("vit_tiny_patch16_224", patch_drop=share)


@pytest.mark.parametrize("side, share", [(224, 0.5), (96, 0.3)])
def test_patches_that_are_dropped_cost_their_embedding_alone(side, share):
    positions = (
        2 * (side // 16) ** 2 * 14 * 14 * 192 if side != 224 else 0
    )  # resampled, once a pass
    counted = count_step(BackboneAlone(tiny_vit(share)), StepShape(side, 2), batch_size=3).total(0)
    assert counted == 2 * (3 * tiny_vit_forward(side, share) + positions)


def test_a_teacher_and_the_selection_cost_as_much_where_the_student_drops_patches():
    flops = {}
    for share in (0, 0.5):
        with torch.device("meta"):
            method = build_method("byol", tiny_vit(share), {})
        shape, selection = StepShape(224, 4), Selection("hard", 64, "method")
        flops[share] = count_step(method, shape, batch_size=2, selection=selection)
    assert flops[0.5].teacher == flops[0].teacher > 0
    assert flops[0.5].selection == flops[0].selection > 0
    saved = tiny_vit_forward(224, 0) - tiny_vit_forward(224, 0.5)
    assert flops[0].forward - flops[0.5].forward == 2 * 2 * saved


def test_a_linear_layer_costs_two_flops_a_weight():
    class Linear(BackboneAlone):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 10)))

    assert count_step(Linear(), StepShape(4, 2), batch_size=7).total(0) == 2 * 7 * 2 * 48 * 10


def test_a_step_is_a_forward_pass_its_gradient_and_the_selection_pass():
    method = simsiam("resnet18")
    plain = count_step(method, StepShape(64, 2), batch_size=4)
    forward = plain.total(0)
    assert (plain.total(1), plain.total()) == (2 * forward, 3 * forward)
    predictor = 2 * 2 * 2048 * 512
    cosine = 2 * 2048  # of a prediction and a target, or of two projections
    one_view = (forward - 4 * 4 * cosine) // 8
    for resolution in (64, 128):  # a selection pass never enlarges the views
        for loss, of_a_view in (("method", one_view), ("cosine", one_view - predictor)):
            selection = Selection("hard", resolution, loss)
            hard = count_step(method, StepShape(64, 6), batch_size=4, selection=selection).total()
            assert hard == 3 * forward + 4 * (6 * of_a_view + 6 * 6 * cosine)


@pytest.mark.parametrize("name", ["simclr", "byol", "dino"])
def test_local_views_cost_the_students_forward_and_backward_pass_at_their_own_side(name):
    method = build(name, "resnet18")
    plain, multi_crop, small = (
        count_step(method, shape, batch_size=2)
        for shape in (StepShape(128, 2), StepShape(128, 2, 64, 6), StepShape(64, 2))
    )
    assert multi_crop.teacher == plain.teacher and multi_crop.selection == 0
    assert multi_crop.forward == pytest.approx(plain.forward + 6 / 2 * small.forward, rel=1e-3)
    hard = count_step(
        method, StepShape(128, 4, 64, 6), batch_size=2, selection=Selection("hard", 64)
    )
    assert (hard.forward, hard.teacher) == (multi_crop.forward, multi_crop.teacher)
    alone = count_step(method, StepShape(128, 4), batch_size=2, selection=Selection("hard", 64))
    assert hard.selection == alone.selection > 0  # among global views alone


@pytest.mark.parametrize("name, heads", [("byol", 1.005), ("mocov2plus", 1.005), ("dino", 1.01)])
def test_a_teacher_costs_a_forward_pass_whatever_a_backward_pass_counts(name, heads):
    backbone = 8.174e9
    flops = count_step(build(name, "resnet50"), StepShape(224, 2), batch_size=2)
    for backward in (0, 1, 2):
        assert (
            1 <= flops.total(backward) / 2 / (2 * backbone * (1 + backward) + 2 * backbone) < heads
        )


def test_each_low_resolution_pass_is_counted_where_it_is_run():
    hard, random = Selection("hard", loss="cosine"), Selection("random")
    by_loss = Selection("hard", loss="method")
    selections = (
        Selection(),
        random,
        hard,
        by_loss,
        replace(hard, extra_targets=True),
        replace(by_loss, extra_targets=True),
        replace(random, extra_targets=True),
        Selection("hard"),  # by default a teacher's views are the student's
    )
    flops = {}
    for name in ("simsiam", "byol"):
        method = build(name, "resnet18")
        for selection in selections:
            step = count_step(method, StepShape(224, 6), batch_size=2, selection=selection)
            flops[name, selection] = step.total()
    small = 3.627e9 * (64 / 224) ** 2
    for name, views in (
        ("simsiam", (0, 0, 6, 6, 6, 6, 4, 6)),
        ("byol", (0, 0, 6, 12, 10, 12, 4, 6)),
    ):
        plain, *others = [cost for (method, _), cost in flops.items() if method == name]
        passes = [(cost - plain) / 2 / small for cost in (plain, *others)]
        assert passes == pytest.approx(views, rel=0.09, abs=0.01)  # heads do not shrink


# The paper leaves out the heads, which do not shrink.
@pytest.mark.parametrize("heads, tolerance", [(False, 1e-3), (True, 0.04)])
def test_hard_augments_overhead_is_the_papers(heads, tolerance):
    method = simsiam("resnet50") if heads else BackboneAlone(simsiam("resnet18").backbone)
    plain = count_step(method, StepShape(224, 2), batch_size=2).total()
    for views, overhead in (
        ((6, 0.0816),) if heads else ((4, 0.0544), (5, 0.0680), (6, 0.0816), (8, 0.1088))
    ):
        selection = Selection("hard", 64, "cosine")
        hard = count_step(method, StepShape(224, views), batch_size=2, selection=selection).total()
        assert hard / plain - 1 == pytest.approx(overhead, rel=tolerance)


@pytest.mark.parametrize(
    "name, backbone, images, epochs, petaflops",
    [
        ("simsiam", "resnet50", IMAGENETTE, 800, 248.6),
        ("simclr", "resnet50", IMAGENETTE, 800, 247.7),
        ("simsiam", "resnet50", IMAGENET, 200, 8408),
        ("simsiam", "resnet18", IMAGENET, 200, 3742),
        ("byol", "resnet50", IMAGENETTE, 800, 371.5),
        ("mocov2plus", "resnet50", IMAGENETTE, 800, 371.5),
        ("dino", "resnet50", IMAGENETTE, 800, 372),
    ],
)
def test_totals_by_the_papers_count_are_its_tables(name, backbone, images, epochs, petaflops):
    total = (
        count_step(build(name, backbone), StepShape(224, 2), batch_size=2).total(1)
        / 2
        * images
        * epochs
    )
    assert total / 1e15 == pytest.approx(petaflops, rel=0.006)


@pytest.mark.parametrize("name", ["simsiam", "mocov2plus"])
def test_counting_leaves_the_method_as_it_was(name):
    method = build(name, "resnet18").eval()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    count_step(method, StepShape(64, 3), batch_size=2, selection=Selection("hard", 32))
    assert not method.training
    assert all(
        (before[name] == value).all() and value.device.type == "cpu"
        for name, value in method.state_dict().items()
    )


def options_of(config, *overrides):
    return read_options(
        [f"--config={CONFIGS / config}.yaml", *overrides],
        defaults={"data.train": "", "run.folder": ""},
    )


def test_the_efficient_recipe_on_imagenette_saves_what_the_design_states():
    runs = [options_of("imagenette_baseline"), options_of("imagenette_efficient", *HA)]
    # The ratio is that of any ResNet; heads would make it 0.6 % less.
    backbone = BackboneAlone(simsiam("resnet18").backbone)
    totals = []
    for options in runs:
        schedule = RunSchedule(options, steps_per_epoch=1)
        per_step = count_flops(schedule, backbone)
        totals.append(
            sum(per_step[schedule.shape(epoch)] for epoch in range(options.training.epochs))
            / options.training.batch_size
        )
    assert totals[0] / totals[1] == pytest.approx(2.356, abs=5e-4)
    assert full_epochs(runs[0]) / full_epochs(runs[1]) == pytest.approx(2.356, abs=5e-4)


def test_the_stages_of_efficient_plus_cost_as_much_as_super_progressive_learning():
    costs = RunCosts()
    spl, stages = (
        petaflop(costs.stages(options_of(name)), IMAGES["imagenet"])
        for name in ("efficient", "efficient_plus")
    )
    assert stages == pytest.approx(spl, rel=0.005)


def test_a_step_is_told_apart_by_what_it_is_for():
    options = {"batch_size": 4, "selection": Selection("hard", 64, "cosine")}
    shape = StepShape(128, 6)
    image = 3.627e9 * (64 / 224) ** 2
    byol, student_only = (
        count_step(method, shape, **options)
        for method in (build("byol", "resnet18"), simsiam("resnet18"))
    )
    for flops in (byol, student_only):
        assert flops.forward == pytest.approx(4 * 2 * 4 * image, rel=0.05)  # heads do not shrink
        assert flops.selection == pytest.approx(4 * 6 * image, rel=0.1)
        assert (
            flops.total(1)
            == flops.total() - flops.forward
            == 2 * flops.forward + flops.teacher + flops.selection
        )
    assert student_only.teacher == 0
    # It has no predictor.
    assert (
        byol.teacher == pytest.approx(4 * 2 * 4 * image, rel=0.05) and byol.teacher < byol.forward
    )


def test_the_total_of_a_run_is_what_training_counts():
    costs, options = RunCosts(), options_of("demo_efficient", *NETWORK)
    stages = costs.stages(options)
    assert [(stage.shape, stage.epochs) for stage in stages] == [
        (StepShape(48, 2), 1),
        (StepShape(32, 4), 4),
        (StepShape(48, 4), 3),
    ]
    method = build_method(
        "simclr",
        build_backbone("resnet-small"),
        {"hidden": 32, "projection": 16, "temperature": 0.2},
    )
    schedule = RunSchedule(options, steps_per_epoch=62)
    per_step = count_flops(schedule, method)
    assert petaflop(stages, 62 * 64) * 1e15 == pytest.approx(
        sum(62 * per_step[schedule.shape(epoch)] for epoch in range(8))
    )
    assert costs.stages(options) == stages


@pytest.mark.parametrize(
    "change",
    [
        "--method.hidden=16",
        "--augment.views=5",
        "--hard_augment.resolution=16",
        "--hard_augment.select=random",
        "--augment.local_views=2",
        "--training.batch_size=128",
    ],
)
def test_what_was_counted_is_not_taken_for_another_run(change):
    costs, changed = RunCosts(), options_of("demo_efficient", *NETWORK, change)
    before = costs.stages(options_of("demo_efficient", *NETWORK))
    assert costs.stages(changed) == RunCosts().stages(changed) != before


# By table, in the order of `figures`; worked out by hand from the equations
EQUATIONS = {
    "1": [None, 2.487, None, 2.487],
    "2": [None, 2.356, None, 2.426, None, 2.356, None, 2.426, None, 2.426],
    "3": [1.667, 1.541, 2.663, 1.541, 2.356],
    "6": [1.424, 1.598, 1.786],
    "8": [5.44, 6.80, 8.16, 10.88],
}


def check(tables, costs):
    for table in tables:
        rows = [figure for figure in figures() if figure.table == table]
        assert len(rows) == len(EQUATIONS[table])
        for figure, by_equations in zip(rows, EQUATIONS[table]):
            ours = ours_of(figure, costs)
            assert ours[2] == (
                by_equations
                and pytest.approx(by_equations, abs=6e-4 if figure.unit == "x" else 6e-3)
            ), figure
            assert any(agrees(value, figure) for value in ours if value is not None) != bool(
                figure.reason
            ), (figure, ours)


def test_the_papers_table_3_is_ours_but_for_what_is_named():
    check(["3"], RunCosts())


@pytest.mark.slow
def test_the_papers_figures_are_ours_but_for_those_that_are_named():
    costs = RunCosts()
    check(EQUATIONS, costs)
    _, *rows = rows_of(paper_table(costs))
    assert len(rows) == len(list(figures()))
    assert all(("*" in "".join(row)) != bool(row[-1]) for row in rows)


def test_the_program_prints_stages_totals_and_speed_ups(capsys, monkeypatch):
    configs = [str(CONFIGS / f"demo_{recipe}.yaml") for recipe in ("baseline", "efficient")]
    monkeypatch.setattr("sys.argv", ["cost", *configs, "--images=3968", *NETWORK])
    program.main()
    out = capsys.readouterr().out
    assert "demo_efficient: simclr, resnet-small, 8 epochs of 3,968 images" in out
    *rows, _, baseline, efficient = rows_of(out)
    stages = [" ".join(row[:3]) for row in rows if row[0] != "resolution"]
    # Resolution, views, epochs: pairs are chosen after the warm-up.
    assert stages == ["48 2 15", "48 2 1", "32 4 4", "48 4 3"]
    costs = [
        petaflop(RunCosts().stages(options_of(f"demo_{recipe}", *NETWORK)), 3968)
        for recipe in ("baseline", "efficient")
    ]
    assert baseline[2] == "1.00x" and efficient[2] == f"{costs[0] / costs[1]:.2f}x"
    assert float(efficient[1]) == pytest.approx(costs[1], abs=5e-5)  # four decimals are printed


def test_the_number_of_images_comes_from_a_name_a_number_or_the_file(tmp_path):
    convert(Embedded("train", 12), tmp_path / "train.beton")
    assert program.number_of_images(None, tmp_path / "train.beton") == 12
    assert program.number_of_images("7", "missing.beton") == 7
    assert program.number_of_images("imagenet", "") == 1_281_167
    for images in ("many", "0", "-3"):
        with pytest.raises(
            UserError, match="--images: expected a number, imagenet or imagenette, got"
        ):
            program.number_of_images(images, "")
    with pytest.raises(UserError, match="--images: how many"):
        program.number_of_images(None, "")


@pytest.mark.parametrize(
    "words, message",
    [
        (["missing.yaml", "--images=3"], "missing.yaml: the config can't be read"),
        (
            [str(CONFIGS / "demo_baseline.yaml"), "--images=3", "--training.epoch=3"],
            "did you mean training.epochs?",
        ),
    ],
)
def test_mistakes_cost_one_line(words, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["cost", *words])
    assert exit_status(program.main) == 2
    assert message in capsys.readouterr().err
