"""A data set that needs no download: eight classes of drawn motifs.

It serves the demo, the tests and first experiments.

    images = EmbeddedDataset("train", 4000)
    image, label = images[0]

Every image scatters copies of one motif, so that any crop of a fifth of its area shows the class.
All else says nothing about the class: the size, rotation, colour and polarity of each copy, the
clouds and strokes behind it, the light, the grain. It varies inside an image as much as between
images, so that it does not tell images apart either. All motifs have the same area.

The pixels come from a counter-based bit generator and element-wise IEEE arithmetic alone. They
depend neither on numpy's version nor on the order in which images are asked for.
"""

import math
import operator
from collections.abc import Callable

import numpy as np
from numpy import maximum, minimum, sqrt

SPLITS = ("train", "val")
SIDES = (64, 160)  # shortest and longest side of an image, in pixels

Field = np.ndarray  # float32: one number per pixel
# Signed distance of (x, y) to an outline of unit area, negative inside.
Shape = Callable[[Field, Field], Field]


def _disc(x: Field, y: Field) -> Field:
    return sqrt(x * x + y * y) - 0.564


def _ring(x: Field, y: Field) -> Field:
    return abs(sqrt(x * x + y * y) - 0.68) - 0.117


def _target(x: Field, y: Field) -> Field:
    radius = sqrt(x * x + y * y)
    return minimum(radius - 0.28, abs(radius - 0.69) - 0.0868)


def _triangle(x: Field, y: Field) -> Field:
    return maximum(abs(x) * 0.866 - y * 0.5, y) - 0.4387


def _cross(x: Field, y: Field) -> Field:
    x, y = abs(x), abs(y)
    return maximum(maximum(x, y) - 0.85, minimum(x, y) - 0.163)


def _star(x: Field, y: Field) -> Field:
    x = abs(x)
    # Mirror onto the sector of the topmost point.
    for nx, ny in ((0.80902, -0.58779), (-0.80902, -0.58779)):
        beyond = 2 * maximum(nx * x + ny * y, 0)
        x, y = x - beyond * nx, y - beyond * ny
    return abs(x) * 0.951 + y * 0.309 - 0.2917


def _crescent(x: Field, y: Field) -> Field:
    return maximum(sqrt((x - 0.28) ** 2 + y * y) - 0.79, 0.6 - sqrt((x - 0.66) ** 2 + y * y))


def _dots(x: Field, y: Field) -> Field:
    lower = sqrt((abs(x) - 0.5) ** 2 + (y - 0.29) ** 2)
    return minimum(lower, sqrt(x * x + (y + 0.58) ** 2)) - 0.326


MOTIFS: dict[str, Shape] = {
    "disc": _disc,
    "ring": _ring,
    "target": _target,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
    "crescent": _crescent,
    "dots": _dots,
}


def _stroke(x: Field, y: Field) -> Field:
    return sqrt(maximum(abs(x) - 0.9, 0) ** 2 + y * y) - 0.1


class EmbeddedDataset:
    """The images and their labels, by index.

    dataset[i] is (image, label): uint8 RGB (H, W, 3) with sides of 64 to 160 pixels, and an int in
    0 .. 7. Image i depends on (`seed`, `split`, i) alone, so a smaller data set is the beginning of
    a larger one. The label of image i is i mod 8.

    Raises ValueError for an unknown split, a size below 1 or a seed that does not fit in 64 bits.
    """

    class_names: list[str] = list(MOTIFS)

    def __init__(self, split: str, size: int, seed: int = 0):
        if split not in SPLITS:
            raise ValueError(
                f"split is {split!r}; the embedded data set has {' and '.join(SPLITS)}"
            )
        if size < 1:
            raise ValueError(f"size is {size}; the embedded data set needs at least one image")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}; it must lie in 0 .. 2**64 - 1")
        self.split, self.size, self.seed = split, size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        i = operator.index(i)
        if not 0 <= i < self.size:
            raise IndexError(f"image {i} of an embedded data set of {self.size}")
        label = i % len(MOTIFS)
        bits = np.random.Philox(key=SPLITS.index(self.split) << 64 | self.seed, counter=i << 192)
        return _draw(MOTIFS[self.class_names[label]], Uniforms(bits)), label


