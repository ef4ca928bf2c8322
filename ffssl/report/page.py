"""The report's page, section by section."""

import datetime
from collections.abc import Callable
from html import escape

import torch

from ffssl.errors import UserError
from ffssl.evaluate import results
from ffssl.methods import Method
from ffssl.plots import COLOURS, flop_unit, time_unit
from ffssl.report.charts import Chart, accuracy_charts, draw_chart, schedule_charts, training_charts
from ffssl.report.gallery import Gallery
from ffssl.report.pictures import (
    NEIGHBOURS,
    VIEWS,
    show_choice,
    show_embedding,
    show_neighbours,
    show_views,
)
from ffssl.report.runs import ReportedRun, compare_options
from ffssl.report.style import CSS
from ffssl.slowed import describe_slowed


def compose(runs: list[ReportedRun], device: torch.device) -> tuple[str, dict[str, bytes]]:
    """Return the page, and PNGs of its pictures by file name.

    The networks compute on `device`, one after the other.
    """
    gallery = Gallery()
    hard = [
        i
        for i, run in enumerate(runs)
        if run.options is not None and run.options.hard_augment.select == "hard"
    ]

    def of_each(show: Callable[[ReportedRun, Method, int, Gallery], str], places: list[int]) -> str:
        return "".join(
            f"<div>{_heading(runs, i)}{_shown(show, runs[i], i, gallery, device)}</div>"
            for i in places
        )

    everyone = list(range(len(runs)))
    sections = [
        ("cost", "Accuracy and cost", _cost(runs, gallery)),
        ("schedules", "Schedules", _schedules(runs, gallery)),
        ("training", "Training", _training(runs, gallery)),
        ("views", "Views", _lead(VIEWS) + of_each(show_views, everyone)),
        (
            "choice",
            "What Hard Augment chooses",
            of_each(show_choice, hard)
            or _note("None of these runs chooses its views by their loss."),
        ),
        (
            "embeddings",
            "Embeddings",
            f'<div class="charts middle">{of_each(show_embedding, everyone)}</div>',
        ),
        (
            "neighbours",
            "Nearest neighbours",
            _lead(NEIGHBOURS) + of_each(show_neighbours, everyone),
        ),
        ("config", "Configuration", _config(runs)),
        (
            "started",
            "How it was run",
            "".join(_heading(runs, i) + _starts(run) for i, run in enumerate(runs)),
        ),
    ]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in sections)
    bodies = "".join(
        f'<section id="{anchor}"><h2>{title}</h2>{body}</section>'
        for anchor, title, body in sections
    )
    names = [run.name for run in runs]
    heading = escape(" and ".join(names)) if len(runs) < 3 else f"{len(runs)} training runs"
    today = datetime.date.today().isoformat()
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(', '.join(names))}</title><style>{CSS}</style></head>\n<body><main>"
        f"<h1>{heading}</h1>"
        f'<p class="muted">{escape(_subject(runs))}</p><nav>{links}</nav>\n{bodies}\n'
        f"<footer>Written by ffssl report on {today}.</footer></main></body></html>\n"
    )
    return page, gallery.pngs


def _shown(
    show: Callable, run: ReportedRun, place: int, gallery: Gallery, device: torch.device
) -> str:
    """Return the run's part of a section, or why there is none."""
    if isinstance(run.method, UserError):
        return _note(f"Not shown: {run.method}.")
    try:
        return show(run, run.method.to(device), place, gallery)
    except UserError as error:
        return _note(f"Not shown: {error}.")
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


def _lead(text: str) -> str:
    return f'<p class="muted">{text}</p>'


def _note(text: str, kind: str = "") -> str:
    return f'<p class="note {kind}">{escape(text)}</p>'


def _run_name(runs: list[ReportedRun], place: int) -> str:
    swatch = f'<span class="swatch" style="--tone: var(--run{place % len(COLOURS)})"></span>'
    return f'<span class="run">{swatch}{escape(runs[place].name)}</span>'


def _heading(runs: list[ReportedRun], place: int) -> str:
    return f"<h3>{_run_name(runs, place)}</h3>"


def _charts(charts: list[Chart], runs: list[ReportedRun], gallery: Gallery) -> str:
    names = [run.name for run in runs]
    unfinished = {i for i, run in enumerate(runs) if run.unfinished}
    return "".join(
        gallery.draw(draw_chart(chart, names, unfinished), chart.name, chart.title)
        for chart in charts
    )


