"""The report's page: its sections as HTML, and the pictures that lie beside it."""

import datetime
import io
import math
import re
from collections.abc import Callable
from html import escape

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from ffssl.errors import UserError
from ffssl.figures import COLOURS, flop_unit, time_unit
from ffssl.hard_augment import pairs
from ffssl.methods import Method
from ffssl.report import samples
from ffssl.report.charts import Chart, accuracy_charts, draw_chart, draw_points, draw_shares, render, schedule_charts, training_charts
from ffssl.report.images import contact_sheet, data_uri
from ffssl.report.runs import ReportedRun, compare_options
from ffssl.report.style import CSS

SHOWN_SIDE = 104  # CSS pixels that the largest views may take; where they are smaller, they are enlarged a whole number of times


class Gallery:
    """The pictures of a report, drawn once: as SVG for the page, and in `pngs`, by file name, to lie beside it."""

    def __init__(self):
        self.pngs: dict[str, bytes] = {}

    def draw(self, figure: Figure, name: str, title: str) -> str:
        """The figure as a card of the page. name: unique, of letters, digits and hyphens."""
        svg, self.pngs[f"{name}.png"] = render(figure, name, title)
        return f'<div class="card">{svg}</div>'

    def add(self, image: Image.Image, name: str) -> None:
        file = io.BytesIO()
        image.save(file, "PNG", optimize=True)
        self.pngs[f"{name}.png"] = file.getvalue()


