"""The report's curves: their data, and their drawing.

They are drawn as SVG that follows the page's colours, and as PNG.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from xml.etree import ElementTree

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text

from ffssl.plots import COLOURS, MARKERS, any_script, drawable, flop_unit, ink, label, time_unit
from ffssl.report.runs import ReportedRun

INK, MUTED, RULE, PAPER = "#1f2328", "#59636e", "#d9dee3", "#ffffff"
# The colours of the drawings, and the page's names for them.
VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", PAPER: "--card"} | {
    tone: name
    for i, colour in enumerate(COLOURS)
    for tone, name in ((ink(colour), f"--ink{i}"), (colour, f"--run{i}"))
}
LOOK = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.edgecolor": MUTED,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titlecolor": INK,
    "axes.titlepad": 10,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.xmargin": 0.03,
    "axes.ymargin": 0.1,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "svg.fonttype": "none",
}
SVG, XLINK_HREF = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
MOST_TICKS = 8
MOST_LABELLED = 6  # runs; the page's list of runs has the colours of the others


@dataclass(frozen=True)
class Curve:
    """A run's line.

    run: its index among the runs. ahead: the part that is still to come, drawn dashed.
    """

    run: int
    x: np.ndarray
    y: np.ndarray
    ahead: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True)
class Chart:
    name: str
    title: str
    x_label: str
    curves: list[Curve]
    steps: bool = False
    marks: bool = False
    from_zero: bool = False
    size: tuple[float, float] = (4.6, 3.1)  # inches


def accuracy_charts(runs: list[ReportedRun]) -> list[Chart]:
    """Return charts of kNN accuracy over each cost that the logs have (Fig. 1)."""
    charts = []
    for key, title, unit_of in (
        ("flops", "FLOPs", flop_unit),
        ("seconds", "time", time_unit),
        ("kwh", "energy", lambda _: ("kWh", 1)),
    ):
        unit, scale = unit_of(max((row.get(key, 0) for run in runs for row in run.rows), default=0))
        chart = _logged(
            runs,
            "knn",
            f"accuracy-{title}".lower(),
            f"kNN accuracy (%) over {title}",
            x=key,
            scale=100,
            x_scale=scale,
        )
        charts.append(replace(chart, x_label=f"{unit} of training", marks=True, size=(5.3, 3.4)))
    return [chart for chart in charts if chart.curves]


def schedule_charts(runs: list[ReportedRun]) -> list[Chart]:
    """Return charts of what changes by the step or by the epoch (Figs. 2 and 3).

    They show the whole schedule, dashed where it is still to come.
    """
    known = [(i, run) for i, run in enumerate(runs) if run.options is not None]

    def by_step(
        value: Callable, name: str, title: str, which: list[tuple[int, ReportedRun]] = known
    ) -> Chart:
        curves = []
        for i, run in which:
            schedule = run.schedule
            y = np.array([value(run, schedule, step) for step in range(schedule.total_steps)])
            curves.append(
                _split(
                    i,
                    np.arange(schedule.total_steps) / schedule.steps_per_epoch,
                    y,
                    run.epoch * schedule.steps_per_epoch,
                )
            )
        return Chart(name, title, "epoch", curves)

    def by_epoch(value: Callable, name: str, title: str) -> Chart:
        curves = []
        for i, run in known:
            y = np.array(
                [value(run.schedule, epoch) for epoch in range(run.options.training.epochs)]
            )
            curves.append(_split(i, np.arange(len(y) + 1), np.append(y, y[-1:]), run.epoch))
        return Chart(name, title, "epoch", curves, steps=True)

    counted = [(i, run) for i, run in known if run.samples]

    charts = [
        by_step(
            lambda run, schedule, step: schedule.learning_rate_and_momentum(step)[0],
            "learning-rate",
            "learning rate",
        ),
        by_step(
            lambda run, schedule, step: schedule.learning_rate_and_momentum(step)[1],
            "momentum",
            "momentum",
        ),
        by_step(
            lambda run, schedule, step: schedule.noise_scale(step, run.samples),
            "noise-scale",
            "noise scale of the gradient",
            counted,
        ),
        by_epoch(
            lambda schedule, epoch: schedule.resolution(epoch), "resolution", "resolution (pixels)"
        ),
        by_epoch(
            lambda schedule, epoch: schedule.magnitude(epoch), "magnitude", "augmentation magnitude"
        ),
    ]
    return [chart for chart in charts if chart.curves]


def training_charts(runs: list[ReportedRun]) -> list[Chart]:
    """Return charts of what was measured in each epoch."""
    charts = [
        _logged(runs, "loss", "loss", "loss"),
        replace(
            _logged(
                runs, "embedding_std", "embedding-spread", "spread of the embeddings (0: collapse)"
            ),
            from_zero=True,
        ),
        _logged(
            runs,
            "hardness",
            "hardness",
            "loss of the chosen pairs - of random ones (below 0: easy pairs)",
        ),
        _logged(
            runs,
            "predictor_cosine",
            "predictor-cosine",
            "cosine of projection and prediction (-1: upside down)",
        ),
        replace(
            _logged(runs, "effective_rank", "effective-rank", "effective rank of the embeddings"),
            from_zero=True,
        ),
        replace(_logged(runs, "knn", "accuracy-epochs", "kNN accuracy (%)", scale=100), marks=True),
        replace(
            _logged(runs, "linear_top1", "linear-epochs", "online linear accuracy (%)", scale=100),
            marks=True,
        ),
        replace(
            _logged(runs, "images_per_second", "throughput", "images per second"), from_zero=True
        ),
        replace(
            _logged(runs, "data_wait", "data-wait", "waiting for data (% of the time)", scale=100),
            from_zero=True,
        ),
        _epoch_costs(runs),
    ]
    return [chart for chart in charts if chart.curves]


def _logged(
    runs: list[ReportedRun],
    key: str,
    name: str,
    title: str,
    *,
    x: str = "epoch",
    scale: float = 1,
    x_scale: float = 1,
) -> Chart:
    """Return a chart of one quantity of the log over another."""
    curves = []
    for i, run in enumerate(runs):
        rows = [row for row in run.rows if key in row and x in row]
        if rows:
            curves.append(
                Curve(
                    i,
                    x_scale * np.array([row[x] for row in rows]),
                    scale * np.array([row[key] for row in rows]),
                )
            )
    return Chart(name, title, x, curves)


def _epoch_costs(runs: list[ReportedRun]) -> Chart:
    """Return a chart of each epoch's cost: the growth of the sum in the log."""
    costs = [
        np.diff([row["flops"] for row in run.rows], prepend=[] if run.rows[0]["epoch"] == 0 else 0)
        for run in runs
    ]
    unit, scale = flop_unit(max((cost.max() for cost in costs if len(cost)), default=0))
    curves = [
        Curve(i, np.array([row["epoch"] for row in run.rows[-len(cost) :]]), scale * cost)
        for i, (run, cost) in enumerate(zip(runs, costs))
        if len(cost)
    ]
    return Chart("epoch-cost", f"{unit} of each epoch", "epoch", curves, from_zero=True)


