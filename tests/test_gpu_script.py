import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from ffssl.data.embedded import EmbeddedDataset

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def run(*words):
    return subprocess.run(["bash", str(SCRIPT), *map(str, words)], capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})


@pytest.fixture
def tars(tmp_path):
    """Tars of drawn images, laid out as Imagenette's."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for split, count in (("train", 48), ("val", 16)):
        dataset = EmbeddedDataset(split, count)
        with tarfile.open(folder / f"imagenette-{split}.tar", "w") as tar:
            for i in range(count):
                pixels, label = dataset[i]
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "JPEG")
                member = tarfile.TarInfo(f"imagenette/{split}/n{label:08}/{i}.JPEG")
                member.size = file.tell()
                file.seek(0)
                tar.addfile(member, file)
    return folder


@pytest.mark.slow
def test_it_measures_trains_and_reports(tars, tmp_path):
    result = run(tmp_path / "out", "--imagenette", tars, "--minutes", "0.02", "--toy")
    report = (tmp_path / "out" / "report.md").read_text()
    assert result.returncode == 0, report + result.stderr
    sections = [line[3:] for line in report.splitlines() if line.startswith("## ")]
    assert sections == [
        *(f"{kind}: {method}, {network}{end}" for method in ("simsiam", "byol") for network in ("resnet50", "resnet18")
          for kind, end in (("Step", ", torch.compile off"), ("Speed-up", ""))),
        "Conversion: train", "Conversion: val", "Speed-up: Imagenette, ResNet-18", "Imagenette, ResNet-18, standard",
        "Imagenette, ResNet-18, efficient", "Report",
    ]  # fmt: skip
    assert report.count("untrained: kNN") == 2 and "epoch 5/5" in report and "epoch 3/3" in report
    assert "Failed" not in report and str(tmp_path) not in report and str(ROOT) not in report
    assert (tmp_path / "out" / "report.html").exists()


def test_mistakes_are_named(tmp_path):
    assert run("--tiny").stderr.startswith("error: --tiny: unknown option")
    assert run(tmp_path / "out", "--imagenette", tmp_path).stderr.startswith("error: --imagenette: no *train*.tar in")
    assert run().returncode == 2 and "benchmarks/gpu.sh OUTPUT" in run("--help").stdout
