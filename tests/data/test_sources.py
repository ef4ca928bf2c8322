"""Every source on a small stand-in of its real layout: images, labels, names, pickling, and what it refuses."""

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from ffssl.data.sources.base import PackedStrings, natural_order
from ffssl.data.sources.embedded import Embedded
from ffssl.data.sources.folder import ImageFolder
from ffssl.data.sources.imagenet import ImageNet
from ffssl.data.sources.torchvision_sets import Cifar10, Imagenette, Stl10
from ffssl.data.sources.webdataset import WebDataset, expand_braces
from ffssl.errors import UserError

WNIDS = ["n01440764", "n02102040", "n03888257"]


def image_bytes(number, kind="JPEG"):
    """A 4x3 image that tells its number."""
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (4, 3), (number, 2 * number, 255 - number)).save(buffer, kind)
    return buffer.getvalue()


def put(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes(0) if data is None else data)
    return path


def contents(source):
    """All samples, read from a pickled copy as a worker does, in scattered order."""
    copy = pickle.loads(pickle.dumps(source))
    order = np.random.default_rng(0).permutation(len(source))
    samples = {i: (*copy.load(i), copy.name(i)) for i in order.tolist()}
    return [samples[i] for i in range(len(source))]


def test_packed_strings():
    strings = ["", "a", "äöü", "x" * 1000, "", "\udcff not unicode"]
    packed = pickle.loads(pickle.dumps(PackedStrings(strings)))
    assert list(packed) == strings
    with pytest.raises(IndexError):
        packed[6]


def test_natural_order():
    assert sorted(["a10", "a9", "b1", "a-2", "1", "a"], key=natural_order) == ["1", "a", "a9", "a10", "a-2", "b1"]


def test_class_folders_agree_with_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder as Reference

    for i, name in enumerate(["b/2.png", "b/10.jpg", "a/deep/er/1.JPEG", "a/z.webp", "C/x.jpeg"]):
        put(tmp_path / name, bytes([i]))
    (
        put(tmp_path / "b/.hidden.jpg"),
        put(tmp_path / "b/notes.txt"),
        put(tmp_path / ".git/x.jpg"),
        put(tmp_path / "readme.md"),
    )
    (tmp_path / ".git" / "x.jpg").unlink()
    (tmp_path / "b" / ".hidden.jpg").unlink()
    (tmp_path / ".git").rmdir()
    reference = Reference(tmp_path)
    put(tmp_path / "b/.hidden.jpg"), put(tmp_path / ".git/x.jpg")

    source = ImageFolder(tmp_path)
    assert source.class_names == reference.classes
    assert sorted((name, label) for _, label, name in contents(source)) == sorted(reference.samples)
    assert all(data == open(name, "rb").read() for data, _, name in contents(source))


def test_flat_and_unlabelled_folders(tmp_path):
    put(tmp_path / "flat/b.jpg", b"B"), put(tmp_path / "flat/a.png", b"A")
    source = ImageFolder(tmp_path / "flat")
    assert [(data, label) for data, label, _ in contents(source)] == [(b"A", -1), (b"B", -1)]
    assert source.class_names is None
    put(tmp_path / "flat/sub/c.jpg")
    assert len(ImageFolder(tmp_path / "flat", labels=False)) == 3
    with pytest.raises(UserError, match="a.png lie beside class folders.*--no-labels"):
        ImageFolder(tmp_path / "flat")


