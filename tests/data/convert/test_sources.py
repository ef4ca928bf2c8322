"""Every source on a small stand-in of its real layout: images, labels, names, pickling, and what it
refuses.
"""

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

from ffssl.data.convert.sources.base import PackedStrings
from ffssl.data.convert.sources.embedded import Embedded
from ffssl.data.convert.sources.folder import ImageFolder
from ffssl.data.convert.sources.imagenet import ImageNet
from ffssl.data.convert.sources.shards import split_of
from ffssl.data.convert.sources.torchvision_sets import Cifar10, Imagenette, Stl10
from ffssl.data.convert.sources.webdataset import WebDataset, expand_braces
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
    assert all(data == Path(name).read_bytes() for data, _, name in contents(source))


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


def passed_over(source):
    return {kind: (count, first) for kind, count, first in source.passed_over}


def test_what_a_folder_leaves_out_is_counted_by_kind(tmp_path):
    for name in ("a/1.jpg", "a/2.AVIF", "a/3.jp2", "b/4.pnm"):
        put(tmp_path / name)
    for name in (
        "a/z.heic",
        "a/5.HEIC",
        "a/6",
        "b/7.jpg?width=300",
        "b/8.jpg.1",
        "b/.hidden.jpg",
        ".git/x.jpg",
        ".git/y",
    ):
        put(tmp_path / name)
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    source = ImageFolder(tmp_path)
    assert [os.path.basename(name) for _, _, name in contents(source)] == [
        "1.jpg",
        "2.AVIF",
        "3.jp2",
        "4.pnm",
    ]
    assert passed_over(source) == {
        ".heic": (2, "a/5.HEIC"),
        "without suffix": (1, "a/6"),
        "with other suffixes": (2, "b/7.jpg?width=300"),
        "hidden": (2, ".git"),
        "pipes, sockets or devices": (1, "a/pipe.jpg"),
    }
    assert (
        str(source.passed_over).startswith("2 .heic, 2 hidden, ") and source.passed_over.total == 8
    )
    for path in (tmp_path / "a").glob("[123]*"):
        path.unlink()
    with pytest.raises(
        UserError,
        match="no images in it, only 2 .heic, 1 pipes, sockets or devices, 1 without suffix",
    ):
        ImageFolder(tmp_path / "a")


@pytest.mark.parametrize(
    "folders", [("train", "val"), ("Train", "test", "docs"), ("train",), ("training", "dev", "x")]
)
def test_the_root_of_a_data_set_is_not_taken_for_class_folders(tmp_path, folders):
    for folder in folders:
        put(tmp_path / folder / "cat" / "1.jpg")
    with pytest.raises(
        UserError,
        match=rf"are splits, not classes; name one, such as {tmp_path}/(?i:train).*--no-labels",
    ):
        ImageFolder(tmp_path)
    assert len(ImageFolder(tmp_path, labels=False)) == len(folders)


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    put(tmp_path / "train/1.jpg"), put(tmp_path / "boat/1.jpg")
    assert ImageFolder(tmp_path).class_names == ["boat", "train"]
    put(tmp_path / "one/train/1.jpg")
    assert ImageFolder(tmp_path / "one").class_names == ["train"]


def reachable(folder, seen=None):
    """The real paths of all images that can be reached from a folder, by brute force."""
    seen = set() if seen is None else seen
    real, found = os.path.realpath(folder), set()
    if real in seen:
        return found
    seen.add(real)
    for name in os.listdir(real):
        path = os.path.join(real, name)
        if os.path.isdir(path):
            found |= reachable(path, seen)
        elif name.endswith(".jpg"):
            found.add(os.path.realpath(path))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_links_of_all_kinds_give_each_image_once(tmp_path, seed):
    random = np.random.default_rng(seed)
    folders = [
        tmp_path / "root",
        tmp_path / "root/a",
        tmp_path / "root/a/b",
        tmp_path / "root/c",
        tmp_path / "out",
        tmp_path / "out/d",
    ]
    files = [put(folder / f"{i}.jpg") for folder in folders for i in range(2)]
    for i in range(8):
        choice = random.integers(2)
        target = [folders, files][choice][random.integers([len(folders), len(files)][choice])]
        link = folders[random.integers(len(folders))] / f"link{i}{['', '.jpg'][choice]}"
        os.symlink(
            target
            if random.integers(2)
            else os.path.relpath(target, os.path.realpath(link.parent)),
            link,
        )
        [folders, files][choice].append(link)
    source = ImageFolder(tmp_path / "root", labels=False)
    names = [source.name(i) for i in range(len(source))]
    real = [os.path.realpath(name) for name in names]
    assert sorted(real) == sorted(reachable(tmp_path / "root"))
    inside = str(tmp_path / "root") + os.sep
    assert all(name == path for name, path in zip(names, real) if path.startswith(inside))


def test_link_loops_end(tmp_path):
    put(tmp_path / "a/1.jpg"), put(tmp_path / "b/1.jpg")
    for name in ("l1", "l2", "l3"):
        os.symlink(".", tmp_path / "a" / name)
    source = ImageFolder(tmp_path)
    assert [label for _, label, _ in contents(source)] == [0, 1]
    assert passed_over(source) == {"links to what is taken already": (3, "a/l1/")}


