r"""How long a training step takes, where its time goes, and how near it is to its ceiling.

    ffssl benchmark step --config efficient.yaml
    ffssl benchmark step --config efficient.yaml \
        --resolutions 96 224 --training.batch_size=256 --json step.json

The ceiling is a supervised step of the same backbone, in the same precision and compilation, on as
many views as the run trains on. At each resolution of the config's schedule the two are timed in
turns, on views that are on the device already.

"x ceiling": the step's time over the time that its FLOPs would take at the ceiling's FLOP/s. "x eq.
11": the same for Hard Augment's selection pass, beside the rest of the step. Any option of training
can be given, as --section.option=value.
"""

import functools
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ffssl.backbones import check_resolutions
from ffssl.benchmark.timing import Stopwatch, peak_flops, seconds_of, where
from ffssl.config import Number, Options, read_options
from ffssl.config.command_line import Parser, checked
from ffssl.cost import STANDARD, Flops, count_run_step
from ffssl.errors import UserError
from ffssl.files import make_folder, write_json
from ffssl.parallel.device import autocast_dtype, choose_device, describe_precision
from ffssl.run_folder.machine import describe_machine
from ffssl.tables import Table
from ffssl.training.build import build, random_backbone
from ffssl.training.compile import COMPILED_METHODS, compile_methods, describe_modes, stage_modes
from ffssl.training.memory import with_memory_advice
from ffssl.training.optimizers import build_optimizer
from ffssl.training.run import Run, start_run
from ffssl.training.run_schedule import RunSchedule, StepShape
from ffssl.training.step import train_step
from ffssl.training.views import make_views

PACKAGES = ("ffssl", "torch", "torchvision", "timm")
PARTS = ("selection", "forward", "backward", "optimiser", "teacher")
TITLES = (
    *("px", "views", "ms/step", *PARTS, "image/s", "TFLOP/s", "share", "GB"),
    *("ceiling ms", "x ceiling", "x eq. 11", "first s"),
)
CLASSES = 1000  # of the supervised step: ImageNet's


def command_line() -> Parser:
    parser, count = Parser("benchmark step", description=__doc__), checked(Number(int, 1))
    parser.add_argument(
        "--resolutions",
        type=count,
        nargs="+",
        metavar="R",
        help="sides in pixels (default: all of the schedule)",
    )
    parser.add_argument(
        "--steps",
        type=count,
        default=5,
        help="steps of each in a round (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=count,
        default=5,
        help="turns of step and ceiling (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser


def main(arguments: list[str]) -> None:
    given, words = command_line().parse_known_args(arguments)
    if given.json:
        make_folder(given.json.parent, "--json")
    options = read_options(words, defaults={"data.train": "none", "run.folder": "none"})
    device = choose_device(options.run.device)
    print(f"{describe(options, device)}\n{describe_machine(PACKAGES)}", flush=True)

    torch.manual_seed(options.run.seed)
    run = start_run(
        options, build(options, device), RunSchedule(options, steps_per_epoch=1000), device
    )
    shapes = list(run.schedule.first_epochs)
    if given.resolutions:
        views = options.augment.views
        shapes = [run.schedule.shape_at(side, views) for side in given.resolutions]
    check_resolutions(
        options.model.backbone,
        run.method.backbone,
        dict.fromkeys(given.resolutions or (), "--resolutions"),
    )
    run.epoch = options.training.epochs - 1  # in which pairs are chosen, if they ever are
    flops = {shape: count_run_step(run.schedule, run.method, shape) for shape in shapes}
    t = options.training
    modes = stage_modes(
        t.compile,
        {shape: count.total() for shape, count in flops.items()},
        run.method,
        device,
        t.accumulate,
    )
    print(f"torch.compile {describe_modes(modes)}")
    with run.amp:
        peak = peak_flops(device, autocast_dtype(device))
    print(f"the product of large matrices: {peak / 1e12:.3g} TFLOP/s\n")
    table = Table(TITLES, ">", [max(len(title), 6) for title in TITLES])
    print(table.head())
    rows = []
    found = {
        "machine": describe_machine(PACKAGES),
        "run": describe(options, device),
        "peak_flops_per_second": peak,
        "rows": rows,
    }
    for shape in shapes:
        compile_methods(run.method, COMPILED_METHODS, modes[shape])
        try:
            row = with_memory_advice(
                run,
                shape.of_batch(options.training.batch_size),
                functools.partial(
                    time_shape, run, shape, modes[shape], flops[shape], given.steps, given.rounds
                ),
            )
        except UserError as error:
            print(f"{shape.resolution} px, {shape.views} views: {error}", flush=True)
        else:
            rows.append(row)
            print(table.row(cells(row, peak)), flush=True)
        if given.json:  # now: the next resolution may fail, or a time limit end it
            write_json(given.json, found)
    print(
        "\nMedians. first: the first step, torch.compile's work included. teacher: its "
        "update. share: of the product's FLOP/s."
    )


def describe(options: Options, device: torch.device) -> str:
    selection = (
        f", {options.hard_augment.select} pairs at {options.hard_augment.resolution} px"
        if options.hard_augment.select != "off"
        else ""
    )
    return (
        f"{where(device)}: {options.method.name}, {options.model.backbone}, "
        f"{options.training.batch_size} images of {options.augment.views} views{selection}; "
        f"{describe_precision(options.training.amp, device)}"
    )


def supervised_step(run: Run, side: int, compiled: str) -> Callable[[], None]:
    """Return a plain supervised step of a backbone like the run's.

    compiled: the mode of torch.compile.

    It takes as many views as the run trains on.
    """
    options, device = run.options, run.device
    t = options.training
    network = classifier(options, device)
    compile_methods(network, ("forward",), compiled)
    groups = [{"params": list(network.parameters()), "weight_decay": t.weight_decay}]
    optimizer = build_optimizer(
        t.optimizer,
        groups,
        weight_decay=t.weight_decay,
        decay_norm_and_bias=None,
        momentum=t.momentum,
    )
    images = torch.randn(2 * t.batch_size // t.accumulate, 3, side, side, device=device).contiguous(
        memory_format=torch.channels_last
    )
    labels = torch.arange(len(images), device=device) % CLASSES

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        for _ in range(t.accumulate):
            with run.amp:
                loss = F.cross_entropy(network(images), labels)
            run.scaler.scale(loss).backward()
        optimizer.step()

    return step


def classifier(options: Options, device: torch.device) -> nn.Module:
    backbone = random_backbone(options)
    return (
        nn.Sequential(backbone, nn.Linear(backbone.features, CLASSES))
        .to(device, memory_format=torch.channels_last)
        .train()
    )


def supervised_flops(options: Options, side: int) -> float:
    """Return the FLOPs of one supervised step, in the standard count."""
    network = classifier(options, torch.device("meta"))
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(2, 3, side, side, device="meta"))
    return (1 + STANDARD) * counter.get_total_flops() * options.training.batch_size


