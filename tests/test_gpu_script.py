import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from ffssl.data.beton.read import read_beton
from ffssl.data.convert.embedded import EmbeddedDataset
from ffssl.run_folder.log import read_log

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def run(*words, python=sys.executable):
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": str(python)},
    )


@pytest.fixture
def tars(tmp_path):
    """Tars of drawn images, laid out as Imagenette's, and a stranger."""
    folder = tmp_path / "tars"
    folder.mkdir()
    stranger(folder / "a-stranger.tar", "other/train/file")
    for split, count in (("train", 60), ("val", 16)):
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


@pytest.fixture
def slow_python(tmp_path):
    """In place of Python: prints its arguments, and takes a second."""
    program = tmp_path / "slow"
    program.write_text('#!/bin/bash\necho "$@"\nsleep 1\n')
    program.chmod(0o755)
    return program


def sections_of(report):
    """By title, what stands below it."""
    return dict(text.split("\n", 1) for text in report.read_text().split("\n## ")[1:])


def archived(folder):
    with tarfile.open(folder / "results.tgz") as tar:
        return {name.removeprefix("./") for name in tar.getnames()}


@pytest.mark.slow
def test_it_measures_trains_and_reports(tars, tmp_path):
    prepared = run("--prepare", tars, tmp_path / "data", "--toy")
    assert prepared.returncode == 0, prepared.stderr
    assert (
        len(read_beton(tmp_path / "data" / "train.beton")) == 50
        and len(read_beton(tmp_path / "data" / "val.beton")) == 15
    )
    assert sorted(path.suffix for path in (tmp_path / "data").iterdir()) == [
        ".beton",
        ".beton",
        ".json",
        ".json",
    ]
    out = tmp_path / "out"
    result = run(out, "--imagenette", tmp_path / "data", "--toy", "--minutes", "30")
    report = (out / "report.md").read_text()
    assert result.returncode == 0, report + result.stderr
    assert list(sections_of(out / "report.md")) == [
        "Machine",
        "Tests",
        "GPU against CPU",
        "Speed-up: ResNet-50",
        "Step: ResNet-50, torch.compile off",
        "Step: ResNet-18, torch.compile off",
        "Step: ResNet-50 at full resolution",
        *(
            f"Imagenette: {method}, {recipe}"
            for method in ("simsiam", "simclr")
            for recipe in ("efficient", "baseline")
        ),
    ]
    assert (
        "Failed with status" not in report
        and str(tmp_path) not in report
        and str(ROOT) not in report
    )
    assert report.count("untrained: kNN") == 4 and "epoch 5/5" in report and "epoch 3/3" in report
    assert read_log(out / "simclr-efficient")[-1]["epoch"] == 3
    names = archived(out)
    assert {
        "report.md",
        "speedup-resnet50/speedup.json",
        "step-resnet18-off.json",
        "simclr-efficient/log.jsonl",
    } <= names
    assert not any("checkpoint" in name for name in names)


def test_the_most_telling_comes_first_and_every_section_has_its_networks_options(tmp_path):
    # Each section then holds its command.
    assert run(tmp_path / "out", python="echo").returncode == 0
    sections = sections_of(tmp_path / "out" / "report.md")
    assert (
        list(sections)[:4] == ["Machine", "Tests", "GPU against CPU", "Speed-up: ResNet-50"]
        and len(sections) == 4 + 2 * 3 + 1
    )
    for title, text in sections.items():
        assert ("--model.backbone=resnet18" in text) == ("ResNet-18" in title)
        assert f"--training.compile={title.split()[-1]}" in text or "torch.compile" not in title
    tested = [word for word in sections["Tests"].split() if word.startswith("tests/")]
    assert tested and all((ROOT / path).exists() for path in tested)


def test_chosen_sections_are_added_to_the_report(tmp_path):
    out = tmp_path / "out"
    for pattern in ("Step: ResNet-18*", "Machine"):
        assert run(out, "--only", pattern, python="echo").returncode == 0
    assert list(sections_of(out / "report.md")) == [
        *(
            f"Step: ResNet-18, torch.compile {mode}"
            for mode in ("off", "default", "reduce-overhead")
        ),
        "Machine",
    ]
    assert run(out, "--only", "Stop*", python="echo").stderr.startswith(
        "error: --only: no section Stop*"
    )


