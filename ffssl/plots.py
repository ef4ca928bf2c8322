"""What the project's pictures share: colours and marks that are told apart without colour vision,
units, and texts beside their points.
"""

import contextlib
import functools
import warnings
from collections.abc import Iterator

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

# Okabe and Ito's; a brown for their yellow, and not quite their black, which SVG takes for granted
# and a page could not change.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#101010", "#8c6d31")
MARKERS = "osD^vP*X"


def ink(colour: str) -> str:
    """The colour of a text that belongs to a curve: darker than the curve, or the lighter ones
    would be hard to read.
    """
    return to_hex(0.75 * np.array(to_rgb(colour)))


@functools.cache
def _fonts_for(characters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Families that have between them what matplotlib's own font lacks of `characters`, and what
    none of the installed ones has.
    """
    lacking = characters - _characters_in(
        font_manager.findfont(font_manager.FontProperties(family=["sans-serif"])), characters
    )
    families = []
    for font in sorted(
        font_manager.fontManager.ttflist,
        key=lambda font: (font.name, font.style != "normal", abs(int(font.weight) - 400)),
    ):
        if not lacking:
            break
        # Which has boxes for all of Unicode.
        if font.name in families or font.name.startswith("Last Resort"):
            continue
        if found := _characters_in(font.fname, lacking):
            families.append(font.name)
            lacking -= found
    return tuple(families), lacking


def _characters_in(path: str, characters: frozenset[str]) -> frozenset[str]:
    try:
        glyphs = font_manager.get_font(path).get_charmap()
    except (OSError, RuntimeError):  # fonts that are gone, and of kinds that matplotlib can't read
        return frozenset()
    return frozenset(character for character in characters if ord(character) in glyphs)


@contextlib.contextmanager
def any_script(*texts: str) -> Iterator[None]:
    """Inside, figures are made that hold these texts: in matplotlib's own font, and in installed
    ones what that lacks, as Chinese.
    """
    families, _ = _fonts_for(frozenset("".join(texts)))
    with (
        matplotlib.rc_context({"font.family": ["sans-serif", *families]}),
        warnings.catch_warnings(),
    ):
        # In an SVG the reader's font has it; for others see `drawable`.
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from")
        yield


def drawable(text: str) -> str:
    """`text`, with what no installed font has escaped, as in \\u4e2d: an empty box would say
    nothing.
    """
    _, lacking = _fonts_for(frozenset(text))
    return "".join(c.encode("unicode_escape").decode() if c in lacking else c for c in text)


def flop_unit(largest: float) -> tuple[str, float]:
    """The unit to state FLOPs of this size in, and what to multiply them by."""
    return next(
        (unit, 1 / size)
        for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9))
        if largest >= size or size == 1e9
    )


def time_unit(longest: float) -> tuple[str, float]:
    """The same for seconds."""
    return next(
        (unit, 1 / size)
        for unit, size in (("hours", 3600), ("minutes", 60), ("seconds", 1))
        if longest >= 2 * size or size == 1
    )


def label(axis: Axes, labels: list[tuple[str, tuple[float, float], str]], size: float = 10) -> None:
    """Write each (text, point, colour) beside its point, in its colour: near, but clear of the
    marks, the other texts and, if it can be, the lines.

    The figure must have been laid out, for good.
    """
    ends = axis.transData.transform([point for _, point, _ in labels] or np.empty((0, 2)))
    boxes = [Bbox.from_extents(x - 8, y - 8, x + 8, y + 8) for x, y in ends]
    lines = [line.get_xydata() for line in axis.lines] + [
        bar for bars in axis.collections for bar in bars.get_segments()
    ]
    drawn = np.concatenate(
        [_along(axis.transData.transform(line)) for line in lines] or [np.empty((0, 2))]
    )
    inside = axis.get_window_extent()
    # Points, so that the texts are in place at any resolution.
    points_per_pixel = 72 / axis.figure.dpi
    for (text, point, colour), end in zip(labels, ends):
        note = axis.annotate(
            text,
            point,
            (0, 0),
            textcoords="offset points",
            color=ink(colour),
            fontsize=size,
            ha="center",
            va="center",
            parse_math=False,
        )
        note.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        extent = np.array(note.get_window_extent().size)

        def box_at(offset: np.ndarray) -> Bbox:
            return Bbox.from_bounds(*(end + offset - extent / 2), *extent)

        def cost(offset: np.ndarray) -> float:
            box = box_at(offset)
            outside = (
                box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
            )
            crossed = ((drawn > box.min) & (drawn < box.max)).all(1).sum()
            return (
                1000 * outside
                + 300 * box.count_overlaps(boxes)
                + crossed
                + np.hypot(*(np.abs(offset) - extent / 2).clip(0))
            )

        angles = np.arange(16) * np.pi / 8
        places = [
            np.array([np.cos(a), np.sin(a)]) * (extent / 2 + gap)
            for gap in range(12, 130, 6)
            for a in angles
        ]
        best = min(places, key=cost)
        boxes.append(box_at(best))
        note.set_position(best * points_per_pixel)
        if np.hypot(*(np.abs(best) - extent / 2).clip(0)) > 24:
            axis.annotate(
                "",
                point,
                best * points_per_pixel,
                textcoords="offset points",
                arrowprops={
                    "arrowstyle": "-",
                    "color": colour,
                    "lw": 0.7,
                    "shrinkA": extent[1] / 2 * points_per_pixel,
                    "shrinkB": 6,
                },
            )


def _along(corners: np.ndarray) -> np.ndarray:
    """Points (n, 2) on a polyline, about 4 pixels apart."""
    pieces = [
        np.linspace(a, b, int(np.hypot(*(b - a)) // 4) + 1, endpoint=False)
        for a, b in zip(corners, corners[1:])
    ]
    return np.concatenate([*pieces, corners[-1:]])
