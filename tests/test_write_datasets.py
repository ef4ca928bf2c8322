"""The converter as its users meet it: the program, its messages, its exit status, its end by
signal.
"""

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from ffssl.data.beton.read import read_beton

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = [sys.executable, str(ROOT / "write_datasets.py")]


def run(*arguments, **options):
    command = [*PROGRAM, *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=options.pop("cwd", None),
        **options,
    )


def assert_refused(result, status, *words):
    assert result.returncode == status, result
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    random = np.random.default_rng(0)
    for i in range(6):
        path = folder / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(random.integers(0, 256, (60, 80 + i, 3), np.uint8)).save(path)
    return folder


def test_help_is_complete():
    result = run("--help")
    assert result.returncode == 0
    for source in (
        "folder",
        "imagenet",
        "imagenette",
        "cifar10",
        "stl10",
        "huggingface",
        "webdataset",
        "embedded",
    ):
        assert source in result.stdout
        assert run(source, "--help").stdout.count("--output FILE") >= 1
    assert "examples:" in result.stdout


def test_a_whole_run(images, tmp_path):
    result = run(
        "folder", "--input", "images", "--output", "out.beton", "--workers", 2, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "out.beton: 6 samples, 2 classes" in result.stdout and "6 kept" in result.stdout
    description = json.loads((tmp_path / "out.beton.json").read_text())
    digest = hashlib.sha256((tmp_path / "out.beton").read_bytes()).hexdigest()
    assert description["sha256"] == digest and digest in result.stdout
    assert read_beton(tmp_path / "out.beton").labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert sorted(os.listdir(tmp_path)) == ["images", "out.beton", "out.beton.json"]


def test_every_option_arrives(images, tmp_path):
    out = tmp_path / "out.beton"
    options = [
        "--max-side",
        40,
        "--jpeg-quality",
        55,
        "--compressed-share",
        0.5,
        "--subset",
        4,
        "--subset-seed",
        3,
        "--white-level",
        4095,
        "--part",
        "2/2",
    ]
    run(
        "folder",
        "--input",
        images,
        "-o",
        out,
        *options,
        "--no-labels",
        "--quick-check",
        "--skip-broken",
        "--no-progress",
    )
    description = json.loads(Path(f"{out}.json").read_text())
    assert description["options"] == {
        "max_side": 40,
        "jpeg_quality": 55,
        "quick_check": True,
        "white_level": 4095,
        "compressed_share": 0.5,
        "subset": 4,
        "subset_seed": 3,
        "part": "2/2",
        "skip_broken": True,
    }
    beton = read_beton(out)
    assert len(beton) == 2 and set(beton.images["width"]) == {40} and set(beton.labels) == {-1}


def test_mistakes_are_one_line_and_status_2(images, tmp_path):
    out = tmp_path / "out.beton"
    good = ["--input", images, "--output", out]
    for arguments, words in [
        ([], ["SOURCE"]),
        (["foldr", *good], ["did you mean folder?"]),
        (["folder", *good, "--max-sid", 4], ["--max-sid", "did you mean --max-side?"]),
        (["folder", "--inptu", images, "-o", out], ["did you mean --input?"]),
        (["folder", *good, "--max", 4], ["--max: unknown option"]),
        (["folder", *good, "--max-side", "big"], ["--max-side", "'big'"]),
        (["folder", *good, "--max-side", 0], ["--max-side"]),
        (["folder", *good, "--jpeg-quality", 101], ["--jpeg-quality", "0 to 100"]),
        (["folder", *good, "--white-level", 0], ["--white-level", "1 to 65535"]),
        (["folder", *good, "--workers", 0], ["--workers"]),
        (["folder", *good, "--subset", 7], ["only 6 images"]),
        (["folder", *good, "--part", "2"], ["--part", "expected K/N, as 3/8, got '2'"]),
        (["folder", *good, "--part", "3/2"], ["part 3/2", "--part"]),
        (["folder", *good, "--part", "1/7"], ["only 6 images"]),
        (["folder", "--output", out], ["--input", "see write_datasets.py folder --help"]),
        (["folder", "--input", tmp_path / "none", "--output", out], ["none: no such folder"]),
        (
            ["folder", "--input", images / "a" / "0.jpg", "--output", out],
            ["is a file, not a folder"],
        ),
        (["folder", "--input", tmp_path, "--output", tmp_path], ["is a folder; name the file"]),
        (
            ["folder", "--input", images, "--output", tmp_path / "no" / "x.beton"],
            ["does not exist"],
        ),
        (
            ["folder", "--input", images, "--output", images / "a" / "0.jpg" / "x.beton"],
            ["0.jpg is a file, not a folder; choose another place"],
        ),
        (["folder", "--input", images, "--output", "/dev/null", "--overwrite"], ["is a device"]),
        (["imagenet", *good, "--split", "vall"], ["did you mean val?"]),
        (["embedded", "--size", 0, "--output", out], ["size is 0"]),
        (
            ["webdataset", "--input", tmp_path / "x-{0..2}.tar", "--output", out],
            ["x-0.tar: no such shard"],
        ),
    ]:
        assert_refused(run(*arguments), 2, *words)
    assert os.listdir(tmp_path) == ["images"]
    (tmp_path / "empty").mkdir()
    assert_refused(
        run("folder", "--input", tmp_path / "empty", "--output", out), 2, "no images in it"
    )
    out.write_bytes(b"precious")
    assert_refused(run("folder", *good), 2, "exists already", "--overwrite")
    assert out.read_bytes() == b"precious"
    assert run("folder", *good, "--overwrite").returncode == 0 and len(read_beton(out)) == 6


def test_output_that_cannot_be_written(images, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (tmp_path / "locked").mkdir(mode=0o500)
    assert_refused(
        run("folder", "--input", images, "--output", tmp_path / "locked" / "x.beton"),
        2,
        "not writable",
    )


def test_a_broken_image_is_status_1(images, tmp_path):
    broken = images / "a" / "2.jpg"
    broken.write_bytes(broken.read_bytes()[:-100])
    result = run("folder", "--input", images, "--output", tmp_path / "x.beton", "--workers", 2)
    assert_refused(result, 1, str(broken), "--skip-broken")
    result = run("folder", "--input", images, "--output", tmp_path / "x.beton", "--skip-broken")
    assert (
        result.returncode == 0
        and "1 broken images skipped" in result.stdout
        and str(broken) in result.stdout
    )


def test_file_names_that_are_not_text(images, tmp_path):
    odd = os.fsencode(images / "a") + b"/\xff\n.jpg"
    with open(odd, "wb") as file:
        file.write(b"broken")
    assert_refused(
        run("folder", "--input", images, "--output", tmp_path / "x.beton"), 1, r"\udcff\n.jpg"
    )


def test_labels_without_names_are_counted(images, tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for i in range(6):
            archive.add(images / "ab"[i % 2] / f"{i}.jpg", f"{i}.jpg")
            if i < 5:
                label = tarfile.TarInfo(f"{i}.cls")
                label.size = 10
                archive.addfile(label, io.BytesIO(b"140000000%d" % (i % 2)))
    result = run("webdataset", "--input", tmp_path / "s.tar", "--output", tmp_path / "x.beton")
    assert (
        "6 samples, 2 different labels without names" in result.stdout
        and "  1 samples without a label (-1)\n" in result.stdout
    )
    assert read_beton(tmp_path / "x.beton").labels.tolist() == [
        1400000000,
        1400000001,
        1400000000,
        1400000001,
        1400000000,
        -1,
    ]
    result = run(
        "webdataset",
        "--input",
        tmp_path / "s.tar",
        "--output",
        tmp_path / "x.beton",
        "--overwrite",
        "--no-labels",
    )
    assert (
        "6 samples, no labels" in result.stdout and "5 files passed over: 5 .cls" in result.stdout
    )


def test_what_is_left_out_is_told_on_a_terminal_that_knows_only_ascii(images, tmp_path):
    for name in ("x.heic", "y.heic", "\u00e9"):
        (images / "a" / name).write_bytes(b"")
    (images / "a" / "\u00e4.jpg").write_bytes(b"broken")
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = run(
        "folder",
        "--input",
        images,
        "--output",
        tmp_path / "x.beton",
        "--skip-broken",
        env=ascii_only,
    )
    assert result.returncode == 0, result.stderr
    assert "  3 files passed over: 2 .heic, 1 without suffix\n" in result.stdout
    assert (
        "    the first of each: a/x.heic, a/\\xe9\n" in result.stdout
        and r"a/\xe4.jpg: is not an" in result.stdout
    )


def limit_file_size():
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (8_400_000, 8_400_000))


def test_a_full_disk_is_status_1(images, tmp_path):
    # The data begins at 8 MiB; a file size limit stands in for a full disk.
    result = run(
        "folder", "--input", images, "--output", tmp_path / "x.beton", preexec_fn=limit_file_size
    )
    assert_refused(result, 1, "x.beton: could not be written after")
    assert os.listdir(tmp_path) == ["images"]


def processes_below(pid):
    """Process ids of `pid`'s descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        # It may have ended meanwhile.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
    found = [pid]
    for parent in found:  # grows as it is read
        found += [child for child, of in parents.items() if of == parent]
    return found[1:]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def exists(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("signal_number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_while_the_workers_start(tmp_path, signal_number, status):
    command = [*PROGRAM, "embedded", "--size", "99", "--workers", "2"]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "out.beton")],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 600
    while "forkserver" not in "".join(map(command_line, processes_below(process.pid))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    if signal_number == signal.SIGINT:
        os.killpg(process.pid, signal_number)  # as a terminal does
    else:
        process.send_signal(signal_number)
    _, stderr = process.communicate(timeout=600)  # of the workers, too
    assert (process.returncode, stderr.count("\n")) == (status, int(status == 130)), stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "signal_number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_signals(tmp_path, signal_number, status, workers):
    out = tmp_path / "out.beton"
    out.write_bytes(b"the old file")
    Path(f"{out}.json").write_text("{}")
    command = [
        *PROGRAM,
        "embedded",
        "--size",
        "100000",
        "--output",
        str(out),
        "--workers",
        str(workers),
        "--overwrite",
    ]
    # In a session of its own, so that SIGINT can be sent to the whole group as a terminal does.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 600
    while not any(p.stat().st_size > 8 << 20 for p in tmp_path.glob(".out.beton.partial-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    children = processes_below(process.pid)
    assert len(children) >= (workers if workers > 1 else 0)
    if signal_number == signal.SIGINT:
        os.killpg(process.pid, signal_number)
    else:
        process.send_signal(signal_number)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == status, stderr
    assert "Traceback" not in stderr
    assert out.read_bytes() == b"the old file"
    left = [p for p in tmp_path.iterdir() if ".partial-" in p.name]
    assert len(left) == (1 if signal_number == signal.SIGKILL else 0)
    deadline = time.monotonic() + 600
    while any(map(exists, children)):
        assert time.monotonic() < deadline, "workers outlived the program"
        time.sleep(0.05)
    if signal_number == signal.SIGKILL:
        assert run("embedded", "--size", 3, "--output", out, "--overwrite").returncode == 0
        assert (
            sorted(os.listdir(tmp_path)) == ["out.beton", "out.beton.json"]
            and len(read_beton(out)) == 3
        )