@pytest.mark.parametrize(
    "link, target", [("a/up", ".."), ("c", "a"), ("a/2.jpg", "../b/1.jpg"), ("b/x", "../a")]
)
def test_links_that_put_an_image_into_two_classes_are_refused(tmp_path, link, target):
    put(tmp_path / "a/1.jpg"), put(tmp_path / "b/1.jpg")
    os.symlink(target, tmp_path / link)
    with pytest.raises(
        UserError,
        match=rf"{tmp_path}/{link}/?: leads to {tmp_path}.* two classes; remove .*--no-labels",
    ):
        ImageFolder(tmp_path)
    assert len(ImageFolder(tmp_path, labels=False)) == 2


def test_folders_without_images_may_be_linked_from_every_class(tmp_path):
    put(tmp_path / "root/a/1.jpg"), put(tmp_path / "root/b/1.jpg"), put(tmp_path / "docs/readme.md")
    for name in "ab":
        os.symlink("../../docs", tmp_path / "root" / name / "docs")
    assert len(ImageFolder(tmp_path / "root")) == 2


def test_links_to_class_folders_and_images_elsewhere_are_followed(tmp_path):
    put(tmp_path / "store/1.jpg", b"1"), put(tmp_path / "store/blob", b"2")
    (tmp_path / "root/b").mkdir(parents=True)
    os.symlink(tmp_path / "store", tmp_path / "root/a")
    os.symlink("../../store/blob", tmp_path / "root/b/2.jpg")
    assert [(data, label) for data, label, _ in contents(ImageFolder(tmp_path / "root"))] == [
        (b"1", 0),
        (b"2", 1),
    ]


def test_links_that_lead_nowhere_or_above_are_refused(tmp_path):
    put(tmp_path / "root/a/1.jpg")
    for link, target in (
        ("root/a/2.jpg", "gone.jpg"),
        ("root/b", "/gone"),
        ("root/a/3.jpg", "3.jpg"),
    ):
        os.symlink(target, tmp_path / link)
        with pytest.raises(UserError, match=f"{link}: a link to {target}, which can't be reached"):
            ImageFolder(tmp_path / "root")
        (tmp_path / link).unlink()
    os.symlink("gone.txt", tmp_path / "root/a/notes.txt")
    os.mkfifo(tmp_path / "pipe")
    os.symlink("../../pipe", tmp_path / "root/a/pipe.jpg")
    assert passed_over(ImageFolder(tmp_path / "root")) == {
        ".txt": (1, "a/notes.txt"),
        "pipes, sockets or devices": (1, "a/pipe.jpg"),
    }
    os.symlink("../..", tmp_path / "root/a/above")
    with pytest.raises(UserError, match="a/above: a link to a folder above .*/root;"):
        ImageFolder(tmp_path / "root", labels=False)


@pytest.mark.parametrize(
    "layout", ["train", "ILSVRC2012_img_train", "ILSVRC/Data/CLS-LOC/train", "."]
)
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
    synsets = np.zeros(
        (4, 1), [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    )
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
    (
        put(tmp_path / "val" / WNIDS[1] / "ILSVRC2012_val_00000001.JPEG"),
        put(tmp_path / "val" / WNIDS[0] / "x.JPEG"),
    )
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


def label_lines(ids=IDS, separator=","):
    return [
        f"ILSVRC2012_val_{i:08d}{separator}{ids[t]} 1 2 3 4" for i, t in enumerate(TRUTH, start=1)
    ]


@pytest.mark.parametrize("moved", [(1,), (2, 4), (1, 2, 3, 4)])
def test_imagenet_validation_half_moved_into_class_folders(tmp_path, moved):
    flat_validation(tmp_path / "val")
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(label_lines()))
    for i in moved:
        name = f"ILSVRC2012_val_{i:08d}.JPEG"
        put(tmp_path / "val" / IDS[TRUTH[i - 1]] / name, (tmp_path / "val" / name).read_bytes())
        (tmp_path / "val" / name).unlink()
    source = ImageNet(tmp_path, "val", tmp_path / "LOC_val_solution.csv")
    assert source.class_names == WNIDS
    assert sorted((data[0], label) for data, label, _ in contents(source)) == [
        (i, WNIDS.index(IDS[truth])) for i, truth in enumerate(TRUTH, start=1)
    ]


def test_imagenet_images_beside_another_split(tmp_path):
    flat_validation(tmp_path)
    put(tmp_path / "train" / WNIDS[0] / "x.JPEG")
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(label_lines()))
    source = ImageNet(tmp_path, "val")
    assert_is_validation(source)
    assert passed_over(source)["not of the validation images"] == (1, f"train/{WNIDS[0]}/x.JPEG")