class Uniforms:
    """Uniform float32 numbers from raw bits.

    Numpy keeps the stream of a bit generator from version to version, but not that of `Generator`.
    """

    def __init__(self, bits: np.random.BitGenerator):
        self.bits = bits

    def __call__(self, low: float, high: float, *shape: int) -> Field:
        unit = (self.bits.random_raw(math.prod(shape)) >> 11) * 2.0**-53
        return (low + (high - low) * unit).astype(np.float32).reshape(shape)

    def between(self, low: float, high: float) -> float:
        return self(low, high, 1).item()

    def grain(self, *shape: int) -> Field:
        """Return cheap noise in [-1, 1), from one byte a number."""
        count = math.prod(shape)
        octets = self.bits.random_raw(math.ceil(count / 8)).view(np.uint8)[:count]
        return (octets.astype(np.float32) / 128 - 1).reshape(shape)


def _draw(motif: Shape, uniform: Uniforms) -> np.ndarray:
    height, width = round(uniform.between(*SIDES)), round(uniform.between(*SIDES))
    short = min(height, width)
    canvas = _clouds(3, height, width, uniform)
    _scatter(
        canvas, _stroke, uniform, cell=short / 2.4, sizes=(0.1 * short, 0.2 * short), opacity=0.4
    )
    _scatter(
        canvas, motif, uniform, cell=short / 2.4, sizes=(0.23 * short, 0.33 * short), opacity=0.95
    )
    canvas *= 0.5 + _clouds(1, height, width, uniform)
    canvas += 0.04 * uniform.grain(height, width)
    return (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0).copy()


def _clouds(channels: int, height: int, width: int, uniform: Uniforms, cells: int = 6) -> Field:
    """Draw clouds: (channels, height, width) in [0.25, 0.75].

    They are random values on a coarse grid, smoothly interpolated.
    """
    grid = uniform(0.25, 0.75, channels, cells + 1, cells + 1)
    return _interpolate(_interpolate(grid, height).swapaxes(1, 2), width)


def _interpolate(grid: Field, count: int) -> Field:
    """Return `count` values along the last axis, smooth between the knots of `grid`."""
    knots = grid.shape[-1]
    at = np.arange(count, dtype=np.float32) * ((knots - 1) / count)
    knot = at.astype(np.intp)
    t = at - knot.astype(np.float32)
    t = t * t * (3 - 2 * t)
    return grid[..., knot] * (1 - t) + grid[..., knot + 1] * t


def _scatter(
    canvas: Field,
    shape: Shape,
    uniform: Uniforms,
    *,
    cell: float,
    sizes: tuple[float, float],
    opacity: float,
) -> None:
    """Paint one copy of `shape` into each cell of a jittered grid, light and dark in turns.

    A copy has area size**2. Light and dark take turns because two views of an image could be
    matched by a random share of light copies.
    """
    height, width = canvas.shape[1:]
    # How far the grid begins outside the canvas.
    above, before = uniform.between(0, cell), uniform.between(0, cell)
    rows, columns = math.ceil((height + above) / cell), math.ceil((width + before) / cell)
    count = rows * columns
    row, column = np.divmod(np.arange(count), columns)
    y = (row + 0.5 + uniform(-0.15, 0.15, count)) * cell - above
    x = (column + 0.5 + uniform(-0.15, 0.15, count)) * cell - before
    is_light = ((row + column) % 2 == 0)[:, None]
    light, dark = uniform(0.75, 1, count, 3), uniform(0, 0.25, count, 3)
    colours = np.where(is_light, light, dark)[:, :, None, None]
    scale = uniform(*sizes, count)
    angles = uniform(0, 2 * math.pi, count)
    for k in range(count):
        size, angle = scale[k].item(), angles[k].item()
        (top, dy), (left, dx) = _span(y[k].item(), size, height), _span(x[k].item(), size, width)
        dy, cos, sin = dy[:, None], math.cos(angle) / size, math.sin(angle) / size
        distance = shape(cos * dx + sin * dy, cos * dy - sin * dx) * size
        coverage = (0.5 - distance).clip(0, 1) * opacity
        window = canvas[:, top : top + len(dy), left : left + len(dx)]
        # Contiguous, which makes the blend three times as fast as on the window itself.
        patch = window.copy()
        patch += coverage * (colours[k] - patch)
        window[...] = patch


def _span(centre: float, reach: float, side: int) -> tuple[int, Field]:
    """Find the pixels of 0 .. side - 1 within `reach` of `centre`.

    Return the first one, and the offset of each from the centre.
    """
    first, end = (min(max(math.floor(centre + r), 0), side) for r in (-reach, reach + 1))
    return first, np.arange(first, end, dtype=np.float32) + (0.5 - centre)
