"""How long a run will take on given machines, and what will hold it up: planned, not run.

    python -m ffssl.benchmark plan --config rn50_configs/efficient.yaml --images imagenet --gpus 8 --step-ms 410 --cores 64 --memory 512
    python -m ffssl.benchmark plan --config rn50_configs/efficient.yaml --data.train=train.beton --gpus 1 --measured runs/speedup/speedup.json
    python -m ffssl.benchmark plan ... --gpus 32 --nodes 4 --link-gbps 100 --no-overlap --training.batch_size=2048

The model (`ffssl.benchmark.capacity`): the optimiser's steps take `training.batch_size` images, shared equally among the GPUs. GPU, loader
and storage work at the same time on different batches, so a step takes as long as the slowest of them. Every figure that goes in is
printed with where it comes from. Not in the model: the kNN evaluations, the start, and what methods exchange besides gradients (BatchNorm's statistics, embeddings).
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

from ffssl.benchmark.capacity import CORES_PER_PROCESS, GB_PER_PROCESS, Machines, Measured, Row, exchange_seconds, schedule, work_of
from ffssl.command_line import Parser, checked
from ffssl.config import Number, read_options
from ffssl.cost import Flops
from ffssl.cost.runs import RunCosts, number_of_images
from ffssl.data.beton import read_beton
from ffssl.distributed import can_share
from ffssl.errors import UserError
from ffssl.methods import Method
from ffssl.plan import Plan
from ffssl.step import build
from ffssl.train import open_loader

KB_PER_IMAGE = 101.0  # the mean of 250 photographs of ImageNet, as `write_datasets.py --max-side 500` stores them
GRADIENT_BYTES = 4  # a parameter's gradient is float32, under mixed precision too
MEASURED_KEYS = ("resolution", "batch_size", "step_ms", "loader_images_per_second_per_core")


def read_measured(path: Path, config: str) -> list[Measured]:
    """The stages of a config in the JSON file that `python -m ffssl.benchmark speedup` wrote."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--measured: {path}: can't be read: {error}") from error
    try:
        stages = {run["name"]: run["stages"] for run in content["configs"]}
        rows = [[float(row[key]) for key in MEASURED_KEYS] for row in stages[config]]
        if min(map(min, rows)) <= 0:
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--measured: {path}: holds no stages of {config}; name what `benchmark speedup --configs ...` wrote of it") from error
    return [Measured(int(resolution), step_ms / 1000 / batch_size, 1 / rate) for resolution, batch_size, step_ms, rate in rows]


def measure_loader(options: SimpleNamespace, method: Method, path: Path, resolutions: Sequence[int]) -> dict[int, float]:
    """Seconds of one core for an image with all its views, at each resolution: the best of three epochs of up to 200 images."""
    training = SimpleNamespace(**vars(options.training) | {"batch_size": 8})
    data = SimpleNamespace(**vars(options.data) | {"train": path, "workers": 1})
    taken = {}
    with open_loader(SimpleNamespace(**vars(options) | {"training": training, "data": data}), method) as loader:
        loader.samples = loader.samples[:200]
        for resolution in resolutions:
            times = []
            for epoch in range(4):  # the first warms up
                loader.set_epoch(epoch, resolution)
                started = time.perf_counter()
                images = sum(len(batch.indices) for batch in loader)
                times.append((time.perf_counter() - started) / images)
            taken[resolution] = min(times[1:])
    return taken


def flops_counter(options: SimpleNamespace) -> Callable[[int], Flops]:
    """A function of a resolution that counts the FLOPs of an image there, in a run with these options."""
    costs, training = RunCosts(), SimpleNamespace(**vars(options.training) | {"epochs": 1})

    def count(resolution: int) -> Flops:
        constant = SimpleNamespace(**vars(options.resolution) | {"schedule": "constant", "max": resolution})
        return costs.stages(SimpleNamespace(**vars(options) | {"training": training, "resolution": constant}))[0].flops

    return count