def test_imagenet_refuses_what_its_labels_do_not_fit(tmp_path):
    labels = tmp_path / "LOC_val_solution.csv"
    labels.write_text("\n".join(label_lines()))
    flat_validation(tmp_path / "val")
    (tmp_path / "val/ILSVRC2012_val_00000003.JPEG").unlink()
    with pytest.raises(
        UserError,
        match=r"val: ILSVRC2012_val_00000003 is not in it, though .*csv names it \(1 such",
    ):
        ImageNet(tmp_path, "val")
    put(tmp_path / "val" / WNIDS[1] / "ILSVRC2012_val_00000003.JPEG")
    with pytest.raises(
        UserError, match=f"{WNIDS[1]}/ILSVRC2012_val_00000003.JPEG: .*csv says class {WNIDS[0]}"
    ):
        ImageNet(tmp_path, "val")
    shutil.move(tmp_path / "val" / WNIDS[1], tmp_path / "val" / WNIDS[0])
    assert len(ImageNet(tmp_path, "val")) == 4
    put(tmp_path / "val/ILSVRC2012_val_00000003.JPEG")
    with pytest.raises(UserError, match="00000003.JPEG: is also at .*00000003.JPEG; remove one"):
        ImageNet(tmp_path, "val")
    labels.write_text("\n".join([*label_lines(), f"ILSVRC2012_val_00000001,{WNIDS[0]}"]))
    with pytest.raises(
        UserError, match="csv, line 5: another class for ILSVRC2012_val_00000001 than before"
    ):
        ImageNet(tmp_path, "val")


@pytest.mark.parametrize(
    "encoding, separator, quote, end",
    [
        ("utf-8-sig", ",", "", "\n"),
        ("utf-8", ",", '"', "\r\n"),
        ("utf-8-sig", ";", '"', "\r\n"),
        ("utf-16", "\t", "", "\n"),
    ],
)
def test_imagenet_labels_as_spreadsheets_write_them(tmp_path, encoding, separator, quote, end):
    flat_validation(tmp_path / "val")
    rows = [line.split(",") for line in ["ImageId,PredictionString", *label_lines()]]
    text = end.join(separator.join(quote + cell + quote for cell in row) for row in rows)
    (tmp_path / "LOC_val_solution.csv").write_bytes(text.encode(encoding))
    assert_is_validation(ImageNet(tmp_path, "val"))


def test_imagenet_takes_no_other_split_for_the_one_that_is_missing(tmp_path):
    put(tmp_path / "train" / WNIDS[0] / "x.JPEG")
    with pytest.raises(
        UserError, match="train: not a class of ImageNet.* or val or ILSVRC2012_img_val or"
    ):
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
    monkeypatch.setitem(
        datasets.Imagenette._ARCHIVES, "160px", (f"https://nowhere.invalid/{archive.name}", digest)
    )

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
        batch = {
            "data": pixels[2 * i : 2 * i + 2].reshape(2, -1),
            "labels": labels[2 * i : 2 * i + 2],
        }
        (folder / f"data_batch_{i + 1}").write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    samples = contents(source := Cifar10(tmp_path, "train"))
    assert source.class_names == list("abcdefghij") and [label for _, label, _ in samples] == labels
    np.testing.assert_array_equal(
        np.stack([p for p, _, _ in samples]).transpose(0, 3, 1, 2), pixels
    )
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
    (folder / "class_names.txt").write_text(
        "\n".join(
            ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
        )
    )
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
    for make in (
        lambda p: Imagenette(p, "train"),
        lambda p: Cifar10(p, "train"),
        lambda p: Stl10(p, "train"),
    ):
        with pytest.raises(UserError, match="no such folder"):
            make(tmp_path / "none")


