r"""How much faster one config trains than another on this machine, in hours.

    ffssl benchmark speedup --configs baseline.yaml efficient.yaml
    ffssl benchmark speedup --configs A.yaml B.yaml --data train.beton \
        --output runs/speedup --training.batch_size=256
    ffssl benchmark speedup --configs A.yaml B.yaml --data train.beton --full

With --full it also trains both, and compares.

It times every stage of both schedules. A stage is what a config trains at one resolution. Each is
timed with views at hand, with the loader alone, and with both together as in training. The stages
take turns, round by round, since a machine's speed drifts. The times of steps together, and an
epoch's wait for its first batch, are then added up over the schedules. torch.compile's work and
evaluations are left out.

Without --data the images are cut from scikit-image's photographs, 500x375, or drawn if it is not
installed. Writes speedup.json, speedup.md and speedup.png to the output folder. Any option of
training can be given to both configs, as --section.option=value.
"""

import contextlib
import gc
import itertools
import os
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ffssl.benchmark.loader import describe_images, prepare_images, stand_ins
from ffssl.benchmark.speedup_report import draw, table_of
from ffssl.benchmark.timing import seconds_of, where
from ffssl.config import Number, Options, read_options
from ffssl.config.command_line import Parser, checked, command
from ffssl.cost import count_flops
from ffssl.cost.runs import number_of_images
from ffssl.data.loader import ViewLoader
from ffssl.errors import UserError
from ffssl.files import make_folder, replacing, write_json
from ffssl.parallel.device import choose_device
from ffssl.run_folder.log import read_log
from ffssl.run_folder.machine import describe_machine
from ffssl.training.build import build
from ffssl.training.compile import COMPILED_METHODS, compile_methods, stage_modes
from ffssl.training.loader import open_loader
from ffssl.training.memory import with_memory_advice
from ffssl.training.run import Run, start_run
from ffssl.training.run_schedule import RunSchedule, StepShape
from ffssl.training.step import train_step
from ffssl.training.transfer import to_device
from ffssl.training.views import Views, make_views

PACKAGES = ("ffssl", "torch", "torchvision", "timm", "numba", "ffcv")
JSON, TABLE, PICTURE = "speedup.json", "speedup.md", "speedup.png"
FEWEST_STEPS, MOST_STEPS = 4, 100  # in a measurement


def main(arguments: list[str]) -> None:
    parser = Parser("benchmark speedup", description=__doc__)
    parser.add_argument(
        "--configs",
        type=Path,
        nargs="+",
        required=True,
        metavar="CONFIG",
        help="speed-ups are over the first",
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="beton file to take images from")
    parser.add_argument(
        "--images",
        metavar="N",
        help=(
            "in an epoch: a number, imagenet or imagenette (default: those in --data, else "
            "imagenet)"
        ),
    )
    parser.add_argument(
        "--rounds",
        type=checked(Number(int, 1)),
        default=3,
        help="turns of each stage (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=checked(Number(float, 0.001)),
        default=2.0,
        help="of each measurement, about (default: %(default)s)",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="train the configs as well, without evaluations, and compare; needs --data",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/speedup"),
        metavar="FOLDER",
        help="(default: %(default)s)",
    )
    given, overrides = parser.parse_known_args(arguments)
    if given.full and (not given.data or given.images):
        raise UserError("--full: trains on all images of --data FILE; give one, and no --images")
    make_folder(given.output, "--output")
    configs = {path.stem: path for path in given.configs}
    if len(configs) < len(given.configs):
        raise UserError(
            f"--configs: {', '.join(map(str, given.configs))} do not all have names of their own"
        )
    unused = {"data.train": "", "run.folder": ""}
    options = {
        name: read_options([f"--config={path}", *overrides], defaults=unused)
        for name, path in configs.items()
    }
    device = choose_device(next(iter(options.values())).run.device)

    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ffssl-speedup-")))
        most = max(one.training.batch_size for one in options.values())
        data = given.data or prepare_images(scratch, most)[0]
        images = number_of_images(given.images or (None if given.data else "imagenet"), str(data))
        trials = []
        for name, one in options.items():
            one = one.changed(data={"train": str(data)})
            trials.append(start_trial(name, one, images, device, stack))
        origin = "" if given.data else stand_ins()
        print(
            (
                f"{where(device)}{trials[0].run.energy_note}; "
                f"{describe_machine(PACKAGES)}\n{describe_images(data, origin)}; epochs of "
                f"{images:,}"
            ),
            flush=True,
        )
        measure(trials, given.rounds, given.seconds, scratch if given.full else None)
        found = {
            "machine": describe_machine(PACKAGES),
            "device": where(device),
            "images": images,
            "configs": [summarise(trial) for trial in trials],
        }
    write(found, given.output)
    if given.full:
        del trials
        free_memory(device)
        for config in found["configs"]:
            print(f"training {config['name']} in full", flush=True)
            config["full_seconds"] = train_in_full(configs[config["name"]], data, overrides)
        write(found, given.output)


