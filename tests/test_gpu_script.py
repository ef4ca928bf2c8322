import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from ffssl.data.convert.embedded import EmbeddedDataset
from ffssl.run_folder.log import read_log

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def run(*words, python=sys.executable):
    return subprocess.run(["bash", str(SCRIPT), *map(str, words)], capture_output=True, text=True, env=os.environ | {"PYTHON": python})


@pytest.fixture
def tars(tmp_path):
    """Tars of drawn images, laid out as Imagenette's, and a stranger."""
    folder = tmp_path / "tars"
    folder.mkdir()
    stranger(folder / "a-stranger.tar", "other/train/file")
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


def stranger(path, *members):
    with tarfile.open(path, "w") as tar:
        for name in members:
            tar.addfile(tarfile.TarInfo(name))


def sections_of(report):
    """By title, what stands below it."""
    return dict(text.split("\n", 1) for text in report.read_text().split("\n## ")[1:])


@pytest.mark.slow
def test_it_measures_trains_and_reports(tars, tmp_path):
    result = run(tmp_path / "out", "--imagenette", tars, "--minutes", "0.02", "--toy")
    report = (tmp_path / "out" / "report.md").read_text()
    assert result.returncode == 0, report + result.stderr
    sections = [line[3:] for line in report.splitlines() if line.startswith("## ")]
    assert sections == [
        "Conversion: train", "Conversion: val",
        *(f"{kind}: {method}, {network}{end}" for method in ("simsiam", "byol") for network in ("resnet50", "resnet18")
          for kind, end in (("Step", ", torch.compile off"), ("Speed-up", ""))),
        "Speed-up: Imagenette, ResNet-18", "Imagenette, ResNet-18, standard", "Imagenette, ResNet-18, efficient",
        "Imagenette, ResNet-18, what they took", "Report",
    ]  # fmt: skip
    assert report.count("untrained: kNN") == 2 and "epoch 5/5" in report and "epoch 3/3" in report
    assert "Failed" not in report and str(tmp_path) not in report and str(ROOT) not in report
    assert (tmp_path / "out" / "report.html").exists()
    took = sections_of(tmp_path / "out" / "report.md")["Imagenette, ResNet-18, what they took"]
    for name in ("standard", "efficient"):
        last = read_log(tmp_path / "out" / name)[-1]
        row = next(line.split() for line in took.splitlines() if line.startswith(f"{name} "))
        assert row == [name, str(last["epoch"]), f"{last['seconds'] / 60:.2f}", f"{last['flops'] / 1e15:.4g}", "-", f"{last['knn']:.1%}"]
    again = run(tmp_path / "out", "--imagenette", tars, "--minutes", "0.02", "--toy", "--only", "Speed-up: byol, resnet18")
    assert again.returncode == 0 and (tmp_path / "out" / "report.md").read_text().startswith(report)
    assert (tmp_path / "out" / "report.md").read_text().count("\n## ") == len(sections) + 1


def test_every_section_has_its_networks_options(tmp_path):
    assert run(tmp_path, python="echo").returncode == 0  # each section then holds its command
    sections = sections_of(tmp_path / "report.md")
    assert len(sections) == 2 * 2 * (3 + 1)
    for title, text in sections.items():
        assert ("--model.backbone=resnet18" in text) == ("resnet18" in title)
        assert ("rn50_configs/byol_efficient.yaml" in text) == ("byol" in title)
        assert "--images=imagenet" in text or "Speed-up" not in title


def test_chosen_sections_are_added_to_the_report(tmp_path):
    for pattern in ("Step: byol, resnet18*", "*simsiam, resnet50, torch.compile off"):
        assert run(tmp_path, "--only", pattern, python="echo").returncode == 0
    assert list(sections_of(tmp_path / "report.md")) == [
        *(f"Step: byol, resnet18, torch.compile {mode}" for mode in ("off", "default", "reduce-overhead")),
        "Step: simsiam, resnet50, torch.compile off",
    ]
    assert run(tmp_path, "--only", "Stop*", python="echo").stderr.startswith("error: --only: no section Stop*")


def test_tars_that_do_not_hold_one_folder_of_each_split_are_refused_at_once(tmp_path):
    stranger(tmp_path / "train-0.tar", "a/train/n0/0.JPEG")
    assert run(tmp_path / "out", "--imagenette", tmp_path).stderr.startswith("error: --imagenette: neither a folder val nor *val*.tar in")
    stranger(tmp_path / "val.tar", "a/test/n0/0.JPEG")
    message = "error: --imagenette: *val*.tar must hold one folder called val, not 0\n"
    assert run(tmp_path / "out", "--imagenette", tmp_path, python="false").stderr == message
    stranger(tmp_path / "train-1.tar", "a/train/n0/1.JPEG", "b/train/n0/0.JPEG")
    message = "error: --imagenette: *train*.tar must hold one folder called train, not 2: a/train b/train\n"
    assert run(tmp_path / "out", "--imagenette", tmp_path, python="false").stderr == message


def test_folders_of_both_splits_need_no_tars(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
    assert run(tmp_path / "out", "--imagenette", tmp_path / "images", python="echo").returncode == 0
    conversions = [text for title, text in sections_of(tmp_path / "out" / "report.md").items() if title.startswith("Conversion")]
    assert [f"--input {tmp_path / 'images' / split} " in text for split, text in zip(("train", "val"), conversions)] == [True, True]


def test_mistakes_are_named(tmp_path):
    assert run("--tiny").stderr.startswith("error: --tiny: unknown option")
    assert run(tmp_path / "out", "--imagenette", tmp_path).stderr.startswith("error: --imagenette: neither a folder train nor *train*.tar in")
    (tmp_path / "train.beton").touch()
    assert "holds other things" in run(tmp_path).stderr and (tmp_path / "train.beton").exists()
    assert run().returncode == 2 and "benchmarks/gpu.sh OUTPUT" in run("--help").stdout
