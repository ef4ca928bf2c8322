"""ffssl embed, against the evaluation's features of the converted file."""

import csv
import io
import json
import re
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from support.small_runs import save_run

from ffssl.config.command_line import exit_status
from ffssl.config.options import DataOptions
from ffssl.data.convert.conversion import ConvertOptions, convert
from ffssl.data.convert.sources.folder import ImageFolder
from ffssl.embed.__main__ import main
from ffssl.embed.feature_file import FeatureFile
from ffssl.evaluate.features import extract_features, open_views
from ffssl.parallel.device import mixed_precision

CPU = torch.device("cpu")
OFF, _ = mixed_precision("off", CPU)
NAMES = ["a/0.jpg", "a/1.jpg", "a/2.png", "a/3.jpg", "b/4.jpg", "b/5.jpg", "b/6.gif", "b/7.jpg"]


def embed(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["embed", *map(str, words), "--device=cpu"])
    return exit_status(main)


@pytest.fixture(scope="module")
def method(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, save_run(folder)


@pytest.fixture
def photos(tmp_path):
    """Images of several kinds in two class folders, as NAMES."""
    for i, name in enumerate(NAMES):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(i).integers(0, 256, (5, 7, 3), np.uint8)
        image = PIL.Image.fromarray(coarse).resize((90 + 40 * i, 120), PIL.Image.BICUBIC)
        settings = {"quality": 90} if name.endswith("jpg") else {}
        if i == 1:
            settings["progressive"] = True
        if i == 3:
            settings["exif"] = PIL.Image.Exif()
            settings["exif"][0x0112] = 6  # lies on its side
        image.save(tmp_path / "photos" / name, **settings)
    return tmp_path / "photos"


@pytest.fixture
def beton(photos):
    path = photos.with_name("photos.beton")
    convert(ImageFolder(photos), path, ConvertOptions(progress=False))
    return path


def rows_of(path):
    with open(path.with_suffix(".csv"), newline="") as file:
        return list(csv.reader(file))


def test_features_of_a_folder_are_those_of_its_beton_file_and_of_an_evaluation(
    tmp_path, photos, beton, method, monkeypatch, capsys
):
    run, trained = method
    for name, images in (("folder", photos), ("beton", beton)):
        words = [run, images, "--output", tmp_path / f"{name}.npy", "--batch-size=3"]
        assert embed(monkeypatch, *words) == 0
        assert f"{name}.npy: 256 features of 8 images\n" in capsys.readouterr().out
    with open_views(beton, DataOptions(), 32, batch_size=3) as loader:
        expected, labels = extract_features(trained.backbone, loader, CPU, OFF)
    found = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("folder", "beton")]
    assert found[0].dtype == np.float32 and found[0].shape == (8, 256)
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], expected.numpy())
    assert len(np.unique(found[0], axis=0)) == 8
    assert labels.tolist() == [0] * 4 + [1] * 4
    heading, *rows = rows_of(tmp_path / "folder.npy")
    assert heading == ["image", "label"]
    assert rows == [[name, str(label)] for name, label in zip(NAMES, labels.tolist())]
    assert rows_of(tmp_path / "beton.npy")[1:] == [[str(i), row[1]] for i, row in enumerate(rows)]
    told = json.loads((tmp_path / "folder.json").read_text())
    assert told["class_names"] == ["a", "b"] and told["resolution"] == 32 and not told["skipped"]
    assert told["encoder"] == {"backbone": "resnet-small", "stem": "imagenet", "network": "student"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_without_labels(tmp_path, photos, method, monkeypatch):
    words = [method[0], photos, "--output", tmp_path / "a.npy", "--no-labels"]
    assert embed(monkeypatch, *words) == 0
    assert rows_of(tmp_path / "a.npy")[1:] == [[name, ""] for name in NAMES]


def test_an_interrupted_command_is_continued_at_its_next_batch(
    tmp_path, photos, method, monkeypatch, capsys
):
    words = [method[0], photos, "--batch-size=3", "--output"]
    assert embed(monkeypatch, *words, tmp_path / "whole.npy") == 0
    add, batches = FeatureFile.add, []

    def interrupted(self, *arguments):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(arguments)
        add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureFile, "add", interrupted)
        assert embed(monkeypatch, *words, tmp_path / "a.npy") == 130
    assert len(batches) == 2 and not (tmp_path / "a.npy").exists()
    (tmp_path / "photos" / "a" / "0.jpg").write_bytes(b"")  # not read again
    capsys.readouterr()
    other = embed(monkeypatch, *words, tmp_path / "a.npy", "--resolution=48")
    assert other == 2 and "a.npy was begun with other resolution; pass" in capsys.readouterr().err
    assert embed(monkeypatch, *words, tmp_path / "a.npy") == 0
    assert "8 images, 6 of them before" in capsys.readouterr().out
    whole, continued = (np.load(tmp_path / name) for name in ("whole.npy", "a.npy"))
    assert np.array_equal(whole, continued)
    assert rows_of(tmp_path / "a.npy") == rows_of(tmp_path / "whole.npy")


