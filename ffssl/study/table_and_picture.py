"""Write what a study found: a table, the same as JSON, and a picture of accuracy over cost."""

import statistics
from pathlib import Path

import matplotlib.pyplot as plt

from ffssl.data.beton.description import read_description
from ffssl.files import replacing, write_json, write_text
from ffssl.plots import COLOURS, MARKERS, any_script, drawable, flop_unit, label
from ffssl.run_folder.log import read_log
from ffssl.run_folder.provenance import read_starts
from ffssl.slowed import describe_slowed
from ffssl.study.recipes import Run, Study
from ffssl.tables import table

COSTS = ("flops", "seconds")
# Accuracies of the online linear classifier, where there is one, and their titles.
LINEAR = {"linear_top1": "linear (%)", "linear_top5": "top-5 (%)"}
NOTES = """
Means over the seeds, ± the sample standard deviation. kNN accuracy on the validation images after
the last epoch, never the best; linear: top-1 accuracy of the linear classifier trained beside the
method, then, and its top-5 accuracy. FLOPs in the standard count (backward = 2 forward), without
that classifier; seconds of training, without the evaluations and torch.compile's work; kWh of the
GPU. Speed-ups are ratios of mean costs: that of the run that the study compares it with, the
baseline, over this run's; and "to baseline's accuracy" that of what each had cost at the first
evaluation at which its accuracy was the baseline's final one or more (means over the seeds; - where
a run ends below it).
"""


def write_report(
    study: Study,
    folder: Path,
    records: dict[tuple[str, int], dict],
    failed: dict[tuple[str, int], int],
    *,
    command: str,
) -> str:
    """Write table.md, table.json and picture.png to `folder`, each whole or not at all.

    Return the table.

    records: of the finished runs, by name and seed (`ffssl.study.train`). failed: the exit status
    of the failed ones.
    """
    runs = {run.name: run for run in study.runs}
    logs = {
        name: {
            seed: read_log(run.folder(folder, seed))
            for seed in study.seeds
            if (name, seed) in records
        }
        for name, run in runs.items()
    }
    rows = summarise(study.runs, logs)
    for row in rows:
        row["failed"] = {
            seed: status for (name, seed), status in failed.items() if name == row["run"]
        }
    settings = sorted(
        {
            (record["options"]["evaluate"]["k"], record["options"]["evaluate"]["temperature"])
            for record in records.values()
        }
    )
    starts = [
        start for name, seed in records for start in read_starts(runs[name].folder(folder, seed))
    ]
    header = {
        "title": study.title,
        "command": command,
        "machines": sorted({f"{start['machine']}; on {start['device']}" for start in starts}),
        "code": sorted({start["git"] for start in starts if start["git"]}),
        "dates": sorted({start["started"].partition("T")[0] for start in starts}),
        "seeds": study.seeds,
        "data": {split: _describe_data(files) for split, files in study.data.items()},
        "knn": [f"k = {k}, T = {temperature:g}" for k, temperature in settings],
        "slowed": describe_slowed(
            {
                f"{name}, seed {seed}": rows
                for name, by_seed in logs.items()
                for seed, rows in by_seed.items()
            }
        ),
    }
    found = format_table(rows, len(study.seeds))
    found += "".join(f"\n\n{sentence}." for sentence in header["slowed"])
    write_text(folder / "table.md", f"{_format_header(header)}\n{found}\n{NOTES}")
    write_json(folder / "table.json", header | {"runs": rows})
    with replacing(folder / "picture.png") as path:
        draw(study, rows, logs, path)
    return found