def compose(runs: list[ReportedRun], device: torch.device) -> tuple[str, dict[str, bytes]]:
    """The page, and PNGs of its pictures by file name. device: where the checkpoints' networks run."""
    gallery = Gallery()
    methods = [_load(run, device) for run in runs]
    hard = [i for i, run in enumerate(runs) if run.options is not None and run.options.hard_augment.select == "hard"]

    def of_each(show: Callable[[ReportedRun, Method, int, Gallery], str], places: list[int]) -> str:
        return "".join(f"<div>{_run_heading(runs, i)}{_shown(show, runs[i], methods[i], i, gallery)}</div>" for i in places)

    everyone = list(range(len(runs)))
    sections = [
        ("cost", "Accuracy and cost", _cost(runs, gallery)),
        ("schedules", "Schedules", _schedules(runs, gallery)),
        ("training", "Training", _training(runs, gallery)),
        ("views", "Views", VIEWS + of_each(_views, everyone)),
        ("choice", "What Hard Augment chooses", of_each(_choice, hard) or _note("None of these runs chooses its views by their loss.")),
        ("embeddings", "Embeddings", f'<div class="charts middle">{of_each(_embedding, everyone)}</div>'),
        ("neighbours", "Nearest neighbours", NEIGHBOURS + of_each(_neighbours, everyone)),
        ("config", "Configuration", _config(runs)),
        ("started", "How it was run", "".join(_run_heading(runs, i) + _starts(run) for i, run in enumerate(runs))),
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


def _load(run: ReportedRun, device: torch.device) -> Method | UserError:
    try:
        if run.options is None:
            raise UserError(f"{run.folder} holds no checkpoint, from which this would be computed")
        return run.method(device)
    except UserError as error:
        return error


def _shown(show: Callable, run: ReportedRun, method: Method | UserError, place: int, gallery: Gallery) -> str:
    """The run's part of a section, or why there is none."""
    try:
        if isinstance(method, UserError):
            raise method
        return show(run, method, place, gallery)
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


def _note(text: str, kind: str = "") -> str:
    return f'<p class="note {kind}">{escape(text)}</p>'


def _run_name(runs: list[ReportedRun], place: int) -> str:
    return f'<span class="run"><span class="swatch" style="--tone: var(--run{place % len(COLOURS)})"></span>{escape(runs[place].name)}</span>'


def _run_heading(runs: list[ReportedRun], place: int) -> str:
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
        return _note("The runs' checkpoints, which hold their options, are gone.")
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
    return f'<p class="muted">{words}</p><div class="charts">{_charts(charts, runs, gallery)}</div>' if charts else _note("No epoch has finished yet.")


VIEWS = (
    '<p class="muted">The views of a few images, as the training sees them in a few of its epochs, as large beside each other as they are '
    "in pixels. Framed: the pair that Hard Augment chooses, with the weights of the checkpoint.</p>"
)


def _views(run: ReportedRun, method: Method, place: int, gallery: Gallery) -> str:
    epochs = samples.views_by_epoch(run, method)
    count, largest = epochs[0].views.shape[1], max(one.resolution for one in epochs)
    across = math.ceil(count**0.5)
    zoom = max(1, SHOWN_SIDE // largest)
    rows, sheet = [], []
    for one in epochs:
        chosen = [set(pair) for pair in one.chosen.tolist()] if one.chosen is not None else [set()] * len(one.views)
        cells = ""
        for views, pair in zip(one.views, chosen):
            images = "".join(
                f'<img src="{data_uri(view)}" alt="{"chosen view" if v in pair else "view"}"{CHOSEN if v in pair else ""}>' for v, view in enumerate(views)
            )
            cells += f'<div class="views">{images}</div>'
        to_come = "<small>to come</small>" if one.epoch >= run.epoch else ""
        rows.append(
            f'<div class="epoch"><div><b>epoch {one.epoch + 1}</b><small>{one.resolution} px</small><small>magnitude {one.magnitude:.3g}</small>'
            f'{to_come}</div><div class="images" style="--share: {one.resolution / largest:.4f}">{cells}</div></div>'
        )
        sheet.append([cell for views, pair in zip(one.views, chosen) for cell in [*((view, v in pair) for v, view in enumerate(views)), None]][:-1])
    gallery.add(contact_sheet(sheet), f"views-{place + 1}-{_slug(run.name)}")
    enlarged = f" Enlarged {zoom} times." if zoom > 1 else ""
    select = run.options.hard_augment.select
    words = {
        "hard": f"{count} views of each image; the pair is chosen at {run.options.hard_augment.resolution} px.",
        "random": f"{count} views of each image, of which a pair is drawn at random in every step.",
        "off": f"{count} views of each image.",
    }[select]
    return (
        f'<p class="muted">{words}{enlarged}</p><div class="card epochs{" pixels" if zoom > 1 else ""}" '
        f'style="--side: {zoom * largest}px; --across: {across}">{"".join(rows)}</div>'
    )


CHOSEN = ' class="chosen"'


def _choice(run: ReportedRun, method: Method, place: int, gallery: Gallery) -> str:
    """How good the cheap choice is, and whether it prefers views by their place."""
    choice = samples.examine_choice(run, method)
    candidates = pairs(choice.views).tolist()
    ranks = torch.bincount(choice.ranks, minlength=len(candidates)).numpy() / len(choice.ranks)
    positions = torch.bincount(choice.positions, minlength=len(candidates)).numpy() / len(choice.positions)
    colour = COLOURS[place % len(COLOURS)]
    same = choice.selection_resolution == choice.resolution
    words = (
        f"Of {len(candidates)} pairs, the pass at {choice.selection_resolution} px chooses the one that is the hardest at {choice.resolution} px, "
        f"where it is trained on, for {ranks[0]:.0%} of the images; at random it would be {1 / len(candidates):.0%}. Mean loss at "
        f"{choice.resolution} px: {choice.losses['chosen']:.3f} of the chosen pairs, {choice.losses['hardest']:.3f} of the hardest, "
        f"{choice.losses['random']:.3f} of all."
        + (" Both resolutions are the same in this epoch." if same else "")
    )
    drawn = [
        (ranks, [str(rank + 1) for rank in range(len(ranks))], "rank", f"rank of the chosen pair at {choice.resolution} px (1: hardest)"),
        (positions, [f"{a + 1}, {b + 1}" for a, b in candidates], "position", "which views are chosen"),
    ]
    cards = "".join(
        gallery.draw(draw_shares(shares, names, f"chosen pairs (%) by {what}", x_label, colour), f"choice-{what}-{place + 1}-{_slug(run.name)}", what)
        for shares, names, what, x_label in drawn
    )
    return (
        f'<div class="charts">{cards}<div class="words">{words}<br><br>{len(choice.ranks)} images with the views of epoch {max(run.epoch, 1)} and '
        "the weights of the checkpoint. The dashed line is a choice at random.</div></div>"
    )


def _embedding(run: ReportedRun, method: Method, place: int, gallery: Gallery) -> str:
    embedding = samples.embed(run, method)
    labels = embedding.labels.numpy()
    names = {label: samples.class_name(embedding.class_names, label) for label in np.unique(labels[labels >= 0]).tolist()}
    by = "UMAP" if embedding.explained is None else "PCA"
    figure = draw_points(embedding.points.numpy(), labels, names, f"features by {by}")
    card = gallery.draw(figure, f"embeddings-{place + 1}-{_slug(run.name)}", f"features by {by}")
    of_classes = f" of {len(names)} of {embedding.classes} classes" if len(names) < embedding.classes else ""
    words = f"Normalised features of {len(labels)} images{of_classes} of {escape(samples.evaluation_path(run))}, in the plane by {by}"
    if embedding.explained is not None:
        words += (
            f", whose two directions hold {embedding.explained:.0%} of the variance: classes that lie on one another here may be apart in "
            "others. With umap-learn installed, this is a UMAP"
        )
    return f'{card}<p class="caption">{words}.</p>'


NEIGHBOURS = (
    '<p class="muted">Images, and the training images whose features are nearest to theirs by the cosine, nearest first. Dashed: those of '
    "another class.</p>"
)


def _neighbours(run: ReportedRun, method: Method, place: int, gallery: Gallery) -> str:
    near = samples.nearest_neighbours(run, method)
    rows, sheet = [], []
    for i, query_label in enumerate(near.query_labels.tolist()):
        figures = [_thumbnail(near.queries[i], _class(near, query_label) or "image", "")]
        for image, label, cosine in zip(near.found[i], near.found_labels[i].tolist(), near.cosines[i].tolist()):
            other = query_label >= 0 and label != query_label
            figures.append(_thumbnail(image, f"{_class(near, label)} {cosine:.2f}", ' class="other"' if other else ""))
        rows.append(f'<div class="row">{"".join(figures)}</div>')
        sheet.append([(near.queries[i], False), None, *((image, False) for image in near.found[i])])
    gallery.add(contact_sheet(sheet), f"neighbours-{place + 1}-{_slug(run.name)}")
    return f'<div class="card neighbours">{"".join(rows)}</div>'


def _class(near: samples.Neighbours, label: int) -> str:
    return samples.class_name(near.class_names, label) if label >= 0 else ""


def _thumbnail(image: torch.Tensor, caption: str, attributes: str) -> str:
    return f'<figure{attributes}><img src="{data_uri(image)}" alt=""><figcaption>{escape(caption)}</figcaption></figure>'


def _config(runs: list[ReportedRun]) -> str:
    """The options that differ, then those that do not."""
    known = [i for i, run in enumerate(runs) if run.options is not None]
    if not known:
        return _note("The runs' checkpoints, which hold their options, are gone.")
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


def _slug(name: str) -> str:
    """A part of a file name and of an id."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40] or "run"