def time_shape(
    run: Run, shape: StepShape, compiled: str, flops: Flops, steps: int, rounds: int
) -> dict[str, float | None]:
    """Time the training step and the ceiling in turns.

    compiled: the mode of torch.compile.
    flops: of the training step.
    """
    options, device, side = run.options, run.device, shape.resolution
    views = make_views(
        lambda size: torch.randint(0, 256, size, dtype=torch.uint8, device=device),
        shape.of_batch(options.training.batch_size),
    )
    numbers, watch = itertools.count(), Stopwatch(device)

    def step() -> None:
        watch.start()
        train_step(run, views, next(numbers), mark=watch.mark)

    def in_a_row(work: Callable[[], None]) -> float:
        return seconds_of(lambda: [work() for _ in range(steps)], device) / steps

    first = seconds_of(step, device)
    if device.type == "cuda":  # after cuDNN has tried its algorithms, which may take more memory
        torch.cuda.reset_peak_memory_stats(device)
    step()
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    ceiling = supervised_step(run, side, compiled)  # after the memory of the step was taken
    for _ in range(2):
        ceiling()
    ours, theirs = zip(*((in_a_row(step), in_a_row(ceiling)) for _ in range(rounds)))
    parts = watch.milliseconds()
    seconds, least = statistics.median(ours), statistics.median(theirs)
    expected = least * flops.total() / supervised_flops(options, side)
    rest = sum(parts.values()) - parts["selection"]
    rest_flops = flops.total() - flops.selection
    return {
        **shape._asdict(),
        "compiled": compiled,
        "batch_size": options.training.batch_size,
        "step_ms": 1000 * seconds,
        **{f"{part}_ms": parts[part] for part in PARTS},
        "first_step_s": first,
        "images_per_second": options.training.batch_size / seconds,
        "peak_memory": memory,
        "flops": flops.total(),
        "flops_per_second": flops.total() / seconds,
        "ceiling_ms": 1000 * least,
        "over_ceiling": statistics.median(a / b for a, b in zip(ours, theirs)) * least / expected,
        "over_equation_11": parts["selection"] / rest * rest_flops / flops.selection
        if flops.selection
        else None,
    }


def cells(row: dict[str, float | None], peak: float) -> list[object]:
    """Return a row of the table, in the order of TITLES."""
    memory, selection = row["peak_memory"], row["over_equation_11"]
    return [
        row["resolution"],
        row["views"],
        f"{row['step_ms']:.1f}",
        *(f"{row[f'{part}_ms']:.1f}" for part in PARTS),
        f"{row['images_per_second']:.0f}",
        f"{row['flops_per_second'] / 1e12:.3g}",
        f"{row['flops_per_second'] / peak:.0%}",
        "-" if memory is None else f"{memory / 1e9:.1f}",
        f"{row['ceiling_ms']:.1f}",
        f"{row['over_ceiling']:.2f}",
        "-" if selection is None else f"{selection:.2f}",
        f"{row['first_step_s']:.1f}",
    ]