def _cost(runs: list[ReportedRun], gallery: Gallery) -> str:
    """Return the table of the runs, the results of their evaluations, and Fig. 1."""
    evaluations = {run.evaluation for run in runs if run.last_evaluation}
    warning = ""
    if len(evaluations) > 1:
        warning = _note(
            "These accuracies are of different data or measured in different ways, "
            "and not to be compared: "
            + "; ".join(
                f"{run.name}: {_describe_evaluation(run)}" for run in runs if run.last_evaluation
            )
            + ".",
            "warning",
        )
    warning += "".join(
        _note(f"The accuracies of {run.name} mean nothing: {run.accuracy_doubt}.", "warning")
        for run in runs
        if run.accuracy_doubt
    )
    for place in dict.fromkeys(run.hardware or run.name for run in runs):
        together = {run.name: run.rows for run in runs if place in (run.hardware, run.name)}
        warning += "".join(
            _note(f"{sentence}.", "warning") for sentence in describe_slowed(together)
        )
    charts, evaluated = accuracy_charts(runs), _results(runs)
    curves = f'<div class="charts large">{_charts(charts, runs, gallery)}</div>' if charts else ""
    return warning + _table(runs) + (evaluated + curves or _note("No accuracy has been measured."))


def _describe_evaluation(run: ReportedRun) -> str:
    if run.options is None:
        return "unknown"
    data, evaluate = run.options.data, run.options.evaluate
    digest = f" (digest {run.trained_on['digest']})" if run.trained_on else ""
    return (
        f"{data.validation} by at most {evaluate.bank_samples} images of {data.train}{digest}, "
        f"{run.options.resolution.max} px, k = {evaluate.k}, T = {evaluate.temperature:g}"
    )


def _table(runs: list[ReportedRun]) -> str:
    """Return what each run reached and cost, compared with the first."""
    flops, flop_scale = flop_unit(max(run.rows[-1]["flops"] for run in runs))
    times, time_scale = time_unit(max(run.rows[-1]["seconds"] for run in runs))
    energy = any("kwh" in run.rows[-1] for run in runs)
    linear = any("linear_top1" in (run.last_evaluation or {}) for run in runs)
    titles = [
        "run",
        "method",
        "epochs",
        "kNN accuracy",
        *(["linear accuracy"] if linear else []),
        f"{flops}",
        f"{times}",
        *(["kWh"] if energy else []),
    ]
    lines = []
    for i, run in enumerate(runs):
        row, evaluated = run.rows[-1], run.last_evaluation
        ratio = {key: _ratio(runs[0], run, key) if i else "" for key in ("flops", "seconds", "kwh")}
        method = (
            (run.options.method.name, run.options.model.backbone)
            if run.options
            else ("unknown", "")
        )
        epochs = (
            f"{run.epoch} of {run.options.training.epochs}" if run.unfinished else f"{run.epoch}"
        )
        at = (
            f"after epoch {evaluated['epoch']}"
            if evaluated and evaluated["epoch"] < run.epoch
            else ""
        )
        cells = [
            (escape(method[0]), escape(method[1])),
            (epochs, ""),
            (f"{evaluated['knn']:.1%}" if evaluated else "–", at),
            *([_linear_accuracy(evaluated or {})] if linear else []),
            (f"{row['flops'] * flop_scale:.1f}", ratio["flops"]),
            (f"{row['seconds'] * time_scale:.1f}", ratio["seconds"]),
            *([(f"{row['kwh']:.2f}" if "kwh" in row else "–", ratio["kwh"])] if energy else []),
        ]
        doubt = "unfinished" if run.unfinished else "" if run.options else "options unknown"
        chip = f' <span class="chip">{doubt}</span>' if doubt else ""
        cells = [
            f'<td data-label="{title}"{"" if j == 0 else NUMBER}>{text}'
            f"{f'<small>{more}</small>' if more else ''}</td>"
            for j, (title, (text, more)) in enumerate(zip(titles[1:], cells))
        ]
        lines.append(f'<tr><th scope="row">{_run_name(runs, i)}{chip}</th>{"".join(cells)}</tr>')
    heads = "".join(
        f'<th scope="col"{"" if j < 2 else NUMBER}>{title}</th>' for j, title in enumerate(titles)
    )
    return _card_table("summary", "".join(lines), heads) + _lead(
        "Accuracy of weighted kNN on the frozen features, the last that was measured"
        f"{', and of a linear classifier that was trained beside them' if linear else ''}. "
        "FLOPs in the standard count (backward = 2 forward); "
        "the time is that of training, without the evaluations. "
        "Costs are compared where the accuracies are of one evaluation, "
        "times and energies where the hardware is the same too."
    )