def _split(run: int, x: np.ndarray, y: np.ndarray, done: int) -> Curve:
    return Curve(
        run, x[: done + 1], y[: done + 1], (x[done:], y[done:]) if done + 1 < len(x) else None
    )


def draw_chart(chart: Chart, names: list[str], unfinished: set[int]) -> Figure:
    """Draw a chart.

    names: of all runs. unfinished: the indices of runs whose last mark is to be hollow.
    """
    with matplotlib.rc_context(LOOK), any_script(*names):
        figure = Figure(chart.size, dpi=144, layout="constrained")
        axis = figure.subplots()
        style = "steps-post" if chart.steps else "default"
        ends = []
        for curve in chart.curves:
            colour = COLOURS[curve.run % len(COLOURS)]
            few = chart.marks or len(curve.x) == 1
            marker = (
                MARKERS[(curve.run + curve.run // len(COLOURS)) % len(MARKERS)] if few else None
            )
            axis.plot(curve.x, curve.y, color=colour, drawstyle=style, marker=marker)
            if curve.ahead:
                axis.plot(*curve.ahead, color=colour, drawstyle=style, lw=1.2, ls=(0, (3, 2)))
            if few and curve.run in unfinished:
                axis.plot(curve.x[-1:], curve.y[-1:], color=colour, marker=marker, mfc=PAPER, ms=7)
            last = curve.ahead or (curve.x, curve.y)
            middle = len(last[0]) // 2
            at = -1 if chart.marks or chart.steps or len(last[0]) < 30 else middle
            ends.append((_shortened(names[curve.run]), (last[0][at], last[1][at]), colour))
        axis.set_title(chart.title, parse_math=False)
        axis.set_xlabel(chart.x_label)
        if chart.from_zero:
            axis.set_ylim(bottom=0, top=axis.get_ylim()[1] * 1.05 or 1)
        if chart.x_label == "epoch":
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.set_xlim(left=min(axis.get_xlim()[0], -0.03 * axis.get_xlim()[1]))
        values = np.unique(np.concatenate([curve.y for curve in chart.curves]))
        if chart.steps and len(values) <= MOST_TICKS and (values == values.round()).all():
            axis.set_yticks(values)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the labels are placed for the layout as it is now
        if len(names) <= MOST_LABELLED:
            label(axis, ends)
    return figure


def _shortened(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:10]}…{name[-10:]}"


def render(figure: Figure, name: str, title: str) -> tuple[str, bytes]:
    """Return a figure as an SVG element and as PNG.

    The SVG is for a page that defines VARIABLES. `name` keeps its ids apart from other figures'.
    """
    texts = {text: text.get_text() for text in figure.findobj(Text)}
    with matplotlib.rc_context(LOOK | {"svg.hashsalt": name}), any_script():
        png = io.BytesIO()
        for text, words in texts.items():
            text.set_text(drawable(words))
        figure.savefig(png, format="png", facecolor=PAPER)
        for text, words in texts.items():
            text.set_text(words)
            # With one, a text would be drawn as outlines; the page gives it a border by CSS.
            text.set_path_effects([])
        svg = io.StringIO()
        figure.savefig(svg, format="svg", transparent=True, metadata=NO_METADATA)
    return _inline(svg.getvalue(), title), png.getvalue()


def _inline(svg: str, title: str) -> str:
    """Return an SVG document of matplotlib's as an element of the page, in the page's colours."""
    root = ElementTree.fromstring(svg)
    root.attrib = {"viewBox": root.get("viewBox"), "role": "img", "aria-label": title}
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        if element.tag == "g":  # "axes_1" in every figure; nothing refers to them
            element.attrib.pop("id", None)
        if target := element.attrib.pop(XLINK_HREF, None):
            element.set("href", target)
        if style := element.get("style"):
            for colour, variable in VARIABLES.items():
                style = style.replace(colour, f"var({variable})")
            element.set("style", style)
    return ElementTree.tostring(root, encoding="unicode")


def draw_shares(
    shares: np.ndarray, names: list[str], title: str, x_label: str, colour: str
) -> Figure:
    """Draw bars of shares (0..1), and a line at the height of equal shares."""
    with matplotlib.rc_context(LOOK):
        figure = Figure((4.6, 3.1), dpi=144, layout="constrained")
        axis = figure.subplots()
        bars = axis.bar(names, 100 * shares, color=colour, width=0.72)
        axis.axhline(100 / len(shares), color=INK, lw=1.2, ls=(0, (4, 3)))
        if len(shares) <= 10:
            axis.bar_label(
                bars, [f"{share:.0%}" for share in shares], padding=2, color=INK, fontsize=9
            )
        axis.set_ylim(0, max(100 * shares.max() * 1.15, 130 / len(shares)))
        if len(shares) > 10:
            axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(8, integer=True))
        axis.set_title(title, parse_math=False)
        axis.set_xlabel(x_label)
    return figure