def write(found: dict, output: Path) -> None:
    table = table_of(found)
    print(f"\n{table}\nIn {output}: {JSON}, {TABLE}, {PICTURE}", flush=True)
    write_json(output / JSON, found)
    with replacing(output / TABLE) as partial:
        partial.write_text(table, encoding="utf-8", errors="backslashreplace")
    draw(found, output / PICTURE)


@dataclass
class Stage:
    """What a config trains in steps of one shape.

    compiled: the mode of torch.compile.
    times: seconds a step in each round, by what was timed; see `time_stage`.
    """

    shape: StepShape
    epochs: list[int]
    compiled: str
    steps: int = FEWEST_STEPS  # in a measurement
    first_step: float = 0.0  # seconds, torch.compile's work included
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


@dataclass
class Trial:
    """A config under test.

    samples: the loader's, int64; a stage visits as many of them as it has steps for.
    """

    name: str
    run: Run
    loader: ViewLoader
    samples: np.ndarray
    flops: dict[StepShape, int]  # of a step
    stages: list[Stage]


def start_trial(
    name: str, options: Options, images: int, device: torch.device, stack: contextlib.ExitStack
) -> Trial:
    torch.manual_seed(options.run.seed)
    method = build(options, device)
    schedule = RunSchedule(options, steps_per_epoch=images // options.training.batch_size)
    if not schedule.steps_per_epoch:
        raise UserError(
            f"--images: {images} are fewer than {name}'s "
            f"--training.batch_size={options.training.batch_size}"
        )
    run = start_run(options, method, schedule, device)
    loader = stack.enter_context(open_loader(options))
    flops = count_flops(schedule, method)
    t = options.training
    modes = stage_modes(t.compile, flops, method, device, t.accumulate)
    epochs = defaultdict(list)
    for epoch in range(t.epochs):
        epochs[schedule.shape(epoch)].append(epoch)
    stages = [Stage(shape, which, modes[shape]) for shape, which in epochs.items()]
    return Trial(name, run, loader, loader.samples, flops, stages)


def measure(trials: list[Trial], rounds: int, seconds: float, caches: Path | None) -> None:
    """Time all stages in turns, each measurement for about `seconds`.

    caches: a folder of empty torch.compile caches for the first steps of each trial, as if each ran
    alone. None: use the machine's own caches.
    """
    for trial in trials:
        with empty_compile_caches(caches) if caches else contextlib.nullcontext():
            take_first_steps(trial, seconds)
    stages = [(trial, stage) for trial in trials for stage in trial.stages]
    for number in range(rounds):
        for trial, stage in stages:
            time_stage(trial, stage)
        print(f"round {number + 1} of {rounds}", flush=True)


def empty_compile_caches(folder: Path) -> contextlib.AbstractContextManager:
    from torch._inductor.utils import fresh_inductor_cache  # takes seconds

    return fresh_inductor_cache(dir=str(folder), delete=False)


def take_first_steps(trial: Trial, seconds: float) -> None:
    """Compile and time the first step of each stage, and choose how many steps to measure.

    A measurement should last about `seconds`.
    """
    options = trial.run.options
    for stage in trial.stages:
        trial.run.epoch = stage.epochs[0]
        compile_methods(trial.run.method, COMPILED_METHODS, stage.compiled)
        shapes = stage.shape.of_batch(options.training.batch_size)
        views = make_views(
            lambda shape: torch.zeros(shape, dtype=torch.uint8, device=trial.run.device), shapes
        )

        def step(views: Views = views) -> float:
            return seconds_of(lambda: train_step(trial.run, views, 0), trial.run.device)

        try:
            stage.first_step = with_memory_advice(trial.run, shapes, step)
        except UserError as error:
            raise UserError(f"{trial.name}: {error}") from error
        stage.steps = int(min(max(seconds / step(), FEWEST_STEPS), MOST_STEPS))


def time_stage(trial: Trial, stage: Stage) -> None:
    """Take one measurement of a stage, in seconds.

    "start": to an epoch's first batch. The others are of a step: "together" with the loader (and
    the "joules" of it), "step" with the views at hand, "loader" the loader alone.
    """
    run, loader, steps = trial.run, trial.loader, stage.steps
    run.epoch = stage.epochs[0]
    compile_methods(run.method, COMPILED_METHODS, stage.compiled)
    loader.samples = np.resize(trial.samples, (steps + 1) * loader.batch_size)
    numbers = itertools.count()

    def first_batch() -> float:
        nonlocal batches, views
        magnitude = run.schedule.magnitude(run.epoch)
        loader.set_epoch(run.epoch, magnitude=magnitude, **stage.shape.for_loader)
        batches = to_device((views for views, _, _ in loader), run.device)
        started = time.perf_counter()
        views = next(batches)
        return time.perf_counter() - started

    def next_batch() -> None:
        nonlocal views
        views = next(batches)

    def train() -> None:
        train_step(run, views, next(numbers))

    def train_and_wait() -> None:
        train()
        next_batch()

    def seconds_a_step(work) -> float:
        return seconds_of(lambda: [work() for _ in range(steps)], run.device) / steps

    batches = views = None
    stage.times["start"].append(first_batch())
    joules = run.joules()
    stage.times["together"].append(seconds_a_step(train_and_wait))
    if joules is not None:
        stage.times["joules"].append((run.joules() - joules) / steps)
    stage.times["step"].append(seconds_a_step(train))
    first_batch()
    stage.times["loader"].append(seconds_a_step(next_batch))


def summarise(trial: Trial) -> dict:
    """Return a config's stages, and their sums over its schedule."""
    schedule = trial.run.schedule
    batch_size, workers = trial.loader.batch_size, trial.loader.workers
    stages = []
    for stage in trial.stages:
        median = {kind: statistics.median(values) for kind, values in stage.times.items()}
        steps = len(stage.epochs) * schedule.steps_per_epoch
        stages.append(
            {
                **stage.shape._asdict(),
                "epochs": len(stage.epochs),
                "steps": steps,
                "batch_size": batch_size,
                "step_ms": 1000 * median["step"],
                "loader_ms": 1000 * median["loader"],
                "together_ms": 1000 * median["together"],
                "start_ms": 1000 * median["start"],
                "first_step_s": stage.first_step,
                "bound": "loader" if median["loader"] > median["step"] else "training",
                "cores_needed": workers * median["loader"] / median["step"],
                "loader_images_per_second_per_core": batch_size / median["loader"] / workers,
                "seconds": steps * median["together"] + len(stage.epochs) * median["start"],
                "flops": steps * trial.flops[stage.shape],
                "joules": steps * median["joules"] if "joules" in median else None,
            }
        )
    sums = {
        key: sum(stage[key] for stage in stages) for key in ("seconds", "flops", "first_step_s")
    }
    joules = None if stages[0]["joules"] is None else sum(stage["joules"] for stage in stages)
    return {
        "name": trial.name,
        "epochs": trial.run.options.training.epochs,
        "workers": workers,
        **sums,
        "joules": joules,
        "stages": stages,
    }


def free_memory(device: torch.device) -> None:
    """Leave the GPU's memory to another process, as far as possible."""
    torch.compiler.reset()  # its graphs hold memory
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def train_in_full(config: Path, data: Path, overrides: list[str]) -> float:
    """Return the seconds of a whole training, by its own log, with torch.compile's work."""
    with tempfile.TemporaryDirectory(prefix="ffssl-speedup-") as folder:
        words = [
            f"--config={config}",
            *overrides,
            f"--data.train={data}",
            "--data.validation=",
            f"--run.folder={folder}/run",
        ]
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled",
            "TRITON_CACHE_DIR": f"{folder}/compiled/triton",
        }
        status = subprocess.run(command("train", *words), env=environment).returncode
        if status:
            raise UserError(f"--full: training {config} ended with status {status}")
        row = read_log(Path(folder) / "run")[-1]
        return row["seconds"] + row.get("compile_seconds", 0.0)
