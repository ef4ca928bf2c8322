"""Small runs on a GPU."""

import contextlib

import torch
from support.options import NO_FILES, SMALL, of_method

from ffssl.config import read_options
from ffssl.training.build import build
from ffssl.training.run import start_run
from ffssl.training.run_schedule import RunSchedule

GPU = torch.device("cuda", 0)


def start(name, *more, batch_size=32):
    """A run with Hard Augment in bf16, and 16 images for it."""
    options = read_options(
        [
            *NO_FILES,
            *SMALL,
            *of_method(name),
            "--resolution.max=48",
            f"--training.batch_size={batch_size}",
            "--training.epochs=4",
            "--training.amp=bf16",
            "--augment.views=4",
            "--hard_augment.select=hard",
            "--hard_augment.resolution=32",
            "--hard_augment.start_epoch=0",
            *more,
        ]
    )
    run = start_run(options, build(options, GPU), RunSchedule(options, 1000), GPU)
    if run.parallel is not run.method:
        run.parallel.register_comm_hook(None, without_the_other_rank)
    return run


def without_the_other_rank(state, bucket):
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def views(side=48, images=16):
    return torch.zeros(images, 4, 3, side, side, dtype=torch.uint8, device=GPU)


@contextlib.contextmanager
def no_waits():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