def test_embedded():
    source = Embedded("val", 12, seed=3)
    (image, label, _), same = contents(source)[11], Embedded("val", 12, seed=3).load(11)
    assert (
        len(source) == 12
        and image.dtype == np.uint8
        and image.ndim == 3
        and 0 <= label < len(source.class_names)
    )
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
        [
            ("a/1.jpg", b"one"),
            ("a/1.cls", b"7\n"),
            ("a/1.json", b"{}"),
            ("2.png", b"two"),
            ("2.seg.png", b"no"),
        ],
    )
    make_shard(
        tmp_path / "s-10.tar",
        [(f"{long_key}.cls", b"3"), (f"{long_key}.jpeg", b"x" * 5000), ("9.txt", b"no image")],
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
    whole = make_shard(
        tmp_path / "cut.tar", [("a.jpg", b"1" * 4000), ("b.jpg", b"2" * 4000)]
    ).read_bytes()
    second = 512 + 4096  # where its header begins
    for damaged, message in [
        (whole[:6000], "cut.tar"),
        (whole[:4800], f"cut.tar: damaged or cut short at byte {second};"),
        (whole[:second], f"cut.tar: damaged or cut short at byte {second};"),
        (
            whole[:second] + b"?" * 512 + whole[second + 512 :],
            f"cut.tar: damaged or cut short at byte {second};",
        ),
        (
            whole[:second] + bytes(512) + whole[second + 512 :],
            f"cut.tar: damaged or cut short at byte {second};",
        ),
        (whole + whole, f"cut.tar: damaged or cut short at byte {2 * second};"),
    ]:
        (tmp_path / "cut.tar").write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            WebDataset([str(tmp_path / "cut.tar")])


def labels_of(path, members, **options):
    source = WebDataset([str(make_shard(path, members))], **options)
    return [(data, label) for data, label, _ in contents(source)], source


@pytest.mark.parametrize(
    "members, expected",
    [
        # keys with dots
        ("IMG.2020.01.jpg IMG.2020.01.cls=1 b.jpg b.cls=2", [1, 2]),
        ("v1.2/a.b.jpg v1.2/a.b.cls=7 v1.2/a.c.png v1.2/a.c.cls=8", [7, 8]),
        ("p.01.jpg p.02.jpg", [-1, -1]),
        # files of a sample that do not follow each other
        ("0.cls=3 1.cls=4 0.jpg 1.jpg", [3, 4]),
        ("0.jpg 1.jpg ./1.cls=4 ./0.cls=3", [3, 4]),
        # a key that comes again is another sample
        ("0.jpg 0.cls=1 1.jpg 1.cls=2 0.jpg 0.cls=3 1.jpg 1.cls=4", [1, 2, 3, 4]),
        # where labels are
        ('0.jpg 0.json={"label":3} 1.jpg 1.json={"label":5}', [3, 5]),
        ('0.jpg 0.json={"cls":-3} 1.jpg 1.json={"target":5,"label":null}', [-3, 5]),
        ('0.jpg 0.cls=2 0.json={"label":3} 0.txt=4', [2]),
        ("0.jpg 0.txt=3 1.jpg 1.txt=12", [3, 12]),
        ("0.jpg 0.txt=3 1.jpg 1.txt=cats", [-1, -1]),
        ('0.jpg 0.json={"width":3,"url":"label"} 1.jpg 1.json={"meta":{"label":1}}', [-1, -1]),
        ("0.jpg 0.cls=9223372036854775807 1.jpg 1.cls=-9223372036854775808", [2**63 - 1, -(2**63)]),
        # other suffixes
        ("0.avif 0.cls=1 1.JPG 1.cls=2 2.jp2 2.CLS=3", [1, 2, 3]),
    ],
)
def test_webdataset_labels(tmp_path, members, expected):
    pairs = [member.partition("=")[::2] for member in members.split(" ")]
    # Each image is told from the others by its place.
    data = [(name, text.encode() or str(i).encode()) for i, (name, text) in enumerate(pairs)]
    got, source = labels_of(tmp_path / "s.tar", data)
    assert [label for _, label in got] == expected and source.class_names is None
    images = {i: name for i, (name, text) in enumerate(pairs) if not text}
    assert sorted(int(data) for data, _ in got) == sorted(images)
    unlabelled, _ = labels_of(tmp_path / "s.tar", data, labels=False)
    assert [label for _, label in unlabelled] == [-1] * len(expected)


def test_webdataset_labels_that_are_texts_are_numbered_as_class_folders_are(tmp_path):
    names = ["dog", "cat", "dog", "Ärger"]
    members = [
        m
        for i, n in enumerate(names)
        for m in ((f"{i}.jpg", b"x"), (f"{i}.json", json.dumps({"label": n}).encode()))
    ]
    got, source = labels_of(tmp_path / "s.tar", [*members, ("9.jpg", b"y")])
    assert source.class_names == sorted(set(names))
    assert [label for _, label in got] == [*map(sorted(set(names)).index, names), -1]


def add_link(archive, name, target, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    archive.addfile(member)


def test_webdataset_follows_links_inside_the_shard(tmp_path):
    make_shard(
        tmp_path / "s.tar",
        [("d/0.jpg", b"one"), ("d/0.cls", b"1"), ("d/1.cls", b"2"), ("x/2.cls", b"3")],
    )
    with tarfile.open(tmp_path / "s.tar", "a") as archive:
        add_link(archive, "d/1.jpg", "d/0.jpg", tarfile.LNKTYPE)
        add_link(archive, "x/2.jpg", "../d/1.jpg", tarfile.SYMTYPE)
        add_link(archive, "x/3.jpg", "4.jpg", tarfile.SYMTYPE)
        add_link(archive, "x/3.cls", "2.cls", tarfile.SYMTYPE)
        member = tarfile.TarInfo("x/4.jpg")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"four"))
        add_link(archive, "latest", "d", tarfile.SYMTYPE)
        add_link(archive, "pipe.jpg", "", tarfile.FIFOTYPE)
    source = WebDataset([str(tmp_path / "s.tar")])
    assert [(data, label) for data, label, _ in contents(source)] == [
        (b"one", 1),
        (b"one", 2),
        (b"one", 3),
        (b"four", 3),
        (b"four", -1),
    ]
    assert passed_over(source) == {
        "without suffix": (1, f"{tmp_path}/s.tar:latest"),
        "pipes, sockets or devices": (1, f"{tmp_path}/s.tar:pipe.jpg"),
    }
    for target, kind in (
        ("../gone.jpg", tarfile.SYMTYPE),
        ("5.jpg", tarfile.SYMTYPE),
        ("/etc/x.jpg", tarfile.LNKTYPE),
    ):
        make_shard(tmp_path / "l.tar", [("0.jpg", b"one")])
        with tarfile.open(tmp_path / "l.tar", "a") as archive:
            add_link(archive, "5.jpg", target, kind)
        with pytest.raises(
            UserError,
            match=f"l.tar:5.jpg: a link to {target}, which is no file of the shard.*--dereference",
        ):
            WebDataset([str(tmp_path / "l.tar")])