@pytest.mark.parametrize("what", ["folder", "beton"])
def test_an_unreadable_image_is_refused_by_name_or_left_out_and_counted(
    tmp_path, photos, beton, method, monkeypatch, capsys, what
):
    words = [method[0], photos if what == "folder" else beton, "--batch-size=3", "--output"]
    assert embed(monkeypatch, *words, tmp_path / "whole.npy") == 0
    broken = photos / "b" / "4.jpg"
    data = broken.read_bytes()
    # In the file, too: the image's second half is zeros.
    spoilt = data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
    broken.write_bytes(spoilt)
    beton.write_bytes(beton.read_bytes().replace(data, spoilt))
    name = str(broken) if what == "folder" else f"{beton}: image 4"
    capsys.readouterr()
    assert embed(monkeypatch, *words, tmp_path / "a.npy") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"error: {name}: ")
    assert "pass --skip-unreadable" in error
    assert embed(monkeypatch, *words, tmp_path / "a.npy", "--skip-unreadable") == 0
    out = capsys.readouterr().out
    assert f"7 images, 3 of them before; 1 unreadable left out, the first {name}: " in out
    whole, left = (np.load(tmp_path / file) for file in ("whole.npy", "a.npy"))
    assert np.array_equal(left, np.delete(whole, 4, axis=0))
    assert (
        rows_of(tmp_path / "a.npy")[1:]
        == np.delete(rows_of(tmp_path / "whole.npy")[1:], 4, axis=0).tolist()
    )
    assert [one["name"] for one in json.loads((tmp_path / "a.json").read_text())["skipped"]] == [
        name
    ]


def test_if_no_image_can_be_read_nothing_is_left(tmp_path, method, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.png").write_text("text")
    words = [method[0], tmp_path / "photos", "--output", tmp_path / "a.npy", "--skip-unreadable"]
    assert embed(monkeypatch, *words) == 2
    told = "photos: no image can be read; the first, .*0.png: is not an image of a known format"
    assert re.search(told, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_parquet_file_has_names_labels_and_features(tmp_path, photos, method, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    (photos / "b" / "7.jpg").rename(photos / "b" / "7\udce9.jpg")
    for name, more in (("a", []), ("b", ["--no-labels"])):
        for suffix in (".npy", ".parquet"):
            words = [method[0], photos, "--output", tmp_path / (name + suffix), "--overwrite"]
            assert embed(monkeypatch, *words, *more) == 0
        table = parquet.read_table(tmp_path / f"{name}.parquet")
        assert table.column_names == ["image", "label", "features"]
        assert table["image"].to_pylist() == [*NAMES[:7], r"b/7\xe9.jpg"]
        assert table["label"].to_pylist() == ([None] * 8 if more else [0] * 4 + [1] * 4)
        found = np.array(table["features"].to_pylist(), np.float32)
        assert np.array_equal(found, np.load(tmp_path / f"{name}.npy"))


@pytest.mark.parametrize(
    "words, message",
    [
        ("run photos --output a.txt", "--output: a.txt: must end in .npy or .parquet"),
        ("run empty --output a.npy", "empty: no images in it"),
        ("run absent --output a.npy", "absent: no such file or folder"),
        ("run photos --output absent/a.npy", "--output: absent/a.npy can't be written: No such f"),
        ("run photos --output there.npy", "there.npy exists already; pass --overwrite"),
        ("run photos --output x.npy", "--output: x.csv exists already; pass --overwrite"),
        ("run photos --output a.npy --label-field x", "--label-field: photos is a folder"),
        ("run photos --output a.npy --network teacher", "--network: simclr has no teacher"),
        ("run photos --output a.npy --backbone resnet18", "--backbone: run is a run, which"),
        ("empty photos --output a.npy", "empty: holds neither checkpoint.pt nor model.safetensors"),
        ("absent photos --output a.npy", "absent: no such run"),
        ("photos/a/0.jpg photos --output a.npy", "0.jpg: damaged, or not a file of weights"),
        ("run photos --output a.npy --resolution 0", "--resolution: expected an integer of 1 or"),
    ],
)
def test_mistakes_cost_a_line_and_status_2(
    tmp_path, photos, method, monkeypatch, capsys, words, message
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").symlink_to(method[0])
    (tmp_path / "there.npy").write_text("kept")
    (tmp_path / "x.csv").write_text("somebody's")
    monkeypatch.chdir(tmp_path)
    assert embed(monkeypatch, *words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error
    assert (tmp_path / "there.npy").read_text() == "kept" and not (tmp_path / "a.npy").exists()


def test_an_output_that_is_there_is_replaced_on_request(tmp_path, photos, method, monkeypatch):
    (tmp_path / "a.npy").write_text("old")
    words = [method[0], photos, "--output", tmp_path / "a.npy", "--overwrite"]
    assert embed(monkeypatch, *words) == 0
    assert np.load(io.BytesIO((tmp_path / "a.npy").read_bytes())).shape == (8, 256)
