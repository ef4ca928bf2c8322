import os
import subprocess
import sys

from ffssl.data.convert import convert
from ffssl.data.sources.embedded import Embedded


STAND_INS = {  # peers that fail, each in its own way
    "nvidia/__init__.py": "",
    "nvidia/dali/__init__.py": "def __getattr__(name): raise RuntimeError('driver too old')",
    "torchvision/__init__.py": "import os; os._exit(3)",
}


def test_a_peer_that_fails_or_dies_is_named_and_the_others_are_measured(tmp_path):
    for name, code in STAND_INS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    convert(Embedded("train", 16), tmp_path / "images.beton")
    command = "-m ffssl.benchmark loader --samples 16 --views 1 --resolution 32 --batch-size 8 --rounds 1 --workers 1 --data"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.getcwd()}"}
    result = subprocess.run(
        [sys.executable, *command.split(), str(tmp_path / "images.beton")], env=environment, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr
    said = {line[:28].strip(): line[28:].strip() for line in result.stdout.splitlines()}
    assert said["DALI, CPU"] == "failed: RuntimeError: driver too old"
    assert said["torchvision + DataLoader"] == "its process ended"
    assert float(said["ffssl"].split()[0]) > 0 and float(said["ffssl, one worker"].split()[0]) > 0


def test_loader_benchmark_names_every_contender_and_survives_those_that_fail(tmp_path):
    convert(Embedded("train", 16), tmp_path / "images.beton")
    command = "-m ffssl.benchmark loader --samples 16 --views 1 --resolution 32 --batch-size 8 --rounds 1 --workers 1 --data"
    result = subprocess.run([sys.executable, *command.split(), str(tmp_path / "images.beton")], capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for name in ("ffssl", "ffssl, one worker", "ffssl, affine jitter", "decode only", "ffcv, crop and flip only", "torchvision + DataLoader"):
        rate = next(line for line in lines if line.startswith(f"{name:<28}"))
        assert float(rate[28:].split()[0]) > 0
    dali = next(line for line in lines if line.startswith("DALI, CPU"))
    assert "not installed" in dali or float(dali[28:].split()[0]) > 0
    assert any(line.startswith("milliseconds on one core") for line in lines)


def test_mistakes_cost_one_line():
    result = subprocess.run([sys.executable, "-m", "ffssl.benchmark", "laoder"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, "error: 'laoder': unknown benchmark; known are loader, plan\n")
