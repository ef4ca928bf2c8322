"""Options of runs that take seconds, for all tests. On a command line the last of a name counts."""

NETWORK = ["--model.backbone=resnet-small", "--method.hidden=32", "--method.projection=16"]
SIDES = [
    "--resolution.max=32",
    "--resolution.min=16",
    "--resolution.step=16",
    "--hard_augment.resolution=16",
]
# No trial of bf16, which takes time and prints a line on some CPUs.
QUIET = ["--run.tensorboard=false", "--run.device=cpu", "--training.amp=off"]
SMALL = [
    *NETWORK,
    *SIDES,
    *QUIET,
    "--method.name=simclr",
    "--training.batch_size=16",
    "--evaluate.k=5",
]
# From the first epoch on, also with a method that begins later by default.
HARD = [
    "--augment.views=3",
    "--hard_augment.select=hard",
    "--hard_augment.resolution=16",
    "--hard_augment.start_epoch=0",
]
NO_FILES = ["--data.train=none.beton", "--run.folder=none"]  # where none is opened
_ELSE = {
    "simsiam": ["--method.predictor=8"],
    "byol": ["--method.predictor=8"],
    "mocov2plus": ["--method.queue=64"],
    "dino": ["--method.prototypes=24"],
}


def of_method(name: str) -> list[str]:
    """The method and what is small in it, besides NETWORK."""
    return [f"--method.name={name}", *_ELSE.get(name, [])]