def test_what_a_shard_leaves_out_is_counted_by_kind(tmp_path):
    names = (
        "0.jpg 0.json 0.txt 0.seg.png 1.heic 1.cls 2 .3.jpg __meta__/4.jpg 5.npy 6.jpg 6.cls 6.txt"
    )
    got, source = labels_of(tmp_path / "s.tar", [(name, b"7") for name in names.split()])
    assert [label for _, label in got] == [7, 7]  # of the .txt, and of the .cls
    s = f"{tmp_path}/s.tar"
    assert passed_over(source) == {
        ".json": (1, f"{s}:0.json"),
        ".seg.png": (1, f"{s}:0.seg.png"),
        ".heic": (1, f"{s}:1.heic"),
        ".cls": (1, f"{s}:1.cls"),
        "without suffix": (1, f"{s}:2"),
        "hidden": (2, f"{s}:.3.jpg"),
        ".npy": (1, f"{s}:5.npy"),
        ".txt": (1, f"{s}:6.txt"),
    }
    with pytest.raises(UserError, match="no images in 1 shards, only 1 .cls, 1 .heic"):
        labels_of(tmp_path / "h.tar", [("1.heic", b""), ("1.cls", b"1")])


@pytest.mark.parametrize(
    "members, message",
    [
        (
            "0.jpg 0.cls=99999999999999999999",
            "s.tar:0.cls: holds '9{20}', not a class number of 64 bits.*--no-labels",
        ),
        ("0.jpg 0.cls=1.5", "0.cls: holds '1.5', not a class number"),
        (
            '0.jpg 0.json={"label":3.5}',
            "0.json: its label, 3.5, is neither an integer nor a text.*--no-labels",
        ),
        ('0.jpg 0.json={"label":[1,2]}', r"0.json: its label, \[1, 2\], is neither"),
        ('0.jpg 0.json={"label":true}', "0.json: its label, True, is neither"),
        ('0.jpg 0.json={"label":', "0.json: is no sound JSON"),
        (
            '0.jpg 0.json={"label":"cat"} 1.jpg 1.cls=3',
            "s.tar:0: its label is the text 'cat', and .*s.tar:1 has a number",
        ),
        # fields of one sample, of which none is the image by its key
        (
            "5.left.jpg 5.right.jpg 5.cls=1",
            "5.cls: has no image of its name, while 5.left.jpg is there",
        ),
        ("5.left.jpg 5.right.jpg", "s.tar:5: which of its images is to be taken, 5.left, 5.right?"),
        ("5.a.jpg 5.a.png", "5.a: two images under one key"),
        # what may be one sample or two
        ("0.jpg 0.jpg", "s.tar:0.jpg: its sample is there twice"),
        ("0.jpg 1.jpg 0.cls=2 0.jpg", "s.tar:0.jpg: its sample is there twice"),
        ("0.jpg 1.jpg 0.jpg 1.jpg 0.cls=1", "s.tar:0.cls: its sample is there twice"),
        ("0.jpg 1.jpg 0.cls=1 1.cls=2 0.jpg", "s.tar:0.jpg: its sample is there twice"),
    ],
)
def test_webdataset_refuses_odd_samples(tmp_path, members, message):
    pairs = [member.partition("=")[::2] for member in members.split(" ")]
    with pytest.raises(UserError, match=message):
        labels_of(tmp_path / "s.tar", [(name, text.encode()) for name, text in pairs])


def test_webdataset_folders(tmp_path):
    def shard(name):
        return make_shard(tmp_path / name, [("0.jpg", b"1")])

    def refused(message, *patterns):
        with pytest.raises(UserError, match=message):
            WebDataset([str(tmp_path / pattern) for pattern in patterns])

    shard("sets/a.tar"), shard("sets/b.TAR")
    put(tmp_path / "sets/a.tar.md5"), put(tmp_path / "sets/_SUCCESS"), put(tmp_path / "sets/.x.tar")
    (tmp_path / "sets/sub").mkdir()
    source = WebDataset([str(tmp_path / "sets")])
    assert source.shards == [f"{tmp_path}/sets/a.tar", f"{tmp_path}/sets/b.TAR"]
    assert {kind: count for kind, (count, _) in passed_over(source).items()} == {
        ".md5": 1,
        "without suffix": 1,
        "hidden": 1,
        "folders": 1,
    }
    refused("sets/a.tar: given twice", "sets/a.tar", "sets/*.tar")
    os.symlink("a.tar", tmp_path / "sets/c.tar")
    refused("sets/c.tar: the same file as .*sets/a.tar", "sets")
    (tmp_path / "sets/c.tar").unlink()
    for name in ("c.tar.gz", "c.tgz", "c.tar.zst", "c.tar.xz"):
        put(tmp_path / "sets" / name)
        refused(f"sets/{name}: a compressed shard can't be read in any order; decompress", "sets")
        (tmp_path / "sets" / name).unlink()
    os.mkfifo(tmp_path / "sets/p.tar")
    refused("p.tar: is a folder, a pipe or a device", "sets")
    refused("p.tar: is a folder, a pipe or a device", "sets/p.tar")
    put(tmp_path / "none/x.parquet")
    refused("none: no .tar in it, only 1 .parquet", "none")

    for name in ("imagenet-train-000.tar", "imagenet-train-001.tar", "imagenet-validation-00.tar"):
        shard(f"splits/{name}")
    several = r"several splits: train \(.*-train-000.tar\), validation \(.*-validation-00.tar\)"
    refused(several, "splits"), refused(several, "splits/*.tar")
    shard("apart/train/0.tar"), shard("apart/val/0.tar")
    refused(r"several splits: train \(train/0.tar\), validation \(val/0.tar\)", "apart/*/*.tar")
    refused("apart: no .tar in it, only 2 folders", "apart")
    assert len(WebDataset([f"{tmp_path}/splits/*-train-*.tar"])) == 2
    shard("numbered/x-1-of-3.tar"), shard("numbered/x-3-of-3.tar")
    refused("1 of 3 shards are not there, such as number 2 beside x-1-of-3.tar", "numbered")
    assert (
        len(WebDataset([f"{tmp_path}/numbered/x-1-of-3.tar", f"{tmp_path}/numbered/x-3-of-3.tar"]))
        == 2
    )
    shard("numbered/x-2-of-3.tar")
    assert len(WebDataset([f"{tmp_path}/numbered"])) == 3


