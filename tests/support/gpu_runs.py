"""Small runs on a GPU."""

import contextlib

import torch

from ffssl.config import read_options
from ffssl.training.build import build
from ffssl.training.run import start_run
from ffssl.training.schedule import RunSchedule

GPU = torch.device("cuda", 0)
NETWORK = {
    "simsiam": ["--method.predictor=8"],
    "byol": ["--method.predictor=8"],
    "mocov2plus": ["--method.queue=64"],
    "dino": ["--method.prototypes=24"],
}


def start(name, *more, batch_size=32):
    """A run with Hard Augment in bf16, and 16 images for it."""
    options = read_options(
        [
            "--data.train=none.beton",
            "--run.folder=none",
            "--model.backbone=resnet-small",
            f"--method.name={name}",
            "--method.hidden=32",
            "--method.projection=16",
            "--resolution.max=48",
            "--resolution.step=16",
            f"--training.batch_size={batch_size}",
            "--training.epochs=4",
            "--training.amp=bf16",
            "--augment.views=4",
            "--hard_augment.select=hard",
            "--hard_augment.resolution=32",
            *NETWORK.get(name, []),
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
