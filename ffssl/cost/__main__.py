r"""Count what runs cost, in FLOPs, from their configs alone: without data or training.

    ffssl cost imagenette_baseline.yaml imagenette_efficient.yaml --images=imagenette
    ffssl cost efficient.yaml --data.train=train.beton \
        --training.epochs=100
    ffssl cost --paper

Prints a table of each config's stages, then their totals and the speed-ups over the first config.
"""

import sys
from pathlib import Path

from ffssl.config import Options, read_options
from ffssl.config.command_line import Parser, exit_status
from ffssl.cost import PAPERS, STANDARD, Stage
from ffssl.cost.paper import paper_table
from ffssl.cost.runs import RunCosts, number_of_images, petaflop
from ffssl.tables import table


def main() -> None:
    parser = Parser(
        "cost",
        usage=(
            "%(prog)s CONFIG [CONFIG ...] [--images=N] [--section.option=value ...]\n       "
            "%(prog)s --paper"
        ),
        description=__doc__,
    )
    parser.add_argument(
        "configs", nargs="*", metavar="CONFIG", help="config of a run; speed-ups are over the first"
    )
    parser.add_argument(
        "--images",
        metavar="N",
        help="training images: a number, imagenet or imagenette (default: those in --data.train)",
    )
    parser.add_argument(
        "--paper",
        action="store_true",
        help="the costs and speed-ups that the paper states, beside those counted here",
    )
    arguments, overrides = parser.parse_known_intermixed_args()
    if bool(arguments.configs) == arguments.paper:
        parser.error("name the configs to count, or --paper")
    print(
        paper_table(RunCosts())
        if arguments.paper
        else report(arguments.configs, overrides, arguments.images)
    )


def report(configs: list[str], overrides: list[str], images: str | None = None) -> str:
    """Return a table of each config's stages, and one of their totals.

    images: a number or one of IMAGES; by default as many as data.train holds.
    """
    unused = {"data.train": "", "run.folder": ""}  # required of a run, but not of its cost
    runs = {
        config: read_options([f"--config={config}", *overrides], defaults=unused)
        for config in configs
    }
    counts = {
        config: number_of_images(images, options.data.train) for config, options in runs.items()
    }
    costs = RunCosts()
    stages = {config: costs.stages(options) for config, options in runs.items()}
    parts = [
        f"{describe(config, runs[config], counts[config])}\n\n{stage_table(stages[config])}\n"
        for config in configs
    ]
    petaflops = {
        config: [petaflop(stages[config], counts[config], count) for count in (STANDARD, PAPERS)]
        for config in configs
    }
    return "\n".join([*parts, total_table(petaflops)])


def describe(config: str, options: Options, images: int) -> str:
    model = options.model
    dropped = f" without {model.patch_drop:.0%} of its patches" if model.patch_drop else ""
    return (
        f"{Path(config).stem}: {options.method.name}, {model.backbone}{dropped}, "
        f"{options.training.epochs} epochs of {images:,} images"
    )


def stage_table(stages: list[Stage]) -> str:
    """Return a table of the GFLOP of one image in one epoch, by stage."""
    rows = []
    for stage in stages:
        flops = stage.flops
        parts = flops.forward, STANDARD * flops.forward, flops.teacher, flops.selection
        gflop = (f"{part / 1e9:.3f}" for part in parts)
        sides, views = str(stage.shape.resolution), str(stage.shape.views)
        if stage.shape.local_views:
            sides, views = (
                f"{sides}, {stage.shape.local_resolution}",
                f"{views} + {stage.shape.local_views}",
            )
        rows.append((sides, views, stage.epochs, *gflop))
    titles = ("resolution", "views", "epochs", "forward", "backward", "teacher", "selection")
    return f"GFLOP of an image, by stage:\n\n{table(titles, rows, '>')}"


def total_table(petaflops: dict[str, list[float]]) -> str:
    """Return a table of each config's PFLOP and its speed-up over the first config.

    Both are given in the standard count and in the paper's.
    """
    first = next(iter(petaflops.values()))
    rows = []
    for config, costs in petaflops.items():
        (standard, speed_up), (papers, papers_speed_up) = (
            (format_petaflop(cost), f"{base / cost:.2f}x") for base, cost in zip(first, costs)
        )
        rows.append((Path(config).stem, standard, speed_up, papers, papers_speed_up))
    titles = ("", "PFLOP", "speed-up", "paper's count", "speed-up")
    legend = "A backward pass is taken for two forward passes; in the paper's count, for one."
    return f"{table(titles, rows)}\n\n{legend}"


def format_petaflop(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(exit_status(main, interrupted=""))