def draw_points(
    points: np.ndarray, labels: np.ndarray, names: dict[int, str], title: str
) -> Figure:
    """Draw points (n, 2), with a colour and a mark for each label, named at its middle.

    Points whose label is not in `names` are grey.
    """
    with (
        matplotlib.rc_context(
            LOOK | {"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}
        ),
        any_script(*names.values()),
    ):
        figure = Figure((4.6, 4.4), dpi=144, layout="constrained")
        axis = figure.subplots()
        others = ~np.isin(labels, list(names))
        axis.plot(*points[others].T, "o", color=MUTED, ms=2.8, mew=0, alpha=0.7)
        for i, value in enumerate(names):
            own = points[labels == value]
            axis.plot(
                *own.T,
                MARKERS[i % len(MARKERS)],
                color=COLOURS[i % len(COLOURS)],
                ms=3.2,
                mew=0,
                alpha=0.75,
            )
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, parse_math=False)
        for i, (value, name) in enumerate(names.items()):
            middle = np.median(points[labels == value], axis=0)
            tone = ink(COLOURS[i % len(COLOURS)])
            text = axis.text(
                *middle,
                _shortened(name),
                color=tone,
                ha="center",
                va="center",
                weight="bold",
                parse_math=False,
            )
            text.set_path_effects([withStroke(linewidth=2.5, foreground=PAPER)])
    return figure
