"""Images per second of the loader and of its peers, on the same images, in one run.

    ffssl benchmark loader
    ffssl benchmark loader --images photos/ --views 6 --resolution 96
    ffssl benchmark loader --views 2 6 --resolution 224 96
    ffssl benchmark loader --data train.beton --workers 8

The first takes scikit-image's photographs, or drawings if it is not installed. The third makes
views of two sizes, as multi-crop does. Those of the second size show small parts of the image.

Every contender has processes of its own, which are stopped while the others run. They take turns,
round by round, so that a machine whose speed drifts slows all of them alike, and each round in
another order. Trust the ratios, not the images/s.
"""

import contextlib
import importlib.util
import io
import itertools
import multiprocessing
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from PIL import Image

from ffssl.benchmark.contenders import CONTENDERS
from ffssl.benchmark.stages import stage_times
from ffssl.benchmark.workload import Batches, Size, Workload
from ffssl.config import Number
from ffssl.config.command_line import Parser, checked
from ffssl.config.options import AugmentOptions
from ffssl.data.beton.read import MODE_JPEG, read_beton
from ffssl.data.convert.conversion import ConvertOptions, convert
from ffssl.data.convert.embedded import EmbeddedDataset
from ffssl.data.convert.sources.folder import ImageFolder
from ffssl.data.policy import POLICIES, ViewPolicy, choose_policies, local_policy
from ffssl.errors import UserError
from ffssl.run_folder.machine import describe_machine
from ffssl.tables import table

PACKAGES = (
    "ffssl",
    "numba",
    "numpy",
    "torch",
    "torchvision",
    "ffcv",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "pillow",
    "albumentations",
    "albumentationsx",
    "opencv-python",
    "opencv-python-headless",
)
INSTALL = {"nvidia": "nvidia-dali-cuda130"}  # where a package is not called as its module
LIMIT_S = 300  # a contender that has not answered by then counts as failed