def table(rows: Sequence[Row]) -> str:
    """A line a row, and one of the whole run."""
    lines = [
        f"{'':>20}{'milliseconds of a step':^45}{'cores':>20}",
        f"{'resolution':>10}{'epochs':>10}" + "".join(f"{name:>9}" for name in ("GPU", "link", "loader", "storage", "step"))
        + f"{'bound':>10}{'a GPU':>10}{'efficiency':>12}{'hours':>9}",
    ]  # fmt: skip
    for row in rows:
        times = (row.times.gpu, row.times.link, row.times.loader, row.times.storage, row.times.step)
        lines.append(
            f"{row.resolution:>10}{row.epochs:>10}" + "".join(f"{1000 * seconds:>9.1f}" for seconds in times)
            + f"{row.times.bound:>10}{row.cores:>10.1f}{row.times.efficiency:>12.1%}{row.seconds / 3600:>9.2f}"
        )  # fmt: skip
    total = sum(row.seconds for row in rows)
    useful = sum(row.seconds * row.times.gpu / row.times.step for row in rows)
    most = max(row.cores for row in rows)
    lines.append(f"{'run':>10}{sum(row.epochs for row in rows):>10}{'':>55}{most:>10.1f}{useful / total:>12.1%}{total / 3600:>9.2f}")
    return "\n".join(lines)


LEGEND = """
GPU: its computing. link: of the gradients' exchange, what is not hidden. cores a GPU: for the loader to keep up, and one for the process.
efficiency: a GPU's images/s over those of one that exchanges nothing; of the run, also over those of one that waits for nothing else."""


def main(arguments: list[str]) -> None:
    parser = make_parser()
    given, overrides = parser.parse_known_args(arguments)
    options = read_options([f"--config={given.config}", *overrides], defaults={"data.train": "", "run.folder": ""})
    print(report(given, options))


def make_parser() -> Parser:
    positive, count = checked(Number(float, 1e-9)), checked(Number(int, 1))
    parser = Parser(prog="python -m ffssl.benchmark plan", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="config of the run; --section.option=value overrides it")
    parser.add_argument("--images", metavar="N", help="training images: a number, imagenet or imagenette (default: those in --data.train)")
    parser.add_argument("--image-kb", type=positive, metavar="KB", help=f"of a stored image (default: as in --data.train, else {KB_PER_IMAGE:g})")
    machine = parser.add_argument_group("machines")
    machine.add_argument("--gpus", type=count, required=True, metavar="N", help="in all")
    machine.add_argument("--nodes", type=count, metavar="N", help="machines that they are in, each as below (default: 1)")
    machine.add_argument("--cores", type=count, metavar="C", help="CPU cores (default: this machine's)")
    machine.add_argument("--memory", type=positive, metavar="GB", help="default: this machine's")
    machine.add_argument("--disk-gb", type=positive, metavar="GB", help="local disk (default: the size of this machine's)")
    machine.add_argument("--disk-mb-per-s", type=positive, metavar="MB", help="that it reads at random, an image at a time (default: 500)")
    machine.add_argument("--network-gbps", type=positive, metavar="GBIT", help="at which a node reads what fits no local disk (default: 10)")
    machine.add_argument("--link-gbps", type=positive, metavar="GBIT", help="of the slowest link between GPUs, one way (default: 100)")
    work = parser.add_argument_group("work")
    gpu = work.add_mutually_exclusive_group(required=True)
    gpu.add_argument("--step-ms", type=positive, metavar="MS", help="a training step on one GPU at full resolution, with data at hand")
    gpu.add_argument("--measured", type=Path, metavar="FILE", help="speedup.json, of `benchmark speedup`")
    work.add_argument("--step-images", type=count, metavar="N", help="images of the step of --step-ms (default: training.batch_size)")
    work.add_argument("--loader-ms", type=positive, metavar="MS", help="of one core for an image and its views (default: measured here, seconds)")
    work.add_argument("--overlap", action=argparse.BooleanOptionalAction, default=True, help="exchange gradients during the backward pass")
    return parser