@pytest.mark.parametrize(
    "path, split",
    [
        ("train-00000-of-00002.parquet", "train"),
        ("data/val-00000-of-00001-8b6e212f3e1ece96.parquet", "validation"),
        ("unlabeled-00000-of-00002.parquet", "unlabeled"),
        ("train_extra-00000-of-00002.parquet", "train_extra"),
        ("default/partial-train/0000.parquet", "train"),
        ("test/part-0.parquet", "test"),
        ("train/x/eval.parquet", "train"),
        ("my_dev.parquet", "validation"),
        ("training2.parquet", "train"),
        ("testfile.parquet", None),
        ("part-0.parquet", None),
    ],
)
def test_splits_are_told_from_names(path, split):
    assert split_of(path) == split


@pytest.fixture
def parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    def write(name, images, labels=None, features=None, column="image", rows=2):
        columns = {
            column: pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        }
        if labels is not None:
            columns["label"] = pa.array(labels)
        table = pa.table(columns)
        if features:
            table = table.replace_schema_metadata(
                {"huggingface": json.dumps({"info": {"features": features}})}
            )
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        pyarrow.parquet.write_table(table, tmp_path / name, row_group_size=rows)
        return str(tmp_path / name)

    return write


def test_huggingface(tmp_path, parquet):
    from ffssl.data.convert.sources.huggingface import HuggingFace

    features = {
        "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
        "image": {"_type": "Image"},
    }
    cells = [{"bytes": bytes([i]) * 3, "path": f"{i}.jpg"} for i in range(12)]
    parquet("data/train-00000-of-00002.parquet", cells[:5], [0, 1, 0, None, 1], features)
    parquet("data/train-00001-of-00002.parquet", cells[5:9], [1, 1, 0, 0], features)
    parquet("data/test-00000-of-00001.parquet", cells[9:], [0, 0, 0], features)
    source = HuggingFace([str(tmp_path / "data")], split="train")
    assert source.class_names == ["cat", "dog"]
    got = contents(source)
    assert [(data[0], label) for data, label, _ in got] == list(
        enumerate([0, 1, 0, -1, 1, 1, 1, 0, 0])
    )
    assert "row group 1, row 0" in source.name(2)

    plain = HuggingFace(
        [parquet("plain.parquet", [{"bytes": None, "path": "x.jpg"}], column="picture")]
    )
    put(tmp_path / "x.jpg", b"by path")
    assert contents(plain)[0][:2] == (b"by path", -1)


def test_huggingface_refuses(tmp_path, parquet):
    from ffssl.data.convert.sources.huggingface import HuggingFace

    path = parquet("a.parquet", [{"bytes": b"x", "path": ""}], [1.5])
    with pytest.raises(
        UserError, match="'label' is not one of class numbers or names .*--no-labels"
    ):
        HuggingFace([path])
    assert len(HuggingFace([path], labels=False)) == 1
    with pytest.raises(UserError, match="no column 'img'"):
        HuggingFace([path], image_column="img")
    labelled = parquet("b.parquet", [{"bytes": b"x", "path": ""}], [0])
    unlabelled = parquet("c.parquet", [{"bytes": b"x", "path": ""}])
    for files in ([labelled, unlabelled], [unlabelled, labelled]):
        with pytest.raises(UserError, match=r"c.parquet: no column 'label' \(has image\)"):
            HuggingFace(files)
    with pytest.raises(UserError, match="d.parquet: no column 'image'"):
        HuggingFace(
            [labelled, parquet("d.parquet", [{"bytes": b"x", "path": ""}], [0], column="img")]
        )
    with pytest.raises(
        UserError, match="no Parquet files of split 'val' there, only 4 of other splits"
    ):
        HuggingFace([str(tmp_path)], split="val")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="bad.parquet: not a sound Parquet file"):
        HuggingFace([str(tmp_path / "bad.parquet")])


CAT_DOG, DOG_CAT, CAT_COW = (
    {"label": {"names": n, "_type": "ClassLabel"}}
    for n in (["cat", "dog"], ["dog", "cat"], ["cat", "cow"])
)