def test_what_the_clock_cuts_is_named_and_what_is_found_so_far_is_in_the_archive(
    tmp_path, slow_python
):
    out = tmp_path / "out"
    program = slow_python.read_text().replace(
        "sleep 1", f'case "$*" in *speedup*) sleep 30 ;; esac; cp "$0" {out}/from-"$3"'
    )
    slow_python.write_text(program)
    text = SCRIPT.read_text()
    assert "60 * minutes" in text
    (tmp_path / "benchmarks").mkdir()
    hurried = tmp_path / "benchmarks" / "gpu.sh"
    # Whose minutes have nine seconds.
    hurried.write_text(text.replace("60 * minutes", "9 * minutes"))
    ran = subprocess.run(
        ["bash", hurried, out, "--minutes", "1"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": str(slow_python)},
    )
    assert ran.returncode == 0, ran.stderr
    sections = sections_of(out / "report.md")
    assert list(sections)[-1] == "What was cut"
    cut = [line for line in sections["What was cut"].splitlines() if line.startswith("- ")]
    assert (
        cut[0].startswith("- Speed-up: ResNet-50: cut after ")
        and cut[1] == "- Step: ResNet-50, torch.compile off: not begun"
    )
    assert len(cut) == 1 + 7 and archived(out) >= {"report.md", "from-agreement"}


def test_a_section_that_fails_is_told_of_and_the_others_go_on(tmp_path, slow_python):
    slow_python.write_text(
        '#!/bin/bash\ncase "$*" in *"-m pytest"*) echo "this went wrong" >&2; exit 3 ;; '
        "esac\necho fine\n"
    )
    assert run(tmp_path / "out", python=slow_python).returncode == 1
    sections = sections_of(tmp_path / "out" / "report.md")
    assert "**Failed with status 3:**\n\n    this went wrong" in sections["Tests"]
    assert [title for title, text in sections.items() if "Failed" in text] == ["Tests"] and len(
        sections
    ) == 11


def test_tars_that_do_not_hold_one_folder_of_each_split_are_refused_at_once(tmp_path):
    prepare = ("--prepare", tmp_path, tmp_path / "out")
    stranger(tmp_path / "train-0.tar", "a/train/n0/0.JPEG")
    assert run(*prepare).stderr.startswith(
        "error: --prepare: neither a folder val nor *val*.tar in"
    )
    stranger(tmp_path / "val.tar", "a/test/n0/0.JPEG")
    assert (
        run(*prepare, python="true").stderr
        == "error: --prepare: *val*.tar must hold one folder called val, not 0\n"
    )
    stranger(tmp_path / "train-1.tar", "a/train/n0/1.JPEG", "b/train/n0/0.JPEG")
    assert run(*prepare, python="false").stderr == (
        "error: --prepare: *train*.tar must hold one folder called train, not 2: a/train b/train\n"
    )


def test_folders_of_both_splits_need_no_tars(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
    told = run(
        "--prepare", tmp_path / "images", tmp_path / "out", python="echo"
    ).stdout.splitlines()
    for line, split, size in zip(told, ("train", "val"), (5000, 1500)):
        assert f"--input {tmp_path / 'images' / split} " in line and line.endswith(
            f"--subset {size} --max-side 128"
        )


def test_mistakes_are_named(tmp_path):
    assert run("--tiny").stderr.startswith("error: --tiny: unknown option")
    assert (
        run(tmp_path / "out", "--minutes", "ten").stderr
        == "error: --minutes: ten is not a whole number\n"
    )
    message = run(tmp_path / "out", "--imagenette", tmp_path).stderr
    assert (
        message.startswith(f"error: --imagenette: no train.beton in {tmp_path}; make it with")
        and "--prepare" in message
    )
    assert run(tmp_path / "out", "--wheels", tmp_path).stderr.startswith(
        f"error: --wheels: no wheels in {tmp_path}; make them with make wheelhouse"
    )
    (tmp_path / "train.beton").touch()
    assert "holds other things" in run(tmp_path).stderr and (tmp_path / "train.beton").exists()
    assert run().returncode == 2 and "benchmarks/gpu.sh OUTPUT" in run("--help").stdout
