"""What the report's page shows. `page.html.jinja` has its sections and their words."""

import datetime
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ffssl.errors import UserError
from ffssl.evaluate import results
from ffssl.methods import Method
from ffssl.plots import COLOURS, flop_unit, time_unit
from ffssl.report.charts import (
    VARIABLES,
    Chart,
    accuracy_charts,
    draw_chart,
    schedule_charts,
    training_charts,
)
from ffssl.report.gallery import Gallery
from ffssl.report.images import data_uri
from ffssl.report.pictures import show_choice, show_embedding, show_neighbours, show_views
from ffssl.report.runs import ReportedRun, compare_options
from ffssl.slowed import describe_slowed

NO_OPTIONS = "The runs' checkpoints, which hold their options, are gone or can't be read."

# A table's row: the run's index, a mark of the run, and cells of a text and a smaller one.
Row = tuple[int, str, list[tuple[str, str]]]


def compose(runs: list[ReportedRun], device: torch.device) -> tuple[str, dict[str, bytes]]:
    """Return the page, and PNGs of its pictures by file name.

    The networks compute on `device`, one after the other.
    """
    gallery = Gallery()
    known = [i for i, run in enumerate(runs) if run.options is not None]

    def drawn(charts: list[Chart]) -> list[Markup]:
        names = [run.name for run in runs]
        unfinished = {i for i, run in enumerate(runs) if run.unfinished}
        return [
            gallery.draw(draw_chart(chart, names, unfinished), chart.name, chart.title)
            for chart in charts
        ]

    def of_each(show: Callable, places: Iterable[int] = range(len(runs))) -> list[tuple]:
        return [(i, _part(show, runs[i], i, gallery, device)) for i in places]

    evaluated, unreadable = _results(runs)
    differing, same = compare_options(runs) if known else ({}, {})
    page = _template().render(
        runs=runs,
        tones=len(COLOURS),
        colours=VARIABLES,
        subject=_subject(runs),
        today=datetime.date.today().isoformat(),
        warnings=_warnings(runs),
        cost_columns=_cost_columns(runs),
        costs=_costs(runs),
        linear=_has_linear(runs),
        result_columns=list(results.COLUMNS.items()),
        results=evaluated,
        unreadable_results=unreadable,
        accuracy_charts=drawn(accuracy_charts(runs)),
        schedule_charts=drawn(schedule_charts(runs)),
        training_charts=drawn(training_charts(runs)),
        methods={runs[i].options.method.name for i in known},
        view_parts=of_each(show_views),
        choice_parts=of_each(
            show_choice, [i for i in known if runs[i].options.hard_augment.select == "hard"]
        ),
        embedding_parts=of_each(show_embedding),
        neighbour_parts=of_each(show_neighbours),
        known=known,
        no_options=NO_OPTIONS,
        differing=differing,
        same={name: [value] for name, value in same.items()},
        run_starts=[_starts(run) for run in runs],
    )
    return page, gallery.pngs


def _template():
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    return environment.get_template("page.html.jinja")


def _part(
    show: Callable[[ReportedRun, Method, int, Gallery], object],
    run: ReportedRun,
    place: int,
    gallery: Gallery,
    device: torch.device,
) -> object:
    """Return what a section shows of a run, or in a sentence why that is nothing."""
    if isinstance(run.method, UserError):
        return f"Not shown: {run.method}."
    try:
        return show(run, run.method.to(device), place, gallery)
    except UserError as error:
        return f"Not shown: {error}."
    finally:
        run.method.cpu()  # a GPU has room for one


def _subject(runs: list[ReportedRun]) -> str:
    """Say in a line what is trained."""
    known = [run.options for run in runs if run.options is not None]
    parts = [
        sorted({options.method.name for options in known}),
        sorted({options.model.backbone for options in known}),
        sorted({options.data.train for options in known}),
    ]
    return " · ".join(", ".join(part) for part in parts if part)


def _warnings(runs: list[ReportedRun]) -> list[str]:
    """Say which accuracies and times are not what they seem."""
    warnings = []
    evaluated = [run for run in runs if run.last_evaluation]
    if len({run.evaluation for run in evaluated}) > 1:
        each = "; ".join(f"{run.name}: {_describe_evaluation(run)}" for run in evaluated)
        warnings.append(
            "These accuracies are of different data or measured in different ways, and not to be "
            f"compared: {each}."
        )
    warnings += [
        f"The accuracies of {run.name} mean nothing: {run.accuracy_doubt}."
        for run in runs
        if run.accuracy_doubt
    ]
    for place in dict.fromkeys(run.hardware or run.name for run in runs):
        together = {run.name: run.rows for run in runs if place in (run.hardware, run.name)}
        warnings += [f"{sentence}." for sentence in describe_slowed(together)]
    return warnings