def test_folder_refuses(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        ImageFolder(tmp_path / "none")
    with pytest.raises(UserError, match="no images in it"):
        ImageFolder(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        ImageFolder(put(tmp_path / "a/x.jpg"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: class folder without images"):
        ImageFolder(tmp_path)


@pytest.mark.parametrize("layout", ["train", "ILSVRC2012_img_train", "ILSVRC/Data/CLS-LOC/train", "."])
def test_imagenet_train(tmp_path, layout):
    for i, wnid in enumerate(reversed(WNIDS)):
        put(tmp_path / layout / wnid / f"{wnid}_{i}.JPEG", bytes([i]))
    source = ImageNet(tmp_path, "train")
    assert source.class_names == WNIDS
    assert [(data[0], label) for data, label, _ in contents(source)] == [(2, 0), (1, 1), (0, 2)]


IDS = {3: WNIDS[0], 1: WNIDS[1], 2: WNIDS[2]}  # the devkit's numbers do not follow the sorted ids
TRUTH = [2, 3, 3, 1]


def flat_validation(folder):
    for i in (4, 2, 1, 3):
        put(folder / f"ILSVRC2012_val_{i:08d}.JPEG", bytes([i]))


def devkit(folder):
    scipy_io = pytest.importorskip("scipy.io")
    folder.mkdir(parents=True)
    synsets = np.zeros((4, 1), [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")])
    for row, (number, wnid) in zip(synsets[:, 0], [*IDS.items(), (1001, "n00000001")]):
        row["ILSVRC2012_ID"], row["WNID"], row["words"] = float(number), wnid, "some words"
        row["num_children"] = float(number > 1000)
    scipy_io.savemat(folder / "meta.mat", {"synsets": synsets}, do_compression=True)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{i}\n" for i in TRUTH))


def assert_is_validation(source):
    assert source.class_names == WNIDS
    assert [(data[0], label) for data, label, _ in contents(source)] == [
        (i, WNIDS.index(IDS[truth])) for i, truth in enumerate(TRUTH, start=1)
    ]


def test_imagenet_flat_validation_with_devkit(tmp_path):
    flat_validation(tmp_path / "val")
    devkit(tmp_path / "ILSVRC2012_devkit_t12" / "data")
    assert_is_validation(ImageNet(tmp_path, "val"))
    with tarfile.open(tmp_path / "kit.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12")
    assert_is_validation(ImageNet(tmp_path / "val", "val", tmp_path / "kit.tar.gz"))
    (tmp_path / "ILSVRC2012_devkit_t12" / "data" / "meta.mat").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a sound ILSVRC2012 devkit"):
        ImageNet(tmp_path, "val")


def test_imagenet_flat_validation_with_kaggles_file(tmp_path):
    flat_validation(tmp_path / "ILSVRC/Data/CLS-LOC/val")
    lines = [f"ILSVRC2012_val_{i:08d},{IDS[t]} 1 2 3 4" for i, t in enumerate(TRUTH, start=1)]
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(lines))
    assert_is_validation(ImageNet(tmp_path, "val"))
    (tmp_path / "labels.txt").write_text("\n".join(line.replace(",", ".JPEG ") for line in lines))
    assert_is_validation(ImageNet(tmp_path, "val", tmp_path / "labels.txt"))


def test_imagenet_validation_in_class_folders(tmp_path):
    put(tmp_path / "val" / WNIDS[1] / "ILSVRC2012_val_00000001.JPEG"), put(tmp_path / "val" / WNIDS[0] / "x.JPEG")
    assert [label for _, label, _ in contents(ImageNet(tmp_path, "val"))] == [0, 1]


def test_imagenet_refuses(tmp_path):
    flat_validation(tmp_path / "val")
    with pytest.raises(UserError, match="without it the validation images have no labels"):
        ImageNet(tmp_path, "val")
    (tmp_path / "l.txt").write_text(f"ILSVRC2012_val_00000001.JPEG {WNIDS[0]}\n")
    with pytest.raises(UserError, match=r"00000002.JPEG: no label for it in .* \(3 such"):
        ImageNet(tmp_path, "val", tmp_path / "l.txt")
    (tmp_path / "l.txt").write_text("ILSVRC2012_val_00000001.JPEG 17\n")
    with pytest.raises(UserError, match="line 1: expected"):
        ImageNet(tmp_path, "val", tmp_path / "l.txt")
    put(tmp_path / "train" / "x.JPEG")
    with pytest.raises(UserError, match="no class folders"):
        ImageNet(tmp_path, "train")


def test_imagenet_takes_no_other_split_for_the_one_that_is_missing(tmp_path):
    put(tmp_path / "train" / WNIDS[0] / "x.JPEG")
    with pytest.raises(UserError, match="train: not a class of ImageNet.* or val or ILSVRC2012_img_val or"):
        ImageNet(tmp_path, "val")


def test_imagenette_layout(tmp_path):
    (
        put(tmp_path / "imagenette2-160/val/n01440764/a.JPEG", b"1"),
        put(tmp_path / "imagenette2-160/val/n03888257/b.JPEG", b"2"),
    )
    source = Imagenette(tmp_path, "val", "160px")
    assert [(data, label) for data, label, _ in contents(source)] == [(b"1", 0), (b"2", 1)]


def test_an_interrupted_extraction_of_imagenette_is_begun_again(tmp_path, monkeypatch):
    from torchvision import datasets

    for name in ("a", "b"):
        put(tmp_path / "packed/imagenette2-160/val/n01440764" / f"{name}.JPEG")
    archive = tmp_path / "imagenette2-160.tgz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(tmp_path / "packed/imagenette2-160", "imagenette2-160")
    shutil.rmtree(tmp_path / "packed")
    # With its own checksum, torchvision takes the archive for one it has downloaded.
    digest = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(datasets.Imagenette._ARCHIVES, "160px", (f"https://nowhere.invalid/{archive.name}", digest))

    def interrupted(_, to_path, *arguments):
        put(Path(to_path, "imagenette2-160/val/n01440764/a.JPEG"))
        raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(datasets.utils, "extract_archive", interrupted)
        Imagenette(tmp_path, "val", "160px")
    assert os.listdir(tmp_path) == [archive.name]
    assert len(Imagenette(tmp_path, "val", "160px")) == 2
    assert sorted(os.listdir(tmp_path)) == ["imagenette2-160", archive.name]


def test_cifar10(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (10, 3, 32, 32), np.uint8)
    labels = random.integers(0, 10, 10).tolist()
    for i in range(5):
        batch = {"data": pixels[2 * i : 2 * i + 2].reshape(2, -1), "labels": labels[2 * i : 2 * i + 2]}
        (folder / f"data_batch_{i + 1}").write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    samples = contents(source := Cifar10(tmp_path, "train"))
    assert source.class_names == list("abcdefghij") and [label for _, label, _ in samples] == labels
    np.testing.assert_array_equal(np.stack([p for p, _, _ in samples]).transpose(0, 3, 1, 2), pixels)
    (folder / "data_batch_3").write_bytes(b"\x80")
    with pytest.raises(UserError, match="data_batch_3: not a sound"):
        Cifar10(tmp_path, "train")


def test_stl10_agrees_with_torchvision(tmp_path, monkeypatch):
    from torchvision.datasets import STL10 as Reference

    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name, count in [("train", 4), ("test", 3), ("unlabeled", 5)]:
        random.integers(0, 256, (count, 3, 96, 96), np.uint8).tofile(folder / f"{name}_X.bin")
        if name != "unlabeled":
            random.integers(1, 11, count).astype(np.uint8).tofile(folder / f"{name}_y.bin")
    (folder / "class_names.txt").write_text("\n".join("airplane bird car cat deer dog horse monkey ship truck".split()))
    monkeypatch.setattr(Reference, "_check_integrity", lambda self: True)
    for split in ("train", "test", "unlabeled", "train+unlabeled"):
        reference = Reference(tmp_path, split)
        source = Stl10(tmp_path, split)
        assert source.class_names == reference.classes and len(source) == len(reference)
        for (pixels, label, _), (image, target) in zip(contents(source), reference):
            np.testing.assert_array_equal(pixels, np.asarray(image))
            assert label == target
    with open(folder / "train_X.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="train_X.bin is cut short"):
        Stl10(tmp_path, "train")


def test_downloads_need_a_folder(tmp_path):
    for make in (lambda p: Imagenette(p, "train"), lambda p: Cifar10(p, "train"), lambda p: Stl10(p, "train")):
        with pytest.raises(UserError, match="no such folder"):
            make(tmp_path / "none")


def test_embedded():
    source = Embedded("val", 12, seed=3)
    (image, label, _), same = contents(source)[11], Embedded("val", 12, seed=3).load(11)
    assert len(source) == 12 and image.dtype == np.uint8 and image.ndim == 3 and 0 <= label < len(source.class_names)
    np.testing.assert_array_equal(image, same[0])
    with pytest.raises(UserError):
        Embedded("val", 0)


def make_shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("a-{9..10}", ["a-9", "a-10"]),
        ("{x,y}{0..1}", ["x0", "x1", "y0", "y1"]),
        ("{000..002}", ["000", "001", "002"]),
    ],
)
def test_braces(pattern, expected):
    assert expand_braces(pattern) == expected


def test_webdataset(tmp_path):
    long_key = "deep/" * 30 + "k"  # longer than a plain tar header holds
    make_shard(
        tmp_path / "s-2.tar",
        [("a/1.jpg", b"one"), ("a/1.cls", b"7\n"), ("a/1.json", b"{}"), ("2.png", b"two"), ("2.seg.png", b"no")],
    )
    make_shard(
        tmp_path / "s-10.tar", [(f"{long_key}.cls", b"3"), (f"{long_key}.jpeg", b"x" * 5000), ("9.txt", b"no image")]
    )
    expected = [(b"one", 7), (b"two", -1), (b"x" * 5000, 3)]
    for patterns in (["{}/s-{{2,10}}.tar"], ["{}/*.tar"], ["{}"], ["{}/s-2.tar", "{}/s-10.tar"]):
        source = WebDataset([pattern.format(tmp_path) for pattern in patterns])
        assert [(data, label) for data, label, _ in contents(source)] == expected
    assert source.name(0) == f"{tmp_path}/s-2.tar:a/1"


def test_webdataset_refuses(tmp_path):
    with pytest.raises(UserError, match="no such shard"):
        WebDataset([f"{tmp_path}/none-{{0..3}}.tar"])
    with tarfile.open(tmp_path / "z.tar", "w:gz") as archive:
        archive.add(put(tmp_path / "x.jpg"), "x.jpg")
    with pytest.raises(UserError, match="z.tar: not a sound, uncompressed tar"):
        WebDataset([str(tmp_path / "z.tar")])
    for members, message in [
        ([("a.cls", b"1")], "no images"),
        ([("a.jpg", b"1"), ("a.png", b"1")], "two images"),
        ([("a.jpg", b"1"), ("a.cls", b"cat")], "not a class number"),
    ]:
        with pytest.raises(UserError, match=message):
            WebDataset([str(make_shard(tmp_path / "y.tar", members))])
    whole = make_shard(tmp_path / "cut.tar", [("a.jpg", b"1" * 4000), ("b.jpg", b"2" * 4000)]).read_bytes()
    second = 512 + 4096  # where its header begins
    for damaged, message in [
        (whole[:6000], "cut.tar"),
        (whole[:4800], f"cut.tar: damaged or cut short at byte {second};"),
        (whole[:second], f"cut.tar: damaged or cut short at byte {second};"),
        (whole[:second] + b"?" * 512 + whole[second + 512 :], f"cut.tar: damaged or cut short at byte {second};"),
        (whole[:second] + bytes(512) + whole[second + 512 :], f"cut.tar: damaged or cut short at byte {second};"),
        (whole + whole, f"cut.tar: damaged or cut short at byte {2 * second};"),
    ]:
        (tmp_path / "cut.tar").write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            WebDataset([str(tmp_path / "cut.tar")])


@pytest.fixture
def parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    def write(name, images, labels=None, features=None, column="image", rows=2):
        columns = {column: pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
        if labels is not None:
            columns["label"] = pa.array(labels)
        table = pa.table(columns)
        if features:
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        pyarrow.parquet.write_table(table, tmp_path / name, row_group_size=rows)
        return str(tmp_path / name)

    return write


def test_huggingface(tmp_path, parquet):
    from ffssl.data.sources.huggingface import HuggingFace

    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    cells = [{"bytes": bytes([i]) * 3, "path": f"{i}.jpg"} for i in range(12)]
    parquet("data/train-00000-of-00002.parquet", cells[:5], [0, 1, 0, None, 1], features)
    parquet("data/train-00001-of-00002.parquet", cells[5:9], [1, 1, 0, 0], features)
    parquet("data/test-00000-of-00001.parquet", cells[9:], [0, 0, 0], features)
    source = HuggingFace([str(tmp_path / "data")], split="train")
    assert source.class_names == ["cat", "dog"]
    got = contents(source)
    assert [(data[0], label) for data, label, _ in got] == list(enumerate([0, 1, 0, -1, 1, 1, 1, 0, 0]))
    assert "row group 1, row 0" in source.name(2)

    plain = HuggingFace([parquet("plain.parquet", [{"bytes": None, "path": "x.jpg"}], column="picture")])
    put(tmp_path / "x.jpg", b"by path")
    assert contents(plain)[0][:2] == (b"by path", -1)


def test_huggingface_refuses(tmp_path, parquet):
    from ffssl.data.sources.huggingface import HuggingFace

    path = parquet("a.parquet", [{"bytes": b"x", "path": ""}], ["cat"])
    with pytest.raises(UserError, match="'label' is not one of class numbers"):
        HuggingFace([path])
    with pytest.raises(UserError, match="no column 'img'"):
        HuggingFace([path], image_column="img")
    labelled = parquet("b.parquet", [{"bytes": b"x", "path": ""}], [0])
    unlabelled = parquet("c.parquet", [{"bytes": b"x", "path": ""}])
    for files in ([labelled, unlabelled], [unlabelled, labelled]):
        with pytest.raises(UserError, match=r"c.parquet: no column 'label' \(has image\)"):
            HuggingFace(files)
    with pytest.raises(UserError, match="d.parquet: no column 'image'"):
        HuggingFace([labelled, parquet("d.parquet", [{"bytes": b"x", "path": ""}], [0], column="img")])
    with pytest.raises(UserError, match="no Parquet files of split 'val'"):
        HuggingFace([str(tmp_path)], split="val")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="bad.parquet: not a sound Parquet file"):
        HuggingFace([str(tmp_path / "bad.parquet")])


def test_huggingface_without_pyarrow(monkeypatch):
    import sys

    from ffssl.data.sources.huggingface import HuggingFace

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="needs pyarrow: pip install"):
        HuggingFace(["x.parquet"])
