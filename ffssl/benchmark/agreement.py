"""Check that this machine's GPU computes what its CPU does.

    ffssl benchmark agreement
    ffssl benchmark agreement --methods simsiam simclr
    ffssl benchmark agreement --describe           # of the machine alone

Every method takes four steps of Hard Augment from the same weights, with a small ResNet on drawn
images. Losses and chosen pairs are compared. The CPU computes in float32. The GPU computes in
float32 (without TF32) and in bf16, or fp16 if it has no bf16.

The check fails if a float32 loss is off by more than 1 %, or if a tenth of the pairs differ. Half
precision rounds, so its differences are only shown. On a machine without a GPU the CPU is compared
with itself.
"""

import torch

from ffssl.benchmark.timing import where
from ffssl.config import Options, read_options
from ffssl.config.command_line import Parser
from ffssl.config.method_options import method_options
from ffssl.data.convert.embedded import EmbeddedDataset
from ffssl.errors import UserError
from ffssl.hard_augment import selection_pass
from ffssl.methods import METHODS
from ffssl.parallel.device import choose_device, has_bf16
from ffssl.parallel.energy import energy_counter
from ffssl.run_folder.machine import describe_machine
from ffssl.tables import Table
from ffssl.training.build import build
from ffssl.training.run import start_run
from ffssl.training.run_schedule import RunSchedule
from ffssl.training.step import train_step

PACKAGES = ("ffssl", "torch", "torchvision", "timm", "numba", "numpy", "ffcv")
CPU = torch.device("cpu")
IMAGES, VIEWS, SIDE, SMALL, STEPS = 16, 4, 48, 32, 4
MOST_OFF, FEWEST_SAME = 0.01, 0.9
WRONG = "WRONG"
SIZES = {"hidden": 32, "projection": 16, "predictor": 8, "prototypes": 24, "queue": 64}


def main(arguments: list[str]) -> None:
    parser = Parser("benchmark agreement", description=__doc__)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=list(METHODS),
        metavar="METHOD",
        help="(default: all)",
    )
    parser.add_argument(
        "--describe", action="store_true", help="say what machine it is, and no more"
    )
    given = parser.parse_args(arguments)
    device = choose_device("auto")
    print(f"{where(device)}; {describe_machine(PACKAGES)}", flush=True)
    if device.type == "cuda":
        joules = energy_counter(device)()
        print(
            f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, energy "
            f"counter: {'none' if joules is None else f'{joules:.0f} J'}"
        )
    if given.describe:
        return
    torch.backends.cudnn.allow_tf32 = False
    half = "bf16" if device.type == "cpu" or has_bf16(device) else "fp16"
    titles = [
        f"{what}, {kind}"
        for what in ("loss off by, at most", "pairs the same")
        for kind in ("float32", half)
    ]
    widths = (max(map(len, METHODS)), *map(len, titles), len(WRONG))
    table = Table(["method", *titles, ""], "<>>>><", widths)
    print(f"\n{table.head()}")
    wrong = []
    for name in given.methods:
        (losses, pairs), *others = (
            first_steps(name, *way) for way in ((CPU, "off"), (device, "off"), (device, half))
        )
        off = [
            ((loss - losses).abs() / losses.abs().clamp(min=0.1)).max().item() for loss, _ in others
        ]
        same = [(chosen == pairs).all(-1).float().mean().item() for _, chosen in others]
        good = off[0] <= MOST_OFF and same[0] >= FEWEST_SAME
        wrong += [] if good else [name]
        cells = *(f"{value:.1e}" for value in off), *(f"{value:.0%}" for value in same)
        print(table.row([name, *cells, "" if good else WRONG]), flush=True)
    if wrong:
        raise UserError(
            f"the {device.type} does not compute what the CPU does, for {', '.join(wrong)}"
        )


def first_steps(name: str, device: torch.device, amp: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses (STEPS,), and the pairs that Hard Augment would choose before each step.

    Pairs: (STEPS, IMAGES, 2).
    """
    options = options_of(name, amp)
    torch.manual_seed(0)
    # The same weights on both.
    method = build(options, CPU).to(device, memory_format=torch.channels_last)
    run = start_run(options, method, RunSchedule(options, steps_per_epoch=5), device)
    losses, pairs = [], []
    for step in range(STEPS):
        views = drawn_views(step).to(device)
        with run.amp:
            pairs.append(selection_pass(method, views, run.schedule.selection(0))[0].cpu())
        losses.append(train_step(run, views, step).loss.cpu())
    return torch.stack(losses), torch.stack(pairs)


def options_of(name: str, amp: str) -> Options:
    sizes = [option.name for option in method_options()[name] if option.name in SIZES]
    return read_options(
        [
            "--data.train=none",
            "--run.folder=none",
            "--model.backbone=resnet-small",
            f"--method.name={name}",
            *(f"--method.{size}={SIZES[size]}" for size in sizes),
            f"--resolution.max={SIDE}",
            "--resolution.step=16",
            f"--training.batch_size={IMAGES}",
            "--training.epochs=4",
            "--training.learning_rate=0.02",
            f"--training.amp={amp}",
            f"--augment.views={VIEWS}",
            "--hard_augment.select=hard",
            f"--hard_augment.resolution={SMALL}",
            "--hard_augment.start_epoch=0",
        ]
    )


def drawn_views(step: int) -> torch.Tensor:
    """Return crops of drawn images at random places: uint8 (IMAGES, VIEWS, 3, SIDE, SIDE)."""
    dataset, generator = EmbeddedDataset("train", IMAGES), torch.Generator().manual_seed(step)
    views = []
    for i in range(IMAGES):
        image = torch.from_numpy(dataset[i][0]).permute(2, 0, 1)
        rows, columns = (
            torch.randint(0, side - SIDE + 1, (VIEWS,), generator=generator).tolist()
            for side in image.shape[1:]
        )
        views.append(
            torch.stack([image[:, y : y + SIDE, x : x + SIDE] for y, x in zip(rows, columns)])
        )
    return torch.stack(views)
