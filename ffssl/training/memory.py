"""Advice for a step that does not fit into the device's memory."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ffssl.errors import UserError
from ffssl.parallel.device import until_out_of_memory
from ffssl.parallel.ranks import world_size
from ffssl.training.run import Run
from ffssl.training.step import add_gradients

T = TypeVar("T")


def with_memory_advice(run: Run, views: Sequence[int], work: Callable[[], T]) -> T:
    """Return what `work` returns; it takes steps on views (B, m, 3, R, R).

    views: that shape.

    Raise UserError, saying what would fit, if a step needs more memory than the device has.
    """
    with until_out_of_memory():
        return work()
    # The tensors of the failed step are free here, outside the block.
    step = f"a step with {views[0]} images of {views[1]} views at {views[-1]} px"
    raise UserError(
        f"--training.batch_size: {step} needs more memory than {run.device} has; "
        f"{memory_advice(run, views)}"
    )


def memory_advice(run: Run, views: Sequence[int]) -> str:
    """Say what to do after a step on views (B, m, 3, R, R) did not fit.

    The advice is found by trying smaller parts of the step. They run in eager mode, which rarely
    needs less memory: torch.compile takes a minute for each.
    """
    # A trial takes all ranks, and this one alone may be short of memory.
    if world_size() > 1:
        return "take a larger --training.accumulate, or more GPUs"
    torch.compiler.reset()  # CUDA graphs hold memory
    for parts in (parts for parts in range(2, views[0] // 2 + 1) if views[0] % parts == 0):
        images = views[0] // parts
        run.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        with until_out_of_memory(), torch.compiler.set_stance("force_eager"):
            part = torch.zeros(images, *views[1:], dtype=torch.uint8, device=run.device)
            add_gradients(run, part, seed=0)
            return (
                f"{images} images fit: take --training.batch_size={images}, or "
                f"--training.accumulate={parts}"
            )
    return "not even two images fit; take a smaller network or resolution"
