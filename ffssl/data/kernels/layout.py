"""Where the views of a batch lie in its buffer.

The buffer is uint8 (bytes,). All views of one size lie together, as an array (batch, views, 3, R,
R).
"""

import numpy as np

from ffssl.data.kernels.jit import compiled

# Columns of a layout (int64), which has a row for each view of an image: the view's number, from
# which its random numbers follow; where the first image's view begins; the bytes from one image to
# the next; the side of the view in pixels.
L_VIEW, L_START, L_STEP, L_SIDE = range(4)
LAYOUT_COLUMNS = 4


@compiled
def layout_of_size(first, views, side, start):
    """Return the layout of `views` views of one size: int64 (views, LAYOUT_COLUMNS).

    first: number of the first view.
    side: in pixels.
    start: where the array of this size begins.
    """
    layout = np.empty((views, LAYOUT_COLUMNS), np.int64)
    for v in range(views):
        layout[v, L_VIEW] = first + v
        layout[v, L_START] = start + v * 3 * side * side
        layout[v, L_STEP] = views * 3 * side * side
        layout[v, L_SIDE] = side
    return layout
