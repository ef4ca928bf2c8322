"""Small images on the page and beside it."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

FRAME = (213, 94, 0)  # of plots.COLOURS, the one that stands out most from photographs


def data_uri(image: Tensor) -> str:
    """Return a uint8 image (3, R, R) as a data URI."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(
        file, "JPEG", quality=90, subsampling=0
    )
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def contact_sheet(
    rows: Sequence[Sequence[tuple[Tensor, bool] | None]], gap: int = 6
) -> Image.Image:
    """Return rows of images on white, each in the middle of a cell.

    rows: (image, whether it is framed), images uint8 (3, R, R) of any R; None is an empty cell.
    """
    side = max(cell[0].shape[-1] for row in rows for cell in row if cell) + gap
    sheet = np.full((len(rows) * side + gap, max(map(len, rows)) * side + gap, 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, cell in enumerate(row):
            if cell is None:
                continue
            image, framed = cell
            size = image.shape[-1]
            top, left = (gap + place * side + (side - gap - size) // 2 for place in (y, x))
            if framed:
                sheet[top - 3 : top + size + 3, left - 3 : left + size + 3] = FRAME
            sheet[top : top + size, left : left + size] = image.permute(1, 2, 0).numpy()
    return Image.fromarray(sheet)
