import multiprocessing
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from support.printed_tables import rows_of

from ffssl.benchmark import loader
from ffssl.data.beton.read import read_beton
from ffssl.data.convert.conversion import convert
from ffssl.data.convert.sources.embedded import Embedded
from ffssl.data.policy import choose_policies
from ffssl.errors import UserError

STAND_INS = {  # peers that fail, each in its own way
    "nvidia/__init__.py": "",
    "nvidia/dali/__init__.py": "def __getattr__(name): raise RuntimeError('driver too old')",
    "torchvision/__init__.py": "import os; os._exit(3)",
}


def test_a_peer_that_fails_or_dies_is_named_and_the_others_are_measured(tmp_path, monkeypatch):
    for name, code in STAND_INS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    convert(Embedded("train", 16), tmp_path / "images.beton")
    monkeypatch.syspath_prepend(tmp_path)  # and thereby for the contenders' processes
    names = ("DALI, CPU", "torchvision v1, PIL + DataLoader", "ffssl")
    monkeypatch.setattr(loader, "CONTENDERS", {name: loader.CONTENDERS[name] for name in names})
    workload = loader.Workload(
        tmp_path / "images.beton",
        tmp_path,
        sizes=loader.view_sizes([1], [32], choose_policies("simsiam")[0]),
        workers=1,
        batch_size=8,
    )
    failed, ended, rates = loader.measure(workload, [[*names]] * 2, seconds=0.01).values()
    assert (failed, ended) == ("failed: RuntimeError: driver too old", "its process ended")
    assert len(rates) == 2 and min(rates) > 0


def reads_ahead(workload):
    """A contender with work in a thread and in a process of its own, which never ends by itself."""
    ahead = [workload.folder / name for name in ("thread", "process")]
    worker = multiprocessing.get_context("fork").Process(target=grow, args=ahead[1:])
    worker.start()
    (workload.folder / "pid").write_text(str(worker.pid))
    threading.Thread(target=grow, args=ahead[:1], daemon=True).start()
    while True:
        before = sizes(ahead)
        while any(a <= b for a, b in zip(sizes(ahead), before)):
            time.sleep(0.001)
        yield [range(8)]


def needs_quiet(workload):
    """A contender that fails if the other one's work goes on."""
    ahead = [workload.folder / name for name in ("thread", "process")]
    while True:
        time.sleep(0.1)  # a write may be under way
        before = sizes(ahead)
        time.sleep(0.2)
        if sizes(ahead) != before:
            raise RuntimeError("the other one works")
        yield [range(8)]


def grow(path):
    while True:
        with path.open("ab") as file:
            file.write(b".")
        time.sleep(0.001)


def sizes(paths):
    return [path.stat().st_size if path.exists() else 0 for path in paths]


def test_what_reads_ahead_stands_still_while_others_run(tmp_path, monkeypatch):
    contenders = {"ahead": reads_ahead, "quiet": needs_quiet}
    monkeypatch.setattr(loader, "CONTENDERS", contenders)
    orders = [["ahead", "quiet"], ["quiet", "ahead"], ["ahead", "quiet"]]
    rates = loader.measure(small_workload(tmp_path), orders, seconds=0.001)
    assert [len(of) for of in rates.values()] == [3, 3], rates
    worker = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    deadline = time.monotonic() + 60
    while worker.exists() and " Z " not in worker.read_text():
        assert time.monotonic() < deadline, "a contender's own process is left"
        time.sleep(0.01)


def small_workload(folder):
    return loader.Workload(folder, folder, sizes=(), workers=1, batch_size=8)


def tells(name, workload):
    while True:
        with (workload.folder / "served").open("a") as file:
            file.write(name)
        yield [range(8)]


def test_contenders_take_turns_in_the_order_drawn(tmp_path, monkeypatch):
    orders = loader.draw_orders(20, seed=1)
    assert all(sorted(order) == sorted(loader.CONTENDERS) for order in orders)
    assert len({*map(tuple, orders)}) > 10
    assert orders == loader.draw_orders(20, seed=1) != loader.draw_orders(20, seed=2)

    monkeypatch.setattr(loader, "CONTENDERS", {name: partial(tells, name) for name in "abc"})
    loader.measure(small_workload(tmp_path), [["b", "c", "a"], ["c", "a", "b"]], seconds=1e-9)
    assert (tmp_path / "served").read_text() == "abc" + "bca" + "cab"


