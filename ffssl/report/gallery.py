"""The pictures of a report, in both of their forms."""

import io

from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from ffssl.report.charts import render


class Gallery:
    """The pictures of a report, each drawn once.

    The page gets them as SVG. `pngs` has them by file name, to lie beside the page.
    """

    def __init__(self):
        self.pngs: dict[str, bytes] = {}

    def draw(self, figure: Figure, name: str, title: str) -> Markup:
        """Return the figure as an SVG element.

        name: unique, of letters, digits and hyphens.
        """
        svg, self.pngs[f"{name}.png"] = render(figure, name, title)
        return Markup(svg)

    def add(self, image: Image.Image, name: str) -> None:
        file = io.BytesIO()
        image.save(file, "PNG", optimize=True)
        self.pngs[f"{name}.png"] = file.getvalue()