def summarise(runs: list[Run], logs: dict[str, dict[int, list[dict]]]) -> list[dict]:
    """Return a row for each run: means over its seeds, standard deviations, and ratios.

    Standard deviations are of the sample, None for one seed. Ratios are to the run that this one is
    compared with. What is not known yet, or was never reached, is None.

    logs: of finished runs, by run and seed; knn is a share (0..1).
    """
    finals = {name: [rows[-1] for rows in by_seed.values()] for name, by_seed in logs.items()}
    summary = []
    for run in runs:
        row = {"run": run.name, "against": run.against, "seeds": list(logs[run.name])}
        base = finals[run.against or run.name]
        for key in ("knn", *LINEAR, *COSTS, "kwh"):
            values = [final[key] for final in finals[run.name] if key in final]
            row[key] = statistics.fmean(values) if values else None
            row[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else None
            row[f"{key}_by_seed"] = values
        aim = statistics.fmean(final["knn"] for final in base) if base else None
        base_reached = (
            first_reached(mean_curve(logs[run.against or run.name]), aim) if base else None
        )
        # Where it ends below, having been there once was luck.
        reached = (
            first_reached(mean_curve(logs[run.name]), aim)
            if base and row["seeds"] and row["knn"] >= aim
            else None
        )
        for cost in COSTS:
            base_cost = statistics.fmean(final[cost] for final in base) if base else None
            row[f"speed_up_{cost}"] = base_cost / row[cost] if base and row["seeds"] else None
            row[f"speed_up_to_accuracy_{cost}"] = (
                base_reached[cost] / reached[cost] if reached else None
            )
        summary.append(row)
    return summary


def mean_curve(by_seed: dict[int, list[dict]]) -> list[dict[str, float]]:
    """Return accuracy and costs at each evaluation after the start, as means over the seeds."""
    evaluations = zip(
        *([row for row in rows if "knn" in row and row["epoch"] > 0] for rows in by_seed.values())
    )
    return [
        {key: statistics.fmean(row[key] for row in rows) for key in ("knn", *COSTS)}
        for rows in evaluations
    ]


def first_reached(curve: list[dict[str, float]], accuracy: float) -> dict[str, float] | None:
    """Return the first point of a curve with at least this accuracy, else None."""
    return next((point for point in curve if point["knn"] >= accuracy), None)


def format_table(rows: list[dict], seeds: int) -> str:
    """Return the rows of `summarise`, with `failed` (exit status by seed), as Markdown."""
    unit, scale = flop_unit(max((row["flops"] or 0 for row in rows), default=0))
    linear = [key for key in LINEAR if any(row.get(key) is not None for row in rows)]
    titles = [
        "run",
        "seeds",
        "kNN (%)",
        *(LINEAR[key] for key in linear),
        unit,
        "speed-up",
        "seconds",
        "speed-up",
        f"to baseline's accuracy, {unit}",
        "and seconds",
    ]
    counted = any(row["kwh"] is not None for row in rows)
    cells = [
        (
            row["run"],
            _format_seeds(row, seeds),
            _format_mean(row["knn"], row["knn_sd"], 100),
            *(_format_mean(row[key], row[f"{key}_sd"], 100) for key in linear),
            _format_mean(row["flops"], None, scale),
            _format_ratio(row["speed_up_flops"]),
            _format_mean(row["seconds"], row["seconds_sd"], 1),
            _format_ratio(row["speed_up_seconds"]),
            _format_ratio(row["speed_up_to_accuracy_flops"]),
            _format_ratio(row["speed_up_to_accuracy_seconds"]),
            *([_format_mean(row["kwh"], None, 1, digits=3)] if counted else []),
        )
        for row in rows
    ]
    titles += ["kWh"] if counted else []
    return table(titles, cells)


def _format_header(header: dict) -> str:
    lines = [f"# {header['title']}", "", f"`{header['command']}`", ""]
    lines += [f"- machine: {machine}" for machine in header["machines"]]
    lines += [
        f"- {name}: {', '.join(map(str, header[name]))}"
        for name in ("code", "dates", "seeds")  # an installed package has no revision
        if header[name]
    ]
    lines += [f"- {split} images: {description}" for split, description in header["data"].items()]
    if header["knn"]:
        lines.append(f"- kNN: {'; '.join(header['knn'])}")
    return "\n".join([*lines, ""])


def _describe_data(files: str) -> str:
    """Return the path of a file, or of several, and what the description says, if there is one."""
    description = read_description(files)
    if description is None:
        return files
    return (
        f"{files} ({description['samples']} from {description['source']['kind']}, sha256 "
        f"{description['sha256'][:12]})"
    )


def _format_seeds(row: dict, seeds: int) -> str:
    done = len(row["seeds"])
    failures = [
        f"seed {seed} failed ({_describe_status(status)})" for seed, status in row["failed"].items()
    ]
    return ", ".join([str(done) if done == seeds else f"{done} of {seeds}", *failures])


def _describe_status(status: int) -> str:
    """Put an exit status, as `subprocess` gives it, into words."""
    return f"status {status}" if status >= 0 else f"signal {-status}"


def _format_mean(mean: float | None, deviation: float | None, scale: float, digits: int = 1) -> str:
    if mean is None:
        return "-"
    return f"{mean * scale:.{digits}f}" + (
        f" ± {deviation * scale:.{digits}f}" if deviation is not None else ""
    )


def _format_ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def draw(
    study: Study, rows: list[dict], logs: dict[str, dict[int, list[dict]]], path: Path
) -> None:
    """Write the picture: mean kNN accuracy over FLOPs and over seconds, a curve a run.

    Each curve ends in a mark with its standard deviation. Runs of a group share a colour, and runs
    of the same name a mark. The mark is hollow if the run is compared with no other.
    """
    figure, axes = plt.subplots(1, 2, figsize=(15, 7), dpi=110, sharey=True, layout="constrained")
    unit, scale = flop_unit(max((row["flops"] or 0 for row in rows), default=0))
    shown = [(run, row) for run, row in zip(study.runs, rows) if row["seeds"]]
    families = list(dict.fromkeys(run.group or run.name for run in study.runs))
    recipes = list(dict.fromkeys(run.name.rpartition("/")[2] for run in study.runs))
    colours = {
        run.name: COLOURS[families.index(run.group or run.name) % len(COLOURS)]
        for run in study.runs
    }
    curves = {run.name: mean_curve(logs[run.name]) for run, _ in shown}
    for axis, cost, title, factor in zip(axes, COSTS, (unit, "seconds of training"), (scale, 1)):
        for run, row in shown:
            colour, curve = colours[run.name], curves[run.name]
            axis.plot(
                [point[cost] * factor for point in curve],
                [100 * point["knn"] for point in curve],
                color=colour,
                lw=1.4,
                alpha=0.4,
            )
            axis.errorbar(
                row[cost] * factor,
                100 * row["knn"],
                xerr=(row[f"{cost}_sd"] or 0) * factor,
                yerr=100 * (row["knn_sd"] or 0),
                color=colour,
                marker=MARKERS[recipes.index(run.name.rpartition("/")[2]) % len(MARKERS)],
                ms=8,
                mfc=colour if run.against else "white",
                mew=1.6,
                elinewidth=1.2,
            )
        axis.margins(x=0.12)
        axis.set_xlim(left=0)
        axis.set_xlabel(title)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.92")
        axis.set_axisbelow(True)
    axes[0].set_ylabel("kNN accuracy (%)")
    if shown:
        finals = [100 * row["knn"] for _, row in shown]
        room = max(max(finals) - min(finals), 4)
        lowest = [row["knn"] - (row["knn_sd"] or 0) for _, row in shown]
        lowest = 100 * min(
            [*lowest, *(point["knn"] for curve in curves.values() for point in curve)]
        )
        # The ends, where the runs differ, and of the curves what is as high.
        bottom = max(min(finals) - room, lowest - 0.1 * room, 0)
        highest = 100 * max(row["knn"] + (row["knn_sd"] or 0) for _, row in shown)
        axes[0].set_ylim(bottom, min(max(max(finals) + 0.3 * room, highest + 0.05 * room), 101))
    with any_script(study.title, *(run.name for run in study.runs)):
        figure.suptitle(drawable(study.title), fontsize=14, parse_math=False)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the labels are placed for the layout as it is now
        for axis, cost, factor in zip(axes, COSTS, (scale, 1)):
            names = (drawable(run.name.replace("/", " ")) for run, _ in shown)
            ends = ((row[cost] * factor, 100 * row["knn"]) for _, row in shown)
            label(axis, list(zip(names, ends, (colours[run.name] for run, _ in shown))))
        figure.savefig(path, format="png")
    plt.close(figure)