def report(given: argparse.Namespace, options: SimpleNamespace) -> str:
    """The plan as text: what goes in and where it comes from, then the stages."""
    figures = Figures()
    images = number_of_images(given.images, options.data.train)
    batch_size, parts = options.training.batch_size, options.training.accumulate
    machines = machines_of(given, options.data.train, figures)
    if not can_share(batch_size, machines.gpus, parts) or machines.gpus % machines.nodes:
        raise UserError(
            f"--gpus: {machines.gpus} GPUs in {machines.nodes} nodes can't share steps of {batch_size} images equally, with two or more "
            f"in each of --training.accumulate={parts} parts; change --gpus, --nodes or --training.batch_size"
        )
    if machines.cores * machines.nodes <= CORES_PER_PROCESS * machines.gpus:
        raise UserError(f"--cores: {machines.cores} a node leave none for the loader beside the processes of {machines.gpus // machines.nodes} GPUs")
    if images < batch_size:
        raise UserError(f"--images: {images} are fewer than one batch of {batch_size}")
    figures.note("images", f"{images:,}", "given" if given.images else "counted in data.train")
    image_bytes = image_size(given, options.data.train, figures)

    with torch.device("meta"):
        method = build(options, torch.device("meta"))
    parameters = sum(p.numel() for group in method.parameter_groups(0.0) for p in group["params"])
    gradient = GRADIENT_BYTES * parameters
    figures.note("gradient", f"{gradient / 1e6:.1f} MB", f"counted: {parameters / 1e6:.1f} M parameters in float32")
    plan, cost = Plan(options, steps_per_epoch=1), flops_counter(options)
    work = work_of(plan.stages, times_of_an_image(given, options, method, plan.resolutions, cost, figures), cost)
    how = "during the backward pass" if given.overlap else "after it"
    figures.note("exchange", f"{1000 * exchange_seconds(gradient, machines.gpus, machines.link_rate):.1f} ms",
                 f"computed: a ring all-reduce, {2 * (machines.gpus - 1) / machines.gpus:.2f} x the gradient, {how}")  # fmt: skip
    rest = "assumed, of each GPU's; the rest is the loader's and the page cache's"
    figures.note("for a process", f"{CORES_PER_PROCESS} core, {GB_PER_PROCESS} GB", rest)
    beton = images * image_bytes
    where, rows = schedule(
        work, machines, images=images, batch_size=batch_size, parts=parts, gradient=gradient, beton=beton, overlap=given.overlap
    )
    run = f"{options.method.name}, {options.model.backbone}, {options.training.epochs} epochs, steps of {batch_size} images"
    read = " after the first epoch" if where == "page cache" else ""
    file = f"The file, {beton / 1e9:.1f} GB, is read from the {where}{read}."
    return f"{Path(given.config).stem}: {run}\n\n{figures}\n\n{file}\n\n{table(rows)}\n{LEGEND}"


class Figures:
    """What went in, each with whether it was given, measured, counted or assumed."""

    def __init__(self):
        self._lines: list[str] = []

    def note(self, name: str, value: str, source: str) -> None:
        self._lines.append(f"{name:<16}{value:>22}   {source}")

    def __str__(self) -> str:
        return "\n".join(self._lines)


