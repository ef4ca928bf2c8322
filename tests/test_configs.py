"""Every config of rn50_configs, and every switch of the paper's tables, trains for some steps on
drawn images, at reduced size.
"""

from math import cos, isfinite, pi
from pathlib import Path

import pytest
import torch
from support.options import QUIET, SIDES

from ffssl.config import read_options
from ffssl.cost import count_step
from ffssl.data.convert.conversion import convert
from ffssl.data.convert.sources.embedded import Embedded
from ffssl.errors import UserError
from ffssl.methods import METHODS
from ffssl.run_folder import checkpoint
from ffssl.run_folder.log import read_log
from ffssl.train import train
from ffssl.training.build import build
from ffssl.training.run_schedule import RunSchedule, StepShape

CONFIGS = Path(__file__).resolve().parent.parent / "rn50_configs"
HEADS = {
    "simsiam": {"hidden": 32, "projection": 32, "predictor": 16},
    "byol": {"hidden": 32, "projection": 16, "predictor": 32},
    "simclr": {"hidden": 32, "projection": 16},
    "mocov2plus": {"hidden": 32, "projection": 16, "queue": 64},
    "dino": {"hidden": 32, "projection": 16, "prototypes": 64},
    "barlow_twins": {"hidden": 32, "projection": 32},
    "vicreg": {"hidden": 32, "projection": 32},
}
REDUCED = [
    "--training.batch_size=8",
    "--training.epochs=3",
    *SIDES,
    *QUIET,
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks so small are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    path = tmp_path_factory.mktemp("beton") / "train.beton"
    convert(Embedded("train", 32), path)
    return path


def run(config, beton, folder, *more):
    """The options of a reduced run and the rows of its log; of options given twice the last
    counts.
    """
    given = [f"--config={config}", f"--data.train={beton}", f"--run.folder={folder}"]
    whole = read_options(given)
    vit = whole.model.backbone.startswith("vit_")
    backbone = f"--model.backbone={'test_vit' if vit else 'resnet-small'}"
    heads = [f"--method.{name}={value}" for name, value in HEADS[whole.method.name].items()]
    stages = ["--resolution.stages=16:0.75,32:0.25"] if whole.resolution.stages else []
    options = read_options([*given, *REDUCED, backbone, *heads, *stages, *more])
    train(options)
    return options, read_log(folder)


def method_of(path):
    return read_options([f"--config={path}", "--data.train=x", "--run.folder=x"]).method.name


def test_each_method_has_a_baseline_and_an_efficient_config_on_both_datasets():
    of = {path.stem: method_of(path) for path in CONFIGS.glob("*.yaml")}
    for method in METHODS:
        prefix = "" if method == "simsiam" else f"{method}_"
        for name in (
            f"{prefix}baseline",
            f"{prefix}efficient",
            f"imagenette_{prefix}baseline",
            f"imagenette_{prefix}efficient",
        ):
            assert of[name] == method


def test_dino_and_moco_have_both_configs_with_a_vision_transformer():
    for method in ("dino", "mocov2plus"):
        for name, schedule in (("", "cosine-warmup"), ("_efficient", "f1-clr")):
            path = CONFIGS / f"{method}_vit_small{name}.yaml"
            options = read_options([f"--config={path}", "--data.train=x", "--run.folder=x"])
            assert options.method.name == method
            assert options.model.backbone == "vit_small_patch16_224"
            assert options.training.optimizer == "adamw"
            assert options.training.schedule == schedule


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_trains(path, beton, tmp_path):
    options, rows = run(path, beton, tmp_path, "--training.warmup_epochs=1")
    assert checkpoint.load(tmp_path)["epoch"] == 3
    assert len(rows) == 3 and all(
        isfinite(row["loss"]) and row["embedding_std"] > 0 for row in rows
    )
    sides = {"spl": [32, 16, 32], "stages": [16, 16, 32], "constant": [32] * 3}
    assert [row["resolution"] for row in rows] == sides[options.resolution.schedule]


# The switches of the paper, by table


STEPS, WARMUP = 12, 4  # of three epochs, and of one; the log has the last step of each epoch
# Share of the peak at steps 3, 7 and 11: eq. 8, and eq. 7 with half of the training for its
# warm-up.
ONE_CYCLE = {
    "f1-clr": [
        (1 - cos(pi * 3 / WARMUP)) / 2,
        (1 + cos(pi * 3 / 8)) / 2,
        (1 + cos(pi * 7 / 8)) / 2,
    ],
    "1-clr": [(1 - cos(pi * 3 / 6)) / 2, (1 + cos(pi * 1 / 6)) / 2, (1 + cos(pi * 5 / 6)) / 2],
}
COSINE = {
    "cosine": [(1 + cos(pi * step / STEPS)) / 2 for step in (3, 7, 11)],
    "cosine-warmup": [3 / WARMUP, (1 + cos(pi * 3 / 8)) / 2, (1 + cos(pi * 7 / 8)) / 2],
}


@pytest.mark.parametrize(
    "optimizer, schedule",
    [
        *(("sgd", schedule) for schedule in ONE_CYCLE | COSINE),
        ("lars", "f1-clr"),
        ("adamw", "f1-clr"),
    ],
)
def test_table_4_learning_rate_schedules(optimizer, schedule, beton, tmp_path):
    peak = 1e-3 if optimizer == "adamw" else 0.05
    _, rows = run(
        CONFIGS / "imagenette_baseline.yaml",
        beton,
        tmp_path,
        f"--training.schedule={schedule}",
        f"--training.optimizer={optimizer}",
        f"--training.learning_rate={peak}",
        "--training.warmup_epochs=1",
        "--training.warmup_share=0.5",
    )
    shares = (ONE_CYCLE | COSINE)[schedule]
    expected = [
        (peak * share, 0.95 - 0.1 * share if schedule in ONE_CYCLE else 0.9) for share in shares
    ]
    assert [(row["learning_rate"], row["momentum"]) for row in rows] == [
        pytest.approx(pair) for pair in expected
    ]
    groups = checkpoint.load(tmp_path)["optimizer"]["param_groups"]
    predictor = groups[-1]  # which keeps the peak, as the baseline has it
    assert predictor["lr"] == pytest.approx(peak) and groups[0]["lr"] == pytest.approx(
        expected[-1][0]
    )
    assert all(
        (group["betas"][0] if optimizer == "adamw" else group["momentum"])
        == pytest.approx(expected[-1][1])
        for group in groups
    )


@pytest.mark.parametrize("warmup, expected", [(1, [32, 16, 32]), (2, [32, 32, 16])])
def test_table_5_length_of_the_warmup(warmup, expected, beton, tmp_path):
    _, rows = run(
        CONFIGS / "imagenette_efficient.yaml", beton, tmp_path, f"--training.warmup_epochs={warmup}"
    )
    peak_at = warmup * WARMUP
    step = 4 * warmup - 1
    assert [row["resolution"] for row in rows] == expected
    assert rows[warmup - 1]["learning_rate"] == pytest.approx(
        0.1 * (1 - cos(pi * step / peak_at)) / 2
    )


@pytest.mark.parametrize(
    "switches, sides, spends",
    [
        # table 3: each lever alone, and all; what they spend in relation to training at 32 px
        # without selection
        (
            ["resolution.schedule=constant", "hard_augment.select=off", "augment.views=2"],
            [32, 32, 32],
            False,
        ),
        (["hard_augment.select=off", "augment.views=2"], [32, 16, 32], False),
        (["resolution.schedule=constant"], [32, 32, 32], True),
        ([], [32, 16, 32], True),
        (["training.schedule=cosine", "resolution.schedule=constant"], [32, 32, 32], True),
        # figure 3: plain progressive learning; spl under 1-clr, whose warm-up is a share of the
        # training
        (["resolution.schedule=progressive"], [16, 16, 32], True),
        (
            ["training.schedule=1-clr", "training.warmup_share=0.67", "training.warmup_epochs=0"],
            [32, 32, 16],
            True,
        ),
        # table 6: the smallest side; table 7: the length; table 8: positives; and the resolution of
        # the selection
        (["resolution.min=32"], [32, 32, 32], True),
        (["training.epochs=5"], [32, 16, 16, 32, 32], True),
        (["augment.views=4"], [32, 16, 32], True),
        (["augment.views=8"], [32, 16, 32], True),
        (["hard_augment.resolution=32"], [32, 16, 32], True),
        (["hard_augment.select=random"], [32, 16, 32], False),
    ],
)
def test_tables_3_and_6_to_8_and_figure_3(switches, sides, spends, beton, tmp_path):
    overrides = [f"--{switch}" for switch in switches]
    options, rows = run(
        CONFIGS / "imagenette_efficient.yaml",
        beton,
        tmp_path,
        "--training.warmup_epochs=1",
        *overrides,
    )
    assert [row["resolution"] for row in rows] == sides
    spent = [
        b - a for a, b in zip([0, *(row["flops"] for row in rows)], (row["flops"] for row in rows))
    ]
    plain = dict(zip((32, 16), plain_steps(options)))
    steps, warmup = 4, round(RunSchedule(options, 4).warmup_epochs)
    for epoch, (side, flops) in enumerate(zip(sides, spent)):
        selects = spends and epoch >= warmup
        assert flops > 1.01 * steps * plain[side] if selects else flops == steps * plain[side]


def plain_steps(options):
    """FLOPs of a step at 32 and 16 px without a selection."""
    method = build(options, torch.device("cpu"))
    size = options.training.batch_size
    return [count_step(method, StepShape(side, 2), batch_size=size).total() for side in (32, 16)]


@pytest.mark.parametrize("low, high", [(5, 5), (2.5, 4), (4, 6)])
def test_table_12_magnitude(low, high, beton, tmp_path):
    magnitudes = f"--augment.magnitude_min={low}", f"--augment.magnitude_max={high}"
    _, rows = run(
        CONFIGS / "imagenette_efficient.yaml",
        beton,
        tmp_path,
        "--training.warmup_epochs=1",
        *magnitudes,
    )
    assert [row["magnitude"] for row in rows] == [low, (low + high) / 2, high]


def test_a_vision_transformer_trains_through_all_resolutions(beton, tmp_path):
    vit = (
        "--model.backbone=vit_tiny_patch16_224",
        "--training.optimizer=adamw",
        "--training.learning_rate=1e-4",
    )
    _, rows = run(
        CONFIGS / "imagenette_efficient.yaml",
        beton,
        tmp_path,
        "--training.warmup_epochs=1",
        *vit,
        "--resolution.max=48",
        "--augment.views=3",
    )
    assert [row["resolution"] for row in rows] == [48, 16, 32]
    assert all(isfinite(row["loss"]) for row in rows)


@pytest.mark.parametrize(
    "name, side, more",
    [
        ("--resolution.max", 40, ["--resolution.schedule=constant"]),
        ("--resolution.min", 24, []),
        ("--resolution.step", 8, ["--resolution.max=48"]),
        ("--hard_augment.resolution", 24, ["--resolution.step=16"]),
        (
            "--hard_augment.resolution",
            24,
            [
                "--resolution.step=16",
                "--hard_augment.select=random",
                "--hard_augment.extra_targets=true",
            ],
        ),
    ],
)
def test_views_that_the_patches_do_not_divide_are_named_before_data_is_read(
    name, side, more, tmp_path
):
    vit = (
        "--training.warmup_epochs=1",
        "--training.epochs=9",
        "--resolution.step=8",
        "--model.backbone=vit_tiny_patch16_224",
    )
    with pytest.raises(
        UserError,
        match=(
            rf"^{name}: vit_tiny_patch16_224 can't take views of (40|24) px: its patches of 16 "
            r"px do not divide"
        ),
    ):
        run(
            CONFIGS / "imagenette_efficient.yaml",
            tmp_path / "missing.beton",
            tmp_path,
            *vit,
            *more,
            f"{name}={side}",
        )


@pytest.mark.parametrize("select", ["off", "random"])
def test_where_no_view_is_made_smaller_the_selections_side_is_not_asked_about(select, tmp_path):
    views = 2 if select == "off" else 3
    options = read_options(
        [
            f"--config={CONFIGS / 'imagenette_efficient.yaml'}",
            "--data.train=none",
            "--run.folder=none",
            "--model.backbone=vit_tiny_patch16_224",
            f"--hard_augment.select={select}",
            f"--augment.views={views}",
            "--hard_augment.resolution=24",
        ]
    )
    with torch.device("meta"):
        build(options, torch.device("meta"))