@pytest.fixture
def converted(tmp_path, parquet):
    """Labels and class names of files in a folder: {name: (labels, features)}."""
    from ffssl.data.convert.sources.huggingface import HuggingFace

    def convert(files, folder="d", **options):
        for name, (labels, features) in files.items():
            parquet(
                f"{folder}/{name}", [{"bytes": b"x", "path": ""}] * len(labels), labels, features
            )
        source = HuggingFace([str(tmp_path / folder)], **options)
        return [label for _, label, _ in contents(source)], source.class_names

    return convert


def test_huggingface_classes_in_another_order_are_mapped(converted):
    files = {
        "train-0-of-2.parquet": ([0, 1, None, -1], CAT_DOG),
        "train-1-of-2.parquet": ([0, 1, None, -1, 0], DOG_CAT),
    }
    assert converted(files) == ([0, 1, -1, -1, 1, 0, -1, -1, 1], ["cat", "dog"])
    twice = {
        "label": {"names": ["crane", "cat", "crane"], "_type": "ClassLabel"}
    }  # as ImageNet's words have it
    assert converted({"a.parquet": ([0, 1, 2], twice), "b.parquet": ([2], twice)}, "e")[0] == [
        0,
        1,
        2,
        2,
    ]


@pytest.mark.parametrize(
    "other", [CAT_COW, None, {"label": {"names": ["dog"], "_type": "ClassLabel"}}]
)
def test_huggingface_refuses_files_with_other_classes(converted, other):
    files = {"train-0-of-2.parquet": ([0, 1], CAT_DOG), "train-1-of-2.parquet": ([0], other)}
    with pytest.raises(
        UserError,
        match="train-1-of-2.parquet: column 'label' has other classes than "
        ".*train-0-of-2.parquet, such as '.*--no-labels",
    ):
        converted(files)
    assert converted(files, labels=False) == ([-1] * 3, None)


@pytest.mark.parametrize("label", [2, -2])
def test_huggingface_refuses_labels_without_a_name(converted, label):
    with pytest.raises(UserError, match=f"column 'label' holds {label}, and has 2 names"):
        converted({"a.parquet": ([0, label], CAT_DOG)})


def test_huggingface_texts_are_numbered_as_class_folders_are(converted):
    files = {
        "train-0-of-2.parquet": (["dog", None], None),
        "train-1-of-2.parquet": (["cat", "Cow", "dog"], None),
    }
    names = ["Cow", "cat", "dog"]
    assert converted(files) == ([2, -1, 1, 0, 2], names)
    assert converted({"a.parquet": (["10", None, "9"], None)}, "n") == ([10, -1, 9], None)
    with pytest.raises(
        UserError, match="b.parquet: column 'label' holds texts, and numbers in .*a.parquet"
    ):
        converted({"a.parquet": ([1], None), "b.parquet": (["cat"], None)}, "m")


def test_huggingface_categories_and_ids(tmp_path, converted):
    pa = pytest.importorskip("pyarrow")
    assert converted({"a.parquet": (pa.array(["b", "a", "b"]).dictionary_encode(), None)}) == (
        [1, 0, 1],
        ["a", "b"],
    )
    ids = [2**63 - 1, -(2**63), 1_400_000_000]
    assert converted({"a.parquet": (ids, None)}, "ids") == (ids, None)
    with pytest.raises(UserError, match="is not one of class numbers or names"):
        converted({"a.parquet": (pa.array([2**64 - 1], pa.uint64()), None)}, "large")


def test_huggingface_finds_the_label_column_by_the_schema(tmp_path, parquet):
    import pyarrow as pa
    import pyarrow.parquet

    from ffssl.data.convert.sources.huggingface import HuggingFace

    def write(columns, classes):
        features = {"img": {"_type": "Image"}} | {
            c: {"names": ["x", "y"], "_type": "ClassLabel"} for c in classes
        }
        cells = pa.array(
            [{"bytes": b"1", "path": ""}],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        )
        table = pa.table(
            {"img": cells, "mask": pa.array([b"?"])} | {c: [i] for i, c in enumerate(columns)}
        )
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
        path = str(tmp_path / f"{'-'.join(columns)}.parquet")
        pyarrow.parquet.write_table(table, path)
        return path

    source = HuggingFace([write(["id", "species"], ["species"])])
    assert (source.image_column, source.label_column, source.load(0)) == (
        "img",
        "species",
        (b"1", 1),
    )
    assert (
        HuggingFace(
            [write(["coarse_label", "fine_label"], ["coarse_label", "fine_label"])]
        ).label_column
        == "fine_label"
    )
    assert HuggingFace([write(["label", "species"], ["species"])]).label_column == "species"
    path = write(["genus", "species"], ["genus", "species"])
    with pytest.raises(
        UserError,
        match=r"species.parquet: which column holds the labels\? \(genus, species\); pass --label-",
    ):
        HuggingFace([path])
    assert HuggingFace([path], label_column="species").load(0) == (b"1", 1)
    assert HuggingFace([path], labels=False, image_column="img").load(0) == (b"1", -1)