def machines_of(given: argparse.Namespace, train: str, figures: Figures) -> Machines:
    def choose(name: str, value: float | None, unit: str, default: float, source: str) -> float:
        chosen, said = (default, source) if value is None else (value, "given")
        figures.note(name, f"{chosen:g} {unit}".strip(), said)
        return chosen

    here, memory = "this machine's", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    figures.note("GPUs", str(given.gpus), "given")
    nodes = choose("nodes", given.nodes, "", 1, "assumed")
    cores = choose("cores a node", given.cores, "", len(os.sched_getaffinity(0)), here)
    memory = choose("memory a node", given.memory, "GB", round(memory, 1), here)
    place = Path(train).resolve().parent if train else Path.cwd()
    folder = next(path for path in (place, *place.parents) if path.is_dir())  # the machine of the plan may have what this one has not
    disk = choose("local disk", given.disk_gb, "GB", round(shutil.disk_usage(folder).total / 1e9), here)
    disk_rate = choose("it reads", given.disk_mb_per_s, "MB/s", 500, "assumed")
    network = choose("network storage", given.network_gbps, "Gbit/s", 10, "assumed")
    link = choose("link of GPUs", given.link_gbps, "Gbit/s", 100, "assumed")
    return Machines(given.gpus, nodes, cores, memory * 1e9, disk * 1e9, disk_rate * 1e6, network * 1e9 / 8, link * 1e9 / 8)


def image_size(given: argparse.Namespace, train: str, figures: Figures) -> float:
    """Bytes of a stored image."""
    if given.image_kb is not None:
        size, source = 1000 * given.image_kb, "given"
    elif train:
        size, source = float(read_beton(train).image_sizes.mean()), "measured: the mean in data.train"
    else:
        size, source = 1000 * KB_PER_IMAGE, "assumed: the mean of ImageNet's photographs at a longer side of 500"
    figures.note("a stored image", f"{size / 1000:.1f} kB", source)
    return size


def times_of_an_image(
    given: argparse.Namespace, options: SimpleNamespace, method: Method, sides: Sequence[int], cost: Callable[[int], Flops], figures: Figures
) -> list[Measured]:
    """What is known of the times of an image: at all resolutions of a run that was measured, else at those of this one, `sides`."""
    full = options.resolution.max
    if given.measured:
        measured = read_measured(given.measured, Path(given.config).stem)
        known_at = ", ".join(str(known.resolution) for known in measured)
        figures.note("on a GPU", f"at {known_at} px", f"measured: {given.measured}; other resolutions by their FLOPs")
        gpu = {known.resolution: known.gpu for known in measured}
        loader = {known.resolution: known.loader for known in measured}
        source = f"measured: {given.measured}"
    else:
        step_images = given.step_images or options.training.batch_size
        seconds = given.step_ms / 1000 / step_images
        gpu = {side: seconds * cost(side).total() / cost(full).total() for side in sides}
        source = f"given: {given.step_ms:g} ms for {step_images} images at {full} px; other resolutions by their FLOPs"
        figures.note("on a GPU", f"{1000 * seconds:.3f} ms", source)
        loader, source = {}, ""
    if given.loader_ms is not None:
        loader, source = dict.fromkeys(gpu, given.loader_ms / 1000), "given, for all resolutions"
    elif not loader:
        loader, source = measure_on_images(options, method, sides)
    worst = max(loader, key=loader.get)
    figures.note("on a core", f"{1000 * loader[worst]:.3f} ms", f"{source}; at {worst} px, {options.augment.views} views")
    return [Measured(side, gpu[side], loader[side]) for side in gpu]


def measure_on_images(options: SimpleNamespace, method: Method, sides: Sequence[int]) -> tuple[dict[int, float], str]:
    """`measure_loader` on data.train, or else on stand-ins, and what to say of it."""
    if options.data.train:
        return measure_loader(options, method, Path(options.data.train), sides), "measured on a core of this machine, on data.train"
    from ffssl.benchmark.loader import prepare_images, stand_ins

    with tempfile.TemporaryDirectory(prefix="ffssl-plan-") as scratch:
        path, _ = prepare_images(argparse.Namespace(data=None, images=None, samples=64), Path(scratch))
        return measure_loader(options, method, path, sides), f"measured on a core of this machine, on images {stand_ins()}"
