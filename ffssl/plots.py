"""What the project's figures share: colours, markers, units and labels.

Colours and markers can be told apart without colour vision. Labels stand beside their points.
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
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

# The colours of Okabe and Ito, with two changes. Brown replaces their yellow. The black is not
# quite black: SVG leaves out pure black as the default, and a page could not change it.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#101010", "#8c6d31")
MARKERS = "osD^vP*X"


def ink(colour: str) -> str:
    """Return the colour of a text that belongs to a curve.

    It is darker than the curve: the lighter colours would be hard to read.
    """
    red, green, blue = (0.75 * part for part in to_rgb(colour))
    return to_hex((red, green, blue))


@functools.cache
def _fonts_for(characters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Find installed fonts for the characters that matplotlib's own font lacks.

    Return the families, and the characters that no installed font has.
    """
    own = font_manager.findfont(font_manager.FontProperties(family=["sans-serif"]))
    lacking = characters - _characters_in(own, characters)
    families = []
    for font in sorted(
        font_manager.fontManager.ttflist,
        key=lambda font: (font.name, font.style != "normal", abs(int(font.weight) - 400)),
    ):
        if not lacking:
            break
        # Last Resort has only boxes, for all of Unicode.
        if font.name in families or font.name.startswith("Last Resort"):
            continue
        if found := _characters_in(font.fname, lacking):
            families.append(font.name)
            lacking -= found
    return tuple(families), lacking


def _characters_in(path: str, characters: frozenset[str]) -> frozenset[str]:
    try:
        glyphs = font_manager.get_font(path).get_charmap()
    except (OSError, RuntimeError):  # a font that is gone, or that matplotlib can't read
        return frozenset()
    return frozenset(character for character in characters if ord(character) in glyphs)


@contextlib.contextmanager
def any_script(*texts: str) -> Iterator[None]:
    """Make figures with these texts inside the block, in any script, as Chinese.

    Installed fonts supply the characters that matplotlib's own font lacks.
    """
    families, _ = _fonts_for(frozenset("".join(texts)))
    with (
        matplotlib.rc_context({"font.family": ["sans-serif", *families]}),
        warnings.catch_warnings(),
    ):
        # In an SVG the reader's font has the glyph; for other formats see `drawable`.
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from")
        yield


def drawable(text: str) -> str:
    r"""Return `text` with the characters that no installed font has escaped, as in \u4e2d.

    An empty box would say nothing.
    """
    _, lacking = _fonts_for(frozenset(text))
    return "".join(c.encode("unicode_escape").decode() if c in lacking else c for c in text)


def flop_unit(largest: float) -> tuple[str, float]:
    """Return the unit for FLOPs of this size, and the factor that converts to it."""
    return next(
        (unit, 1 / size)
        for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9))
        if largest >= size or size == 1e9
    )


def time_unit(longest: float) -> tuple[str, float]:
    """Return the unit for a time in seconds of this size, and the factor that converts to it."""
    return next(
        (unit, 1 / size)
        for unit, size in (("hours", 3600), ("minutes", 60), ("seconds", 1))
        if longest >= 2 * size or size == 1
    )


def label(axis: Axes, labels: list[tuple[str, tuple[float, float], str]], size: float = 10) -> None:
    """Write each (text, point, colour) beside its point, in its colour.

    A text is near its point, but clear of the marks, of the other texts and, if possible, of the
    lines. The figure must have its final layout.
    """
    ends = axis.transData.transform([point for _, point, _ in labels] or np.empty((0, 2)))
    boxes = [Bbox.from_extents(x - 8, y - 8, x + 8, y + 8) for x, y in ends]
    collections = (one for one in axis.collections if isinstance(one, LineCollection))
    error_bars = [bar for bars in collections for bar in bars.get_segments()]
    lines = [line.get_xydata() for line in axis.lines] + error_bars
    drawn = np.concatenate(
        [_along(axis.transData.transform(line)) for line in lines] or [np.empty((0, 2))]
    )
    inside = axis.get_window_extent()
    # Offsets are set in points, so that the texts are in place at any resolution.
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
        best = _best_offset(end, extent, boxes, drawn, inside)
        boxes.append(_box(end + best, extent))
        x, y = best * points_per_pixel
        note.set_position((x, y))
        if _gap(best, extent) > 24:  # far from its point: a line leads there
            leader = {
                "arrowstyle": "-",
                "color": colour,
                "lw": 0.7,
                "shrinkA": extent[1] / 2 * points_per_pixel,
                "shrinkB": 6,
            }
            axis.annotate("", point, (x, y), textcoords="offset points", arrowprops=leader)


def _best_offset(
    end: np.ndarray, extent: np.ndarray, boxes: list[Bbox], drawn: np.ndarray, inside: Bbox
) -> np.ndarray:
    """Return the best offset of a text's centre from its point `end`, in pixels (2,).

    extent: the text's width and height. boxes: of the marks and the other texts. drawn: points
    (n, 2) on lines. inside: the axes.
    """

    def cost(offset: np.ndarray) -> float:
        box = _box(end + offset, extent)
        outside = (
            box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
        )
        crossed = ((drawn > box.min) & (drawn < box.max)).all(1).sum()
        overlaps = box.count_overlaps(boxes)
        return 1000 * outside + 300 * overlaps + crossed + _gap(offset, extent)

    angles = np.arange(16) * np.pi / 8
    offsets = [
        np.array([np.cos(a), np.sin(a)]) * (extent / 2 + gap)
        for gap in range(12, 130, 6)
        for a in angles
    ]
    return min(offsets, key=cost)


def _box(centre: np.ndarray, extent: np.ndarray) -> Bbox:
    return Bbox.from_bounds(*(centre - extent / 2), *extent)


def _gap(offset: np.ndarray, extent: np.ndarray) -> float:
    """Return the distance in pixels from a point to a text whose centre is at `offset` from it."""
    return np.hypot(*(np.abs(offset) - extent / 2).clip(0))


def _along(corners: np.ndarray) -> np.ndarray:
    """Return points (n, 2) along a polyline, about 4 pixels apart."""
    pieces = [
        np.linspace(a, b, int(np.hypot(*(b - a)) // 4) + 1, endpoint=False)
        for a, b in zip(corners, corners[1:])
    ]
    return np.concatenate([*pieces, corners[-1:]])
