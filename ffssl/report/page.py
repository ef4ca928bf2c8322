"""The report's page, section by section."""

import datetime
from collections.abc import Callable
from html import escape

from ffssl.errors import UserError
from ffssl.figures import COLOURS, flop_unit, time_unit
from ffssl.methods import Method
from ffssl.report.charts import Chart, accuracy_charts, draw_chart, schedule_charts, training_charts
from ffssl.report.gallery import Gallery
from ffssl.report.pictures import NEIGHBOURS, VIEWS, show_choice, show_embedding, show_neighbours, show_views
from ffssl.report.runs import ReportedRun, compare_options
from ffssl.report.style import CSS


def compose(runs: list[ReportedRun]) -> tuple[str, dict[str, bytes]]:
    """The page, and PNGs of its pictures by file name."""
    gallery = Gallery()
    hard = [i for i, run in enumerate(runs) if run.options is not None and run.options.hard_augment.select == "hard"]

    def of_each(show: Callable[[ReportedRun, Method, int, Gallery], str], places: list[int]) -> str:
        return "".join(f"<div>{_heading(runs, i)}{_shown(show, runs[i], i, gallery)}</div>" for i in places)

    everyone = list(range(len(runs)))
    sections = [
        ("cost", "Accuracy and cost", _cost(runs, gallery)),
        ("schedules", "Schedules", _schedules(runs, gallery)),
        ("training", "Training", _training(runs, gallery)),
        ("views", "Views", _lead(VIEWS) + of_each(show_views, everyone)),
        ("choice", "What Hard Augment chooses", of_each(show_choice, hard) or _note("None of these runs chooses its views by their loss.")),
        ("embeddings", "Embeddings", f'<div class="charts middle">{of_each(show_embedding, everyone)}</div>'),
        ("neighbours", "Nearest neighbours", _lead(NEIGHBOURS) + of_each(show_neighbours, everyone)),
        ("config", "Configuration", _config(runs)),
        ("started", "How it was run", "".join(_heading(runs, i) + _starts(run) for i, run in enumerate(runs))),
    ]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in sections)
    bodies = "".join(f'<section id="{anchor}"><h2>{title}</h2>{body}</section>' for anchor, title, body in sections)
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(', '.join(run.name for run in runs))}</title><style>{CSS}</style></head>\n<body><main>"
        f"<h1>{' and '.join(escape(run.name) for run in runs) if len(runs) < 3 else f'{len(runs)} training runs'}</h1>"
        f'<p class="muted">{escape(_subject(runs))}</p><nav>{links}</nav>\n{bodies}\n'
        f"<footer>Written by python -m ffssl.report on {datetime.date.today().isoformat()}.</footer></main></body></html>\n"
    )
    return page, gallery.pngs


def _shown(show: Callable, run: ReportedRun, place: int, gallery: Gallery) -> str:
    """The run's part of a section, or why there is none."""
    try:
        if isinstance(run.method, UserError):
            raise run.method
        return show(run, run.method, place, gallery)
    except UserError as error:
        return _note(f"Not shown: {error}.")


def _subject(runs: list[ReportedRun]) -> str:
    """What is trained, in a line."""
    known = [run.options for run in runs if run.options is not None]
    parts = [
        sorted({options.method.name for options in known}), sorted({options.model.backbone for options in known}),
        sorted({options.data.train for options in known}),
    ]  # fmt: skip
    return " · ".join(", ".join(part) for part in parts if part)


def _lead(text: str) -> str:
    return f'<p class="muted">{text}</p>'


def _note(text: str, kind: str = "") -> str:
    return f'<p class="note {kind}">{escape(text)}</p>'


def _run_name(runs: list[ReportedRun], place: int) -> str:
    return f'<span class="run"><span class="swatch" style="--tone: var(--run{place % len(COLOURS)})"></span>{escape(runs[place].name)}</span>'


def _heading(runs: list[ReportedRun], place: int) -> str:
    return f"<h3>{_run_name(runs, place)}</h3>"


def _charts(charts: list[Chart], runs: list[ReportedRun], gallery: Gallery) -> str:
    names, unfinished = [run.name for run in runs], {i for i, run in enumerate(runs) if not run.finished}
    return "".join(gallery.draw(draw_chart(chart, names, unfinished), chart.name, chart.title) for chart in charts)


def _cost(runs: list[ReportedRun], gallery: Gallery) -> str:
    """The table of the runs, and Fig. 1."""
    evaluations = {run.evaluation for run in runs if run.last_evaluation}
    comparable = len(evaluations) == 1 and None not in evaluations
    warning = ""
    if len(evaluations) > 1:
        warning = _note(
            "These accuracies are of different data or measured in different ways, and not to be compared: "
            + "; ".join(f"{run.name}: {_describe_evaluation(run)}" for run in runs if run.last_evaluation) + ".", "warning",
        )  # fmt: skip
    charts = accuracy_charts(runs)
    curves = f'<div class="charts large">{_charts(charts, runs, gallery)}</div>' if charts else _note("No accuracy has been measured.")
    return warning + _table(runs, comparable) + curves


def _describe_evaluation(run: ReportedRun) -> str:
    if run.options is None:
        return "unknown"
    data, evaluate = run.options.data, run.options.evaluate
    return f"{data.validation} by {data.train}, k = {evaluate.k}, T = {evaluate.temperature:g}"