def main(arguments: list[str]) -> None:
    parser, count = Parser("benchmark loader", description=__doc__), checked(Number(int, 1))
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", type=Path, metavar="FILE", help="a beton file of JPEG images")
    source.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="images, re-encoded at a longer side of 500 and quality 90",
    )
    parser.add_argument(
        "--samples",
        type=count,
        default=1000,
        metavar="N",
        help=(
            "images: fewer are repeated, of more so many are drawn at random (default: %(default)s)"
        ),
    )
    parser.add_argument(
        "--views",
        type=count,
        nargs="+",
        default=[2],
        metavar="N",
        help="views of each image, of each size (default: 2)",
    )
    parser.add_argument(
        "--resolution",
        type=count,
        nargs="+",
        default=[224],
        metavar="R",
        help="side of the views in pixels, of each size (default: 224)",
    )
    parser.add_argument(
        "--policy",
        default="simsiam",
        # The peers render random views only.
        choices=[name for name, (policy, *_) in POLICIES.items() if not policy.centre_crop],
        help="view policy (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=count,
        default=len(os.sched_getaffinity(0)),
        help="threads or processes of each contender (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size", type=count, default=64, help="images in a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds",
        type=count,
        default=5,
        help="times that each contender is measured (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=checked(Number(float, 0.001)),
        default=5.0,
        help="of each time, at least (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=checked(Number(int, 0)),
        default=0,
        help="of the contenders' order in each round (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    sizes = view_sizes(options.views, options.resolution, choose_policies(options.policy)[0])

    with tempfile.TemporaryDirectory(prefix="ffssl-benchmark-") as scratch:
        beton, folder = prepare_images(
            Path(scratch), options.samples, data=options.data, images=options.images
        )
        workload = Workload(
            beton=beton,
            folder=folder,
            sizes=sizes,
            workers=options.workers,
            batch_size=options.batch_size,
        )
        print(describe_machine(PACKAGES))
        print(describe_images(beton, "" if options.data or options.images else stand_ins()))
        views = " and ".join(f"{size.views} views at {size.side}" for size in sizes)
        print(
            f"{views}, policy {options.policy}, "
            f"batches of {options.batch_size}, {options.workers} workers\n"
        )
        orders = draw_orders(options.rounds, options.seed)
        for number, order in enumerate(orders, 1):
            print(f"round {number}, at least {options.seconds:g} s each: {'; '.join(order)}")
        print(flush=True)
        print(rates_table(measure(workload, orders, options.seconds), sum(options.views)))
        print_stages(beton, sizes)


def view_sizes(views: list[int], sides: list[int], policy: ViewPolicy) -> tuple[Size, ...]:
    """Return the sizes of a workload. From the second on they are local views of multi-crop."""
    if len(views) != len(sides):
        raise UserError(
            f"--views: {len(views)} numbers for {len(sides)} of --resolution; give one of each for "
            "each size"
        )
    local = local_policy(policy, AugmentOptions.local_crop_scale_max)
    policies = [policy, *[local] * (len(views) - 1)]
    return tuple(map(Size, views, sides, policies))


def print_stages(beton: Path, sizes: tuple[Size, ...]) -> None:
    """Print where the time goes on one core, and the rate that follows if nothing else took any."""
    image = 0.0
    for views, side, policy in sizes:
        stages = stage_times(beton, policy, side)
        image += views * stages["view"]
        times = "  ".join(f"{stage} {ms:.3f}" for stage, ms in stages.items())
        print(f"\nmilliseconds on one core    {times}")
        affine = stage_times(beton, replace(policy, jitter_form="affine"), side)
        print(
            f"decode: per image; the others: per view at {side}; colour with affine jitter "
            f"{affine['colour']:.3f}"
        )
    rate = 1000 / (stages["decode"] + image)
    print(f"\none decode and {sum(size.views for size in sizes)} views: {rate:.0f} image/s a core")


def prepare_images(
    scratch: Path, samples: int, *, data: Path | None = None, images: Path | None = None
) -> tuple[Path, Path]:
    """Write a beton file of `samples` images, and a folder of the same JPEG files.

    They are those of the beton file `data`, or of the folder `images`, or else `stand_ins`. Images
    are repeated if there are fewer.
    """
    files = stored_files(data, samples) if data else encoded_photographs(images, samples)
    folder = scratch / "files"
    (folder / "photos").mkdir(parents=True)
    for i in range(samples):
        (folder / "photos" / f"{i:07}.jpg").write_bytes(files[i % len(files)])
    beton = scratch / "images.beton"
    convert(ImageFolder(folder), beton, ConvertOptions(progress=False))
    return beton, folder / "photos"


def drawn_at_random(count: int, most: int) -> list[int]:
    """Return which of `count` images to take, the same each time."""
    return np.random.default_rng(0).permutation(count)[:most].tolist()


def stored_files(path: Path, most: int) -> list[bytes]:
    """Return JPEG files of a beton file."""
    beton = read_beton(path)
    if (beton.images["mode"] != MODE_JPEG).any():
        raise UserError(
            f"{path}: holds raw pixels; the benchmark compares decoding, and needs JPEG images"
        )
    file = np.memmap(path, np.uint8, "r")
    taken = drawn_at_random(len(beton), most)
    begins, sizes = beton.images["data_ptr"][taken].tolist(), beton.image_sizes[taken].tolist()
    return [file[begin : begin + size].tobytes() for begin, size in zip(begins, sizes)]


def encoded_photographs(folder: Path | None, most: int) -> list[bytes]:
    """Return images of a folder, or else `stand_ins`, as JPEG files of quality 90.

    The longer side is reduced to 500 pixels.
    """
    if folder:
        source = ImageFolder(folder, labels=False)
        images = (
            Image.open(io.BytesIO(source.load(i)[0])) for i in drawn_at_random(len(source), most)
        )
    else:
        images = map(cut_photograph if has_photographs() else draw, range(64))
    files = []
    for image in images:
        image = image.convert("RGB")
        image.thumbnail((500, 500), Image.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def has_photographs() -> bool:
    return importlib.util.find_spec("skimage") is not None


def stand_ins() -> str:
    """Say what is taken if no images are given."""
    return (
        "cut from scikit-image's photographs"
        if has_photographs()
        else "drawn, since there is no scikit-image to cut photographs from"
    )


def draw(index: int) -> Image.Image:
    """Return a drawn image of the size of `cut_photograph`'s."""
    return Image.fromarray(EmbeddedDataset("train", 64)[index][0]).resize((500, 375), Image.LANCZOS)


def cut_photograph(index: int) -> Image.Image:
    """Return a random cut, 500x375, of one of the photographs in scikit-image's package."""
    import skimage.data

    names = ("astronaut", "chelsea", "coffee", "rocket")
    photograph = Image.fromarray(getattr(skimage.data, names[index % len(names)])()[..., :3])
    generator = np.random.default_rng(index)
    height = int(photograph.height * generator.uniform(0.6, 1))
    width = min(photograph.width, height * 4 // 3)
    left = generator.integers(0, photograph.width - width + 1)
    top = generator.integers(0, photograph.height - height + 1)
    box = (left, top, left + width, top + height)
    return photograph.resize((500, 375), Image.LANCZOS, box=box)


def describe_images(path: Path, origin: str = "") -> str:
    beton = read_beton(path)
    width, height, size = (
        np.median(part)
        for part in (beton.images["width"], beton.images["height"], beton.image_sizes)
    )
    return (
        f"{len(beton)} JPEG images{origin and f' {origin}'}, median {width:.0f}x{height:.0f} "
        f"and {size / 1000:.0f} kB"
    )


def draw_orders(rounds: int, seed: int) -> list[list[str]]:
    """Return the order of the contenders in each round."""
    generator = random.Random(seed)
    return [generator.sample([*CONTENDERS], len(CONTENDERS)) for _ in range(rounds)]


def measure(
    workload: Workload, orders: list[list[str]], seconds: float
) -> dict[str, list[float] | str]:
    """Return the images/s of each contender in each round, over at least `seconds`.

    For one that is not installed or fails, return why.
    """
    context = multiprocessing.get_context("spawn")
    running: dict[str, tuple[BaseProcess, Connection]] = {}
    results: dict[str, list[float] | str] = {name: [] for name in CONTENDERS}

    def serve(name: str, seconds: float) -> float | None:
        process, connection = running[name]
        answer = _ask(connection, seconds)
        if isinstance(answer, float):
            # What it has begun to read ahead must not go on beside the others.
            _signal(process, signal.SIGSTOP)
            return answer
        results[name] = answer
        _kill(process)  # one that only hangs would go on to disturb the others
        del running[name]

    try:
        for name, contender in CONTENDERS.items():  # none compiles while another warms up
            connection, other_end = context.Pipe()
            process = context.Process(target=_serve, args=(contender, workload, other_end))
            process.start()
            other_end.close()
            running[name] = process, connection
            serve(name, seconds / 5)
        for name in itertools.chain.from_iterable(orders):
            if name not in running:
                continue
            _signal(running[name][0], signal.SIGCONT)
            rate = serve(name, seconds)
            if rate is not None:
                results[name].append(rate)
    finally:
        for process, _ in running.values():
            _kill(process)
    return results


def _signal(process: BaseProcess, number: signal.Signals) -> None:
    """Send a signal to a contender's processes, all of them."""
    with contextlib.suppress(ProcessLookupError):  # ended, or not yet begun
        os.killpg(process.pid, number)


def _kill(process: BaseProcess) -> None:
    _signal(process, signal.SIGKILL)
    process.kill()  # it may not lead its group yet
    process.join()


def _ask(connection: Connection, seconds: float) -> float | str:
    """Return a contender's images/s over at least `seconds`, or what went wrong."""
    try:
        connection.send(seconds)
        return connection.recv() if connection.poll(LIMIT_S) else f"no answer within {LIMIT_S} s"
    except (EOFError, ConnectionError):
        return "its process ended"


def _serve(
    contender: Callable[[Workload], Batches], workload: Workload, connection: Connection
) -> None:
    """Run one contender's process: for every message, serve batches for so many seconds."""
    os.setpgrp()  # with its own processes, to be stopped together
    try:
        batches = contender(workload)
        while True:
            connection.send(_images_per_second(batches, workload.workers, connection.recv()))
    except EOFError:
        pass
    except ModuleNotFoundError as error:
        package = str(error.name).split(".")[0]
        connection.send(f"not installed: pip install {INSTALL.get(package, package)}")
    except Exception as error:  # a peer that fails must not stop the benchmark
        connection.send(
            f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )


def _images_per_second(batches: Batches, workers: int, seconds: float) -> float:
    """Return images/s over at least `seconds`.

    Batches are counted by as many as there are workers. Where each worker makes one of its own,
    as in a DataLoader, they come so many at a time.
    """
    images, started = 0, time.perf_counter()
    while True:
        images += sum(len(batch[0]) for batch in itertools.islice(batches, workers))
        passed = time.perf_counter() - started
        if passed >= seconds:
            return images / passed


def rates_table(results: dict[str, list[float] | str], views: int) -> str:
    """Return a row for each contender: median rates, and by how much `ffssl` is faster.

    The latter is the median of the rounds' ratios, with their range. Contenders without rates
    follow, with the reason.
    """
    ours, rows, missing = results["ffssl"], [], []
    for name, rates in results.items():
        if isinstance(rates, str):
            missing.append(f"\n{name}: {rates}")
            continue
        rate, faster = statistics.median(rates), ("", "")
        if not isinstance(ours, str):
            ratios = [a / b for a, b in zip(ours, rates)]
            faster = f"{statistics.median(ratios):.2f}x", f"{min(ratios):.2f}-{max(ratios):.2f}"
        rows.append((name, f"{rate:.0f}", f"{views * rate:.0f}", *faster))
    titles = ("", "image/s", "view/s", "ffssl is faster by", "range")
    return table(titles, rows) + "".join(missing)
