"""How long a run's steps take on given machines, and what bounds them: the model of `python -m ffssl.benchmark plan`.

A step takes a batch of images, shared equally among the GPUs. GPU, loader and storage work at the same time on different batches, so a step
takes as long as the slowest of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ffssl.cost import STANDARD, Flops

CORES_PER_PROCESS, GB_PER_PROCESS = 1, 8  # assumed: what each GPU's training process takes, its libraries and view buffers included


@dataclass(frozen=True)
class Machines:
    """What there is: in all (gpus, nodes), in each node (cores, memory and disk in bytes), and bytes/s a node reads or a link carries."""

    gpus: int
    nodes: int
    cores: int
    memory: float
    disk: float
    disk_rate: float
    network_rate: float
    link_rate: float


@dataclass(frozen=True)
class Work:
    """What one image costs in a stage. gpu: seconds on one GPU, of which the share `backward` is the backward pass; loader: seconds on one core."""

    resolution: int
    epochs: int
    gpu: float
    backward: float
    loader: float


@dataclass(frozen=True)
class StepTimes:
    """Seconds of an optimiser step. link: of the gradients' exchange, what the backward pass does not hide."""

    gpu: float
    link: float
    loader: float
    storage: float
    overlap: bool

    @property
    def step(self) -> float:
        return max(self.gpu + self.link, self.loader, self.storage)

    @property
    def bound(self) -> str:
        """Which of GPU, link, loader and storage it is that takes so long."""
        if self.step > self.gpu + self.link:
            return "loader" if self.loader >= self.storage else "storage"
        # Overlapped, the link is in the way as soon as any of it shows: a faster GPU would gain nothing but for its forward pass.
        return "link" if self.link > (0 if self.overlap else self.gpu) else "GPU"

    @property
    def efficiency(self) -> float:
        """Images/s of a GPU over those of one that exchanges nothing."""
        return self.gpu / (self.gpu + self.link)


def exchange_seconds(gradient: float, gpus: int, link_rate: float) -> float:
    """A ring all-reduce of `gradient` bytes: each of n GPUs sends and receives 2 (n - 1) / n of them (Patarasuk & Yuan 2009)."""
    return 2 * (gpus - 1) / gpus * gradient / link_rate


def storage_of(beton: float, machines: Machines) -> tuple[str, float]:
    """Where every epoch but the first reads a file of `beton` bytes from, and at how many bytes/s a node."""
    if beton <= machines.memory - GB_PER_PROCESS * 1e9 * machines.gpus / machines.nodes:
        return "page cache", float("inf")
    return ("local disk", machines.disk_rate) if beton <= machines.disk else ("network", machines.network_rate)


def step_times(
    work: Work, machines: Machines, *, batch_size: int, parts: int, gradient: float, image_bytes: float, storage_rate: float, overlap: bool
) -> StepTimes:
    """A step on `batch_size` images in all, which each GPU computes in `parts`, one after the other: the gradients are exchanged with the last.

    gradient: bytes; image_bytes: read for each image; storage_rate: bytes/s of a node.
    """
    gpu = work.gpu * batch_size / machines.gpus
    exchange = exchange_seconds(gradient, machines.gpus, machines.link_rate)
    link = max(0.0, exchange - work.backward * gpu / parts) if overlap else exchange
    loader_cores = machines.cores * machines.nodes - CORES_PER_PROCESS * machines.gpus
    loader = work.loader * batch_size / loader_cores
    return StepTimes(gpu, link, loader, image_bytes * batch_size / machines.nodes / storage_rate, overlap)


def cores_per_gpu(work: Work, times: StepTimes) -> float:
    """Cores that a GPU needs so that it never waits for the loader, its training process's included."""
    images_per_second = times.gpu / work.gpu / (times.gpu + times.link)
    return work.loader * images_per_second + CORES_PER_PROCESS


@dataclass(frozen=True)
class Measured:
    """One GPU and one core at one resolution: seconds a training image takes on the one, and a loaded image on the other."""

    resolution: int
    gpu: float
    loader: float


def work_of(stages: Sequence[tuple[int, int]], measured: Sequence[Measured], flops: Callable[[int], Flops]) -> list[Work]:
    """The stages (resolution, epochs) with their times. One that was not measured takes the nearest resolution's, the GPU's by the FLOPs."""
    work = []
    for resolution, epochs in stages:
        nearest = min(measured, key=lambda known: abs(known.resolution - resolution))
        cost = flops(resolution)
        ratio = cost.total() / flops(nearest.resolution).total()
        work.append(Work(resolution, epochs, nearest.gpu * ratio, STANDARD * cost.forward / cost.total(), nearest.loader))
    return work


@dataclass(frozen=True)
class Row:
    """Epochs that take equally long. cores: that a GPU needs, see `cores_per_gpu`."""

    resolution: int
    epochs: int
    times: StepTimes
    cores: float
    seconds: float


def schedule(
    work: Sequence[Work], machines: Machines, *, images: int, batch_size: int, parts: int, gradient: float, beton: float, overlap: bool
) -> tuple[str, list[Row]]:
    """Where a file of `beton` bytes is read from, and the run's epochs in order.

    A file that the page cache holds is read in the first epoch, by each node as a whole: its share of the images changes by the epoch.
    """
    where, rate = storage_of(beton, machines)
    rates = [rate] * len(work)
    if where == "page cache":
        work = [replace(work[0], epochs=1), replace(work[0], epochs=work[0].epochs - 1), *work[1:]]
        rates = [storage_of(beton, replace(machines, memory=0))[1] / machines.nodes, rate, *rates[1:]]
    rows = []
    for stage, storage_rate in zip(work, rates):
        if stage.epochs:
            times = step_times(
                stage, machines, batch_size=batch_size, parts=parts, gradient=gradient, image_bytes=beton / images, storage_rate=storage_rate,
                overlap=overlap,
            )  # fmt: skip
            seconds = stage.epochs * (images // batch_size) * times.step
            rows.append(Row(stage.resolution, stage.epochs, times, cores_per_gpu(stage, times), seconds))
    return where, rows