@pytest.mark.parametrize(
    "metadata",
    [
        b"x",
        b'{"info": 3}',
        b"[1]",
        b'{"info": {"features": {"label": {"names": [1, 2]}}}}',
        b'{"info": {"features": {"label": {"names": 7}}}}',
        b"\xff",
    ],
)
def test_huggingface_damaged_metadata_is_one_line(tmp_path, metadata):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    from ffssl.data.convert.sources.huggingface import HuggingFace

    pyarrow.parquet.write_table(
        pa.table({"image": [b"1"], "label": [0]}).replace_schema_metadata(
            {"huggingface": metadata}
        ),
        tmp_path / "a.parquet",
    )
    with pytest.raises(
        UserError, match="^.*a.parquet: the metadata of its columns are damaged .*--no-labels$"
    ):
        HuggingFace([str(tmp_path / "a.parquet")])
    assert HuggingFace([str(tmp_path / "a.parquet")], labels=False).load(0) == (b"1", -1)


@pytest.mark.parametrize(
    "metadata",
    [
        b'{"info": null}',
        b'{"info": {"features": null}}',
        b'{"info": {"features": {"label": {"names": null}}}}',
        b"{}",
    ],
)
def test_huggingface_metadata_that_say_nothing(tmp_path, metadata):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    from ffssl.data.convert.sources.huggingface import HuggingFace

    pyarrow.parquet.write_table(
        pa.table({"image": [b"1"], "label": [5]}).replace_schema_metadata(
            {"huggingface": metadata}
        ),
        tmp_path / "a.parquet",
    )
    source = HuggingFace([str(tmp_path / "a.parquet")])
    assert source.class_names is None and source.load(0) == (b"1", 5)


@pytest.mark.parametrize(
    "names, message",
    [
        (
            ["train-00000-of-00002"],
            "1 of 2 shards are not there, such as number 1 beside train-00000-of-00002.parquet",
        ),
        (
            ["data/train-1-of-3", "data/train-2-of-3"],
            "1 of 3 shards are not there, such as number 0",
        ),
        (
            ["a/train-0-of-1", "b/train-0-of-1"],
            "a/train-0-of-1.parquet and b/train-0-of-1.parquet are shards of two sets",
        ),
        (["train-0-of-1", "train-0-of-2", "train-1-of-2"], "are shards of two sets"),
        (["train-0-of-1", "test-0-of-1"], "several splits: test .*, train .*; pass --split"),
        (["train", "extra"], "several splits: no split .extra.parquet., train"),
        (["train/0", "val/0"], "several splits: train .*, validation"),
        (["default/partial-train/0000", "default/test/0000"], "several splits: test .*, train"),
    ],
)
def test_huggingface_refuses_folders_that_are_not_one_whole_split(
    tmp_path, parquet, names, message
):
    from ffssl.data.convert.sources.huggingface import HuggingFace

    files = [parquet(f"{name}.parquet", [{"bytes": b"x", "path": ""}]) for name in names]
    with pytest.raises(UserError, match=message):
        HuggingFace([str(tmp_path)])
    if len({os.path.dirname(name) for name in names}) == 1:
        with pytest.raises(UserError, match=message.split(";")[0]):
            HuggingFace([f"{os.path.dirname(files[0])}/*.parquet"])
    assert len(HuggingFace(files)) == len(files)  # named one by one, they are what is wanted


def test_huggingface_splits_and_what_is_left_out(tmp_path, parquet):
    from ffssl.data.convert.sources.huggingface import HuggingFace

    for i, name in enumerate(
        [
            "data/train-0-of-1",
            "data/validation-0-of-1",
            "data/unlabeled-0-of-1",
            "data/train_extra-0-of-1",
        ]
    ):
        parquet(f"{name}.parquet", [{"bytes": b"x", "path": ""}] * (i + 1))
    put(tmp_path / "README.md"), put(tmp_path / ".gitattributes")
    for split, count in (
        ("train", 1),
        ("validation", 2),
        ("val", 2),
        ("unlabeled", 3),
        ("train_extra", 4),
    ):
        source = HuggingFace([str(tmp_path)], split=split)
        assert len(source) == count
        assert [(kind, count) for kind, count, _ in source.passed_over] == [
            (".md", 1),
            ("hidden", 1),
            ("of other splits", 3),
        ]
        assert len(HuggingFace([f"{tmp_path}/data/*.parquet"], split=split)) == count
    with pytest.raises(
        UserError, match="no Parquet files of split 'test' there, only .* 4 of other splits"
    ):
        HuggingFace([str(tmp_path)], split="test")
    # As the hub's client lays them out: links to files elsewhere.
    (tmp_path / "cache/data").mkdir(parents=True)
    os.symlink("../../data/train-0-of-1.parquet", tmp_path / "cache/data/train-0-of-1.parquet")
    assert len(HuggingFace([str(tmp_path / "cache")])) == 1
    with pytest.raises(UserError, match="the same file as"):
        HuggingFace([str(tmp_path / "cache"), f"{tmp_path}/data/train-0-of-1.parquet"])
    os.mkfifo(tmp_path / "pipe.parquet")
    with pytest.raises(UserError, match="pipe.parquet: is a folder, a pipe"):
        HuggingFace([str(tmp_path / "pipe.parquet")])


def test_huggingface_without_pyarrow(monkeypatch):
    import sys

    from ffssl.data.convert.sources.huggingface import HuggingFace

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="needs pyarrow: pip install"):
        HuggingFace(["x.parquet"])
