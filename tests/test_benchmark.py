import subprocess
import sys
from argparse import Namespace

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
    names = ("DALI, CPU", "torchvision + DataLoader", "ffssl")
    monkeypatch.setattr(loader, "CONTENDERS", {name: loader.CONTENDERS[name] for name in names})
    workload = loader.Workload(
        tmp_path / "images.beton",
        tmp_path,
        sizes=loader.view_sizes([1], [32], choose_policies("simsiam")[0]),
        workers=1,
        batch_size=8,
    )
    failed, ended, rates = loader.measure(workload, rounds=2).values()
    assert (failed, ended) == ("failed: RuntimeError: driver too old", "its process ended")
    assert len(rates) == 2 and min(rates) > 0


def test_of_a_large_file_some_images_are_drawn(betons, tmp_path):
    names = ("first", "again")
    taken = []
    for name in names:
        options = Namespace(data=betons["train"], images=None, samples=12)
        beton, folder = loader.prepare_images(options, tmp_path / name)
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
    _, folder = loader.prepare_images(
        Namespace(data=betons["val"], images=None, samples=100), tmp_path
    )
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
        "-m ffssl.benchmark loader --samples 16 --views 1 2 --resolution 32 16 --batch-size 8 "
        "--rounds 1 --workers 1 --data"
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
        "torchvision + DataLoader",
    ):
        assert float(rates[name]) > 0
    if "DALI, CPU" in rates:
        assert float(rates["DALI, CPU"]) > 0
    else:
        assert any(line.startswith("DALI, CPU: not installed") for line in lines)
    assert sum(line.startswith("milliseconds on one core") for line in lines) == 2
    assert float(lines[-1].removeprefix("one decode and 3 views: ").split()[0]) > 0