def _describe_evaluation(run: ReportedRun) -> str:
    if run.options is None:
        return "unknown"
    data, evaluate = run.options.data, run.options.evaluate
    digest = f" (digest {run.trained_on['digest']})" if run.trained_on else ""
    return (
        f"{data.validation} by at most {evaluate.bank_samples} images of {data.train}{digest}, "
        f"{run.options.resolution.max} px, k = {evaluate.k}, T = {evaluate.temperature:g}"
    )


def _cost_units(runs: list[ReportedRun]) -> tuple[tuple[str, float], tuple[str, float]]:
    return tuple(
        unit(max(run.rows[-1][cost] for run in runs))
        for unit, cost in ((flop_unit, "flops"), (time_unit, "seconds"))
    )


def _cost_columns(runs: list[ReportedRun]) -> list[tuple[str, bool]]:
    """Return the titles of `_costs`, and whether they are of numbers."""
    (flops, _), (time, _) = _cost_units(runs)
    energy = ["kWh"] if any("kwh" in run.rows[-1] for run in runs) else []
    linear = ["linear accuracy"] if _has_linear(runs) else []
    numbers = ["epochs", "kNN accuracy", *linear, flops, time, *energy]
    return [("method", False), *((title, True) for title in numbers)]


def _costs(runs: list[ReportedRun]) -> list[Row]:
    """Return what each run reached and cost, compared with the first."""
    (_, per_flop), (_, per_second) = _cost_units(runs)
    energy = any("kwh" in run.rows[-1] for run in runs)
    linear, rows = _has_linear(runs), []
    for i, run in enumerate(runs):
        row, evaluated, options = run.rows[-1], run.last_evaluation, run.options
        ratio = {key: _ratio(runs[0], run, key) if i else "" for key in ("flops", "seconds", "kwh")}
        done = f"{run.epoch} of {options.training.epochs}" if run.unfinished else f"{run.epoch}"
        late = evaluated and evaluated["epoch"] < run.epoch
        cells = [
            (options.method.name, options.model.backbone) if options else ("unknown", ""),
            (done, ""),
            (
                f"{evaluated['knn']:.1%}" if evaluated else "–",
                f"after epoch {evaluated['epoch']}" if late else "",
            ),
            *([_linear_accuracy(evaluated or {})] if linear else []),
            (f"{row['flops'] * per_flop:.1f}", ratio["flops"]),
            (f"{row['seconds'] * per_second:.1f}", ratio["seconds"]),
            *([(f"{row['kwh']:.2f}" if "kwh" in row else "–", ratio["kwh"])] if energy else []),
        ]
        mark = "unfinished" if run.unfinished else "" if options else "options unknown"
        rows.append((i, mark, cells))
    return rows


def _has_linear(runs: list[ReportedRun]) -> bool:
    return any("linear_top1" in (run.last_evaluation or {}) for run in runs)


def _linear_accuracy(evaluated: dict) -> tuple[str, str]:
    """Return the online linear classifier's accuracy, and its top-5 accuracy if there is one."""
    if "linear_top1" not in evaluated:
        return "–", ""
    top5 = f"top-5 {evaluated['linear_top5']:.1%}" if "linear_top5" in evaluated else ""
    return f"{evaluated['linear_top1']:.1%}", top5


def _ratio(first: ReportedRun, run: ReportedRun, key: str) -> str:
    """Say how many times less, or more, the run cost than the first.

    Return nothing if the two can't be compared in that cost.
    """
    ended = [each for each in (first, run) if each.last_evaluation and not each.unfinished]
    conditions = [(each.evaluation, "any" if key == "flops" else each.hardware) for each in ended]
    before, own = first.rows[-1].get(key), run.rows[-1].get(key)
    if (
        len(ended) < 2
        or None in conditions[0]
        or conditions[0] != conditions[1]
        or not before
        or not own
    ):
        return ""
    return (
        f"{max(before / own, own / before):.2f}× {'less' if own <= before else 'more'} than "
        f"{first.name}"
    )


def _results(runs: list[ReportedRun]) -> tuple[list[Row], list[str]]:
    """Return what `ffssl.evaluate` has recorded of the runs, and what can't be read."""
    rows, unreadable = [], []
    for i, run in enumerate(runs):
        try:
            records = results.read_results(run.folder)
        except UserError as error:
            unreadable.append(f"Not shown: {error}.")
        else:
            rows += [(i, "", [(cell, "") for cell in results.describe(one)]) for one in records]
    return rows, unreadable


def _starts(run: ReportedRun) -> list[dict[str, object]]:
    """Return what is told of each start of a run, by name."""
    return [
        {
            "started" if i == 0 else "continued": start["started"],
            "command": start["command"],
            "device": start["device"],
            **({"processes": start["ranks"]} if start.get("ranks", 1) > 1 else {}),
            "machine": start["machine"],
            "git revision": start["git"] or "not from a checkout",
        }
        for i, start in enumerate(run.starts)
    ]
