"""Several beton files as one, against the tables of each and against one file of all samples."""

import json
import os
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from support.sample_images import smooth_image, write_beton

from ffssl.data.beton.description import (
    class_names,
    description_path,
    identity,
    read_description,
    same_samples,
)
from ffssl.data.beton.files import beton_files
from ffssl.data.beton.mapped import ImageFiles
from ffssl.data.beton.read import read_beton
from ffssl.data.beton.several import read_betons
from ffssl.data.convert.conversion import ConvertOptions, convert
from ffssl.data.convert.sources.folder import ImageFolder
from ffssl.errors import UserError

IMAGES = [smooth_image(24 + i, 30, seed=i) for i in range(6)]


def write(path, labels, names=None, field=b"label"):
    """A file of images, one a label, and its description where the classes have names."""
    write_beton(path, IMAGES[: len(labels)], labels)
    path.write_bytes(path.read_bytes().replace(b"label", field, 1))
    if names:
        description_path(path).write_text(json.dumps({"class_names": names}))
    return path


# Which files


def test_a_pattern_a_list_and_a_name_mean_files_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("p-1.b", "p-2.b", "p-10.b", "q.b", "x,y.b", "[z].b"):
        (tmp_path / name).touch()

    def names(files):
        return [str(path) for path in beton_files(files)]

    assert names("p-*.b") == ["p-1.b", "p-2.b", "p-10.b"]
    assert names("q.b, p-?.b") == names(["q.b", Path("p-?.b")])
    assert names("q.b, p-?.b") == ["q.b", "p-1.b", "p-2.b"]
    assert names("x,y.b") == ["x,y.b"] and names("[z].b") == ["[z].b"]
    assert names("gone.b") == ["gone.b"]  # told when it is read


def test_a_pattern_that_matches_nothing_and_a_file_named_twice_are_refused(tmp_path):
    for name in ("a.b", "c.b"):
        (tmp_path / name).touch()
    os.symlink("a.b", tmp_path / "d.b")
    os.link(tmp_path / "c.b", tmp_path / "e.b")
    for files, message in [
        ("none-*.b", "none-*.b: no file matches this pattern"),
        ("a.b,c.b,./a.b", "a.b: is named twice"),
        ("a.b,[ac].b", "a.b: is named twice"),
        ("a.b,d.b", f"d.b: is named twice, as {tmp_path}/a.b"),
        ("c.b,e.b", f"e.b: is named twice, as {tmp_path}/c.b"),
        ("a.b,gone.b", "gone.b: cannot be read: No such file"),
        ("a.b,,c.b", "names no beton file, or one without a name"),
    ]:
        parts = [f"{tmp_path}/{part}" if part else part for part in files.split(",")]
        with pytest.raises(UserError, match=re.escape(message)):
            beton_files(",".join(parts))


# Their tables


def test_every_sample_of_the_joined_tables_is_that_of_its_file(tmp_path):
    paths = [write(tmp_path / f"{i}.beton", labels) for i, labels in enumerate(([3, 1], [4], [1]))]
    beton = read_betons(paths)
    assert len(beton) == 4 and beton.labels.tolist() == [3, 1, 4, 1]
    assert [beton.place(i) for i in range(4)] == [
        *((paths[0], 0), (paths[0], 1), (paths[1], 0), (paths[2], 0))
    ]
    assert beton.name == f"{paths[0]} and 2 more"
    assert (np.diff(beton.pointers.astype(np.int64)) > 0).all()
    mapped = ImageFiles(beton.files)
    for i, (image, size) in enumerate(zip(beton.images, beton.image_sizes)):
        path, place = beton.place(i)
        own = read_beton(path)
        begin = int(own.images[place]["data_ptr"])
        expected = path.read_bytes()[begin : begin + int(own.image_sizes[place])]
        begin = int(image["data_ptr"])
        assert mapped.data[begin : begin + int(size)].tobytes() == expected
        assert beton.sizes[np.searchsorted(beton.pointers, image["data_ptr"])] == size
    assert not beton.images.flags.writeable
    mapped.close()


def test_labels_are_told_by_the_names_of_their_classes(tmp_path):
    same = [write(tmp_path / f"s{i}.b", [0, 1, -1], ["b", "a"]) for i in range(2)]
    assert read_betons(same).labels.tolist() == [0, 1, -1, 0, 1, -1]
    assert class_names(same) == ["b", "a"]
    other = write(tmp_path / "o.b", [2, 0], ["c", "d", "b"])
    bare = write(tmp_path / "n.b", [-1])
    files = [same[0], other, bare]  # a: 0, b: 1, c: 2, d: 3
    assert class_names(files) == ["a", "b", "c", "d"]
    assert read_betons(files).labels.tolist() == [1, 0, -1, 1, 2, -1]
    numbers = [write(tmp_path / f"i{i}.b", [7, 8]) for i in range(2)]
    assert read_betons(numbers).labels.tolist() == [7, 8, 7, 8]


def test_labels_that_cannot_be_told_from_another_files_are_refused(tmp_path):
    named = write(tmp_path / "named.b", [0, 1], ["a", "b"])
    for labels, names, field, message in [
        ([1, 0], None, b"label", "x.b: has labels without class names, and .*named.b has names"),
        ([2, 0], ["a", "c"], b"label", "x.b: its classes can't be told by name: 2 has none"),
        ([1, 0], ["c", "c"], b"label", "x.b: its classes can't be told by name: two have one name"),
        ([1, 0], ["a", "b"], b"class", "x.b: its labels are not in the field 'label'.*'class'"),
    ]:
        other = write(tmp_path / "x.b", labels, names, field)
        with pytest.raises(UserError, match=message):
            read_betons([named, other])
        description_path(other).unlink(missing_ok=True)
    with pytest.raises(UserError, match="named.b: the field of labels, 'class', is not in it"):
        read_betons([other, named], "class")


# What tells them from others


def test_the_identity_of_files_is_that_of_their_content_and_order(tmp_path):
    folder = tmp_path / "photos"
    for i, image in enumerate(IMAGES):
        write_jpeg(folder / "ab"[i % 2] / f"{i}.jpg", image)
    paths = [tmp_path / f"{k}.beton" for k in (1, 2)]
    for k, path in enumerate(paths, 1):
        convert(ImageFolder(folder), path, ConvertOptions(part=(k, 2), progress=False))
    found = identity(read_betons(paths))
    assert found["samples"] == 6 and "sha256" in found
    description = read_description(paths)
    assert description["sha256"] == found["sha256"] and description["samples"] == 6
    assert description["class_names"] == ["a", "b"]
    assert description["source"]["kind"] == "ImageFolder"

    moved = [path.rename(tmp_path / f"moved-{path.name}") for path in paths]
    without_checksum = identity(read_betons(moved))
    assert same_samples(found, without_checksum) and "sha256" not in without_checksum
    assert not same_samples(found, identity(read_betons(moved[::-1])))
    assert not same_samples(found, identity(read_betons(moved[:1])))
    for path in moved:
        description_path(path).write_text(description_path(paths[0]).read_text())
    with pytest.raises(UserError, match="moved-2.beton: damaged, or not the file that"):
        identity(read_betons(moved))


def write_jpeg(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(image).save(path)
