"""Advice for a step that does not fit into the device's memory."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ffssl.errors import UserError
from ffssl.parallel.device import until_out_of_memory
from ffssl.parallel.ranks import world_size
from ffssl.training.run import Run
from ffssl.training.step import add_gradients
from ffssl.training.views import make_views

T = TypeVar("T")


def with_memory_advice(run: Run, shapes: Sequence[Sequence[int]], work: Callable[[], T]) -> T:
    """Return what `work` returns; it takes steps on views of these shapes.

    shapes: (B, m, 3, R, R) of the views, and of the local views if there are any.

    Raise UserError, saying what would fit, if a step needs more memory than the device has.
    """
    with until_out_of_memory():
        return work()
    # The tensors of the failed step are free here, outside the block.
    views = " and ".join(f"{shape[1]} views at {shape[-1]} px" for shape in shapes)
    step = f"a step with {shapes[0][0]} images of {views}"
    raise UserError(
        f"--training.batch_size: {step} needs more memory than {run.device} has; "
        f"{memory_advice(run, shapes)}"
    )


def memory_advice(run: Run, shapes: Sequence[Sequence[int]]) -> str:
    """Say what to do after a step on views of these shapes did not fit.

    The advice is found by trying smaller parts of the step. They run in eager mode, which rarely
    needs less memory: torch.compile takes a minute for each.
    """
    # A trial takes all ranks, and this one alone may be short of memory.
    if world_size() > 1:
        return "take a larger --training.accumulate, or more GPUs"
    torch.compiler.reset()  # CUDA graphs hold memory
    batch = shapes[0][0]
    for parts in (parts for parts in range(2, batch // 2 + 1) if batch % parts == 0):
        images = batch // parts
        run.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        with until_out_of_memory(), torch.compiler.set_stance("force_eager"):
            part = make_views(
                lambda shape: torch.zeros(*shape, dtype=torch.uint8, device=run.device),
                ((images, *shape[1:]) for shape in shapes),
            )
            add_gradients(run, part, seed=0)
            return (
                f"{images} images fit: take --training.batch_size={images}, or "
                f"--training.accumulate={parts}"
            )
    return "not even two images fit; take a smaller network or resolution"