def _table(runs: list[ReportedRun], comparable: bool) -> str:
    """What each run reached and cost. comparable: with the first run's cost as a multiple of its own."""
    flops, flop_scale = flop_unit(max(run.rows[-1]["flops"] for run in runs))
    times, time_scale = time_unit(max(run.rows[-1]["seconds"] for run in runs))
    energy = any("kwh" in run.rows[-1] for run in runs)
    titles = ["run", "method", "epochs", "kNN accuracy", f"{flops}", f"{times}", *(["kWh"] if energy else [])]
    lines = []
    for i, run in enumerate(runs):
        row, evaluated = run.rows[-1], run.last_evaluation
        ratio = {key: _ratio(runs, run, key) if comparable and i else "" for key in ("flops", "seconds", "kwh")}
        method = (run.options.method.name, run.options.model.backbone) if run.options else ("unknown", "")
        epochs = f"{run.epoch}" if run.finished or not run.options else f"{run.epoch} of {run.options.training.epochs}"
        at = f"after epoch {evaluated['epoch']}" if evaluated and evaluated["epoch"] < run.epoch else ""
        cells = [
            (escape(method[0]), escape(method[1])), (epochs, ""), (f"{evaluated['knn']:.1%}" if evaluated else "–", at),
            (f"{row['flops'] * flop_scale:.1f}", ratio["flops"]), (f"{row['seconds'] * time_scale:.1f}", ratio["seconds"]),
            *([(f"{row['kwh']:.2f}" if "kwh" in row else "–", ratio["kwh"])] if energy else []),
        ]  # fmt: skip
        chip = "" if run.finished else ' <span class="unfinished">unfinished</span>'
        cells = [
            f'<td data-label="{title}"{"" if j == 0 else NUMBER}>{text}{f"<small>{more}</small>" if more else ""}</td>'
            for j, (title, (text, more)) in enumerate(zip(titles[1:], cells))
        ]
        lines.append(f'<tr><th scope="row">{_run_name(runs, i)}{chip}</th>{"".join(cells)}</tr>')
    heads = "".join(f'<th scope="col"{"" if j < 2 else NUMBER}>{title}</th>' for j, title in enumerate(titles))
    return (
        f'<div class="card scroll"><table class="summary"><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
        '<p class="muted">Accuracy of weighted kNN on the frozen features, the last that was measured. FLOPs in the standard count '
        "(backward = 2 forward); the time is that of training, without the evaluations.</p>"
    )


NUMBER = ' class="number"'


def _ratio(runs: list[ReportedRun], run: ReportedRun, key: str) -> str:
    """How many times as much the first run cost; nothing where one of them is unfinished, or has no such cost."""
    first, own = runs[0].rows[-1].get(key), run.rows[-1].get(key)
    return f"{first / own:.2f}× less than {escape(runs[0].name)}" if first and own and runs[0].finished and run.finished else ""


def _schedules(runs: list[ReportedRun], gallery: Gallery) -> str:
    """Figs. 2 and 3."""
    charts = schedule_charts(runs)
    if not charts:
        return _note("The runs' checkpoints, which hold their options, are gone or can't be read.")
    words = (
        '<div class="words">Momentum moves against the learning rate, which keeps the noise scale of the gradient, '
        "ε|D| / (B(1 − β)), in check. Where that noise is large, low resolution does no harm."
        f"{'' if all(run.finished for run in runs) else ' Dashed: epochs that are still to come.'}</div>"
    )
    return f'<div class="charts">{_charts(charts, runs, gallery)}{words}</div>'


def _training(runs: list[ReportedRun], gallery: Gallery) -> str:
    charts = training_charts(runs)
    several = len({run.options.method.name for run in runs if run.options}) > 1
    words = "The losses of different methods are not to be compared. " if several else ""
    words += (
        "Averages over each epoch. The spread is the standard deviation of the normalised embeddings times √d: 1 for directions at "
        "random, 0 after a collapse."
    )
    return f'{_lead(words)}<div class="charts">{_charts(charts, runs, gallery)}</div>' if charts else _note("No epoch has finished yet.")


def _config(runs: list[ReportedRun]) -> str:
    """The options that differ, then those that do not."""
    known = [i for i, run in enumerate(runs) if run.options is not None]
    if not known:
        return _note("The runs' checkpoints, which hold their options, are gone or can't be read.")
    differing, same = compare_options(runs)
    heads = "".join(f'<th scope="col">{_run_name(runs, i)}</th>' for i in known)
    lines = "".join(
        f'<tr class="differs"><th scope="row">{name}</th>{"".join(f"<td>{_value(value)}</td>" for value in values)}</tr>'
        for name, values in differing.items()
    )
    rest = "".join(f'<tr><th scope="row">{name}</th><td>{_value(value)}</td></tr>' for name, value in same.items())
    table = f'<div class="card scroll"><table class="config"><thead><tr><th></th>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'
    return (
        f"{table if differing else ''}<details{'' if differing else ' open'}><summary>{len(same)} options"
        f"{' that all runs share' if len(known) > 1 else ''}</summary>"
        f'<div class="card scroll"><table class="config"><tbody>{rest}</tbody></table></div></details>'
    )


def _value(value: object) -> str:
    return "–" if value is None else escape(str(value))


def _starts(run: ReportedRun) -> str:
    if not run.starts:
        return _note("This run kept no record of how it was started.")
    lists = []
    for i, start in enumerate(run.starts):
        fields = {
            "started" if i == 0 else "continued": start["started"], "command": start["command"], "device": start["device"],
            "machine": start["machine"], "git revision": start["git"] or "not from a checkout",
        }  # fmt: skip
        lists.append("".join(f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in fields.items()))
    return "".join(f'<dl class="card">{entries}</dl>' for entries in lists)