def _linear_accuracy(evaluated: dict) -> tuple[str, str]:
    """Return the online linear classifier's accuracy, and its top-5 accuracy if there is one."""
    if "linear_top1" not in evaluated:
        return "–", ""
    top5 = f"top-5 {evaluated['linear_top5']:.1%}" if "linear_top5" in evaluated else ""
    return f"{evaluated['linear_top1']:.1%}", top5


NUMBER = ' class="number"'


def _card_table(kind: str, rows: str, heads: str = "") -> str:
    head = f"<thead><tr>{heads}</tr></thead>" if heads else ""
    return (
        f'<div class="card scroll"><table class="{kind}">{head}<tbody>{rows}</tbody></table></div>'
    )


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
        f"{escape(first.name)}"
    )


def _results(runs: list[ReportedRun]) -> str:
    """Return what `ffssl.evaluate` has recorded of the runs, or nothing."""
    lines, notes = "", ""
    for i, run in enumerate(runs):
        try:
            records = results.read_results(run.folder)
        except UserError as error:
            notes += _note(f"Not shown: {error}.")
            continue
        for record in records:
            cells = "".join(
                f'<td data-label="{title}"{NUMBER if number else ""}>{escape(cell)}</td>'
                for (title, number), cell in zip(results.COLUMNS.items(), results.describe(record))
            )
            lines += f'<tr><th scope="row">{_run_name(runs, i)}</th>{cells}</tr>'
    if not lines:
        return notes
    heads = "".join(
        f'<th scope="col"{NUMBER if number else ""}>{title}</th>'
        for title, number in {"run": False, **results.COLUMNS}.items()
    )
    lead = _lead("What ffssl evaluate has measured of the frozen backbones.")
    return notes + _card_table("summary", lines, heads) + lead


def _schedules(runs: list[ReportedRun], gallery: Gallery) -> str:
    """Figs. 2 and 3."""
    charts = schedule_charts(runs)
    if not charts:
        return _note("The runs' checkpoints, which hold their options, are gone or can't be read.")
    unfinished = any(run.unfinished for run in runs)
    words = (
        '<div class="words">Momentum moves against the learning rate, which keeps the noise scale '
        "of the gradient, ε|D| / (B(1 − β)), in check. "
        "Where that noise is large, low resolution does no harm."
        f"{' Dashed: epochs that are still to come.' if unfinished else ''}</div>"
    )
    return f'<div class="charts">{_charts(charts, runs, gallery)}{words}</div>'


def _training(runs: list[ReportedRun], gallery: Gallery) -> str:
    charts = training_charts(runs)
    several = len({run.options.method.name for run in runs if run.options}) > 1
    words = "The losses of different methods are not to be compared. " if several else ""
    words += (
        "Averages over each epoch. The spread is the standard deviation of the normalised "
        "embeddings times √d: 1 for directions at random, 0 after a collapse."
    )
    return (
        f'{_lead(words)}<div class="charts">{_charts(charts, runs, gallery)}</div>'
        if charts
        else _note("No epoch has finished yet.")
    )


def _config(runs: list[ReportedRun]) -> str:
    """Return the options that differ, then those that do not."""
    known = [i for i, run in enumerate(runs) if run.options is not None]
    if not known:
        return _note("The runs' checkpoints, which hold their options, are gone or can't be read.")
    differing, same = compare_options(runs)
    heads = "".join(f'<th scope="col">{_run_name(runs, i)}</th>' for i in known)
    lines = "".join(
        f'<tr class="differs"><th scope="row">{name}</th>'
        f"{''.join(f'<td>{_value(value)}</td>' for value in values)}</tr>"
        for name, values in differing.items()
    )
    rest = "".join(
        f'<tr><th scope="row">{name}</th><td>{_value(value)}</td></tr>'
        for name, value in same.items()
    )
    table = _card_table("config", lines, f"<th></th>{heads}") if differing else ""
    return (
        f"{table}<details{'' if differing else ' open'}>"
        f"<summary>{len(same)} options{' that all runs share' if len(known) > 1 else ''}</summary>"
        f"{_card_table('config', rest)}</details>"
    )


def _value(value: object) -> str:
    return "–" if value is None else escape(str(value))


def _starts(run: ReportedRun) -> str:
    if not run.starts:
        return _note("This run kept no record of how it was started.")
    lists = []
    for i, start in enumerate(run.starts):
        fields = {
            "started" if i == 0 else "continued": start["started"],
            "command": start["command"],
            "device": start["device"],
            **({"processes": start["ranks"]} if start.get("ranks", 1) > 1 else {}),
            "machine": start["machine"],
            "git revision": start["git"] or "not from a checkout",
        }
        lists.append(
            "".join(
                f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in fields.items()
            )
        )
    return "".join(f'<dl class="card">{entries}</dl>' for entries in lists)
