"""A step of the user's own, applied to every rendered view."""

from collections.abc import Callable

from numba import njit, types
from numba.core.errors import NumbaError, UnsupportedBytecodeError
from numba.extending import is_jitted

from ffssl.data.kernels.draw import view_key
from ffssl.errors import UserError

_VIEW_AND_KEY = (types.Array(types.uint8, 3, "C"), types.uint64)


def compile_view_kernel(kernel: Callable) -> Callable:
    """Compile `kernel(view, key)` into a function that applies it to every view of a batch.

    The kernel gets:
    view: uint8 (3, R, R), to be changed in place.
    key: uint64. `draw.uniform(key, k)` gives random number k = 0, 1, ... of this view; the policy
        draws none of these numbers.

    The function returned takes (counters, indices, views, first): see `policy.ViewSettings` for
    counters; indices: int64 (batch,); views: uint8 (batch, views, 3, R, R), changed in place;
    first: number of the first of these views.

    Raises UserError if Numba does not compile the kernel.
    """
    name = getattr(kernel, "__name__", repr(kernel))
    if not callable(kernel):
        raise UserError(f"view kernel {name}: must be a function of (view, key)")
    step = kernel if is_jitted(kernel) else njit(kernel)
    try:
        step.compile(_VIEW_AND_KEY)
    except (NumbaError, UnsupportedBytecodeError, TypeError) as error:
        raise UserError(
            f"view kernel {name}: Numba does not compile it as a function of (view, key): "
            f"{_reason(error)}"
        ) from error

    @njit(nogil=True)
    def apply(counters, indices, views, first=0):
        for b in range(len(indices)):
            for v in range(views.shape[1]):
                key_of_policy = view_key(counters[0], counters[1], indices[b], first + v)
                step(views[b, v], view_key(key_of_policy, 0, 0, 0))

    return apply


def _reason(error: Exception) -> str:
    """Return the line of Numba's message that says what is wrong."""
    return next(
        line.strip()
        for line in str(error).splitlines()
        if line.strip() and not line.startswith("Failed in")
    )