def lacks(error, workload):
    raise error


def test_what_to_install_is_told(tmp_path, monkeypatch):
    absent = {name: ModuleNotFoundError("", name=name) for name in ("nvidia.dali", "a.b")}
    broken = {"broken": ImportError("libGL.so.1: cannot open shared object file", name="cv2")}
    contenders = {name: partial(lacks, error) for name, error in (absent | broken).items()}
    monkeypatch.setattr(loader, "CONTENDERS", contenders)
    told = loader.measure(small_workload(tmp_path), [[*contenders]], seconds=1)
    assert [*told.values()] == [
        "not installed: pip install nvidia-dali-cuda130",
        "not installed: pip install a",
        "failed: ImportError: libGL.so.1: cannot open shared object file",
    ]


def test_a_rate_is_of_the_least_seconds_and_of_as_many_batches_of_each_worker(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def two_workers():
        nonlocal now
        while True:
            now += 2.0  # then each has made one
            yield [range(8)]
            yield [range(8)]

    batches = two_workers()
    for seconds, passed in ((5, 6), (4, 4), (0.1, 2)):
        began = now
        assert loader._images_per_second(batches, workers=2, seconds=seconds) == 8
        assert now - began == passed


def test_of_a_large_file_some_images_are_drawn(betons, tmp_path):
    names = ("first", "again")
    taken = []
    for name in names:
        beton, folder = loader.prepare_images(tmp_path / name, 12, data=betons["train"])
        taken.append([path.read_bytes() for path in sorted(folder.iterdir())])
        assert len(read_beton(beton)) == 12
    stored = loader.stored_files(betons["train"], 160)
    assert (
        taken[0] == taken[1]
        and len({*taken[0]}) == 12
        and {*taken[0]} < {*stored}
        and len({*stored}) == 160
    )


def test_fewer_images_than_asked_for_are_repeated(betons, tmp_path):
    _, folder = loader.prepare_images(tmp_path, 100, data=betons["val"])
    files = [path.read_bytes() for path in sorted(folder.iterdir())]
    assert len(files) == 100 and files[:40] == files[40:80] and len({*files}) == 40


def test_the_sizes_of_a_workload_are_global_and_local_views():
    simsiam, byol = (choose_policies(name)[0] for name in ("simsiam", "byol"))
    ((views, side, policy),) = loader.view_sizes([2], [224], byol)
    assert (views, side, policy) == (2, 224, byol)
    (large, small) = loader.view_sizes([2, 6], [224, 96], byol)
    assert large == (2, 224, byol) and small[:2] == (6, 96)
    assert small.policy.crop_scale == (0.05, 0.14) and small.policy.blur == 0.5
    assert small.policy.saturation == byol.saturation != simsiam.saturation
    with pytest.raises(UserError, match="--views: 1 numbers for 2"):
        loader.view_sizes([2], [224, 96], byol)


def test_loader_benchmark_names_every_contender_and_survives_those_that_fail(tmp_path):
    convert(Embedded("train", 16), tmp_path / "images.beton")
    command = (
        "-m ffssl.benchmark loader --samples 16 --views 1 1 --resolution 32 16 --batch-size 8 "
        "--rounds 1 --seconds 0.1 --workers 1 --data"
    )
    result = subprocess.run(
        [sys.executable, *command.split(), str(tmp_path / "images.beton")],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    rates = {name: rate for name, rate, *_ in rows_of(result.stdout)}
    for name in (
        "ffssl",
        "ffssl, one worker",
        "ffssl, affine jitter",
        "decode only",
        "ffcv, crop and flip only",
        "torchvision v1, PIL + DataLoader",
        "torchvision v2, tensors + DataLoader",
    ):
        assert float(rates[name]) > 0
    for name, package in (
        ("DALI, CPU", "nvidia-dali-cuda130"),
        ("Albumentations + DataLoader", "albumentations"),
    ):
        if name in rates:
            assert float(rates[name]) > 0
        else:
            assert f"{name}: not installed: pip install {package}" in lines
    (order,) = loader.draw_orders(1, seed=0)
    assert f"round 1, at least 0.1 s each: {'; '.join(order)}" in lines
    assert sum(line.startswith("milliseconds on one core") for line in lines) == 2
    assert float(lines[-1].removeprefix("one decode and 2 views: ").split()[0]) > 0
