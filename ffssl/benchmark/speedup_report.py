"""Write what the speed-up benchmark found as a table and as a picture."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ffssl.files import replacing
from ffssl.parallel.energy import JOULES_PER_KWH
from ffssl.plots import COLOURS, any_script, drawable, flop_unit, time_unit
from ffssl.printable import printable
from ffssl.tables import table

STAGE_TITLES = (
    *("config", "px", "views", "epochs", "step, ms", "loader, ms", "together, ms"),
    *("bound by", "cores needed"),
)


def table_of(found: dict) -> str:
    """Return Markdown: the stages of each config, and the totals.

    found: as `ffssl.benchmark.speedup` writes it.
    """
    configs, first = found["configs"], found["configs"][0]
    time, per_second = time_unit(max(config["seconds"] for config in configs))
    work, per_flop = flop_unit(max(config["flops"] for config in configs))
    stages = [
        (
            config["name"],
            stage["resolution"],
            stage["views"],
            stage["epochs"],
            *(f"{stage[f'{what}_ms']:.1f}" for what in ("step", "loader", "together")),
            stage["bound"],
            f"{stage['cores_needed']:.2g}",
            f"{stage['seconds'] * per_second:.3g}",
            f"{stage['first_step_s']:.1f}",
        )
        for config in configs
        for stage in config["stages"]
    ]
    titles = ["config", time, "speed-up", work, "speed-up", "kWh", "speed-up"]
    if "full_seconds" in first:
        titles += [f"trained in full, {time}", "prediction is off by", "speed-up"]
    lines = [
        f"{found['machine']}; {found['device']}; epochs of {found['images']:,} images",
        "",
        table(STAGE_TITLES + (time, "first step, s"), stages, "<>>>>>><"),
        "",
        table(titles, (totals(config, first, per_second, per_flop) for config in configs)),
    ]
    lines += [
        line
        for config in configs
        for line in ("", what_the_loader_lacks(config))
        if waits_for_loader(config)
    ]
    lines += [
        "",
        "step: with views at hand; loader: a batch, alone; together: as in training, medians. "
        "cores needed: CPU cores with which the loader alone would keep up with the step. "
        "Times are of training, without torch.compile's work (within the first step) and "
        "evaluations; a prediction is compared with its first steps added. "
        "FLOPs in the standard count. kWh: of the GPU, where it counts them.",
        "",
    ]
    return "\n".join(lines)


def totals(config: dict, first: dict, per_second: float, per_flop: float) -> list[str]:
    """Return the cells of a config's row: costs, and the ratios of those of the first to them."""
    joules = config["joules"]
    cells = [
        config["name"],
        f"{config['seconds'] * per_second:.4g}",
        ratio(first["seconds"], config["seconds"]),
        f"{config['flops'] * per_flop:.4g}",
        ratio(first["flops"], config["flops"]),
        "–" if joules is None else f"{joules / JOULES_PER_KWH:.3g}",
        "–" if joules is None else ratio(first["joules"], joules),
    ]
    if "full_seconds" in config:
        full = config["full_seconds"]
        cells += [
            f"{full * per_second:.4g}",
            f"{(config['seconds'] + config['first_step_s']) / full - 1:+.1%}",
            ratio(first["full_seconds"], full),
        ]
    return cells


def waits_for_loader(config: dict) -> list[dict]:
    """The stages of a config that the loader bounds."""
    return [stage for stage in config["stages"] if stage["bound"] == "loader"]


def what_the_loader_lacks(config: dict) -> str:
    """What would help where the loader bounds a stage; empty where it bounds none."""
    stages = waits_for_loader(config)
    if not stages:
        return ""
    sides = ", ".join(
        f"{side} px" for side in dict.fromkeys(stage["resolution"] for stage in stages)
    )
    cores = math.ceil(max(stage["cores_needed"] for stage in stages))
    return (
        f"{config['name']}: the loader bounds the training at {sides}, where {cores} cores would "
        f"keep up, of which it has {config['workers']}. What helps: more cores (data.workers), "
        "fewer views (augment.views), augment.jitter_form=affine, a file of smaller images "
        "(--max-side)."
    )


def ratio(base: float, value: float) -> str:
    return f"{base / value:.2f}x"


def draw(found: dict, path: Path) -> None:
    """Draw a bar for each config, made of its stages.

    Stages are in the order in which their resolutions first occur. Those that wait for the loader
    are hatched.
    """
    configs = found["configs"]
    longest = max(config["seconds"] for config in configs)
    time, per_second = time_unit(longest)
    sides = sorted({stage["resolution"] for config in configs for stage in config["stages"]})
    colours = dict(zip(sides, [COLOURS[i % len(COLOURS)] for i in range(len(sides))]))
    names = [printable(config["name"]) for config in configs]
    figure, axis = plt.subplots(figsize=(8, 1.6 + 0.7 * len(configs)), layout="constrained")
    for row, config in enumerate(configs):
        left = 0.0
        for stage in config["stages"]:
            width = stage["seconds"] * per_second
            hatch = "//" if stage["bound"] == "loader" else None
            axis.barh(
                row,
                width,
                left=left,
                height=0.6,
                color=colours[stage["resolution"]],
                edgecolor="white",
                hatch=hatch,
            )
            left += width
        text = f" {left:.3g} {time} "
        if row:
            text += (
                f"({ratio(configs[0]['seconds'], config['seconds'])} as fast; in FLOPs "
                f"{ratio(configs[0]['flops'], config['flops'])}) "
            )
        inside = config["seconds"] > 0.6 * longest
        axis.text(
            left,
            row,
            text,
            va="center",
            ha="right" if inside else "left",
            color="white" if inside else "black",
            fontsize=9,
        )
    with any_script(*names):
        axis.set_yticks(range(len(configs)), map(drawable, names), parse_math=False)
    axis.invert_yaxis()
    axis.set_xlabel(f"{time} of training")
    squares = [plt.Rectangle((0, 0), 1, 1, color=colours[side]) for side in sides]
    axis.legend(
        squares,
        [f"{side} px" for side in sides],
        ncols=len(sides),
        loc="lower center",
        bbox_to_anchor=(0.5, 1),
        frameon=False,
        fontsize=9,
    )
    for spine in ("top", "right", "left"):
        axis.spines[spine].set_visible(False)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    plt.close(figure)
