"""The file format, held against stock ffcv, and the reader against damaged files."""

import errno
import io
import os
import re
import resource
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import PIL.Image
import pytest

from ffssl.data.beton import read as format_
from ffssl.data.beton.read import MODE_JPEG, MODE_RAW, read_beton
from ffssl.data.beton.write import BetonWriteError, BetonWriter
from ffssl.errors import UserError

PAGE = 1 << 21
ROWS_START = 24 + 2 * 1041


def pixels(height, width, seed=0):
    """Smooth enough to survive JPEG, different everywhere."""
    y, x = np.mgrid[:height, :width]
    return (
        np.stack([x + seed * 40, y + x // 2, 255 - y + seed * 9], -1)
        .astype(np.uint16)
        .clip(0, 255)
        .astype(np.uint8)
    )


def jpeg(array):
    buffer = io.BytesIO()
    PIL.Image.fromarray(array).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write(path, images, modes, max_samples=None, page_size=PAGE, labels=None):
    with BetonWriter(path, max_samples or len(images), page_size) as writer:
        for i, (image, mode) in enumerate(zip(images, modes)):
            data = jpeg(image) if mode == MODE_JPEG else image.tobytes()
            writer.add(
                data,
                mode,
                image.shape[1],
                image.shape[0],
                i * 7 - 3 if labels is None else labels[i],
            )
    return path


@pytest.fixture
def small(tmp_path):
    return write(tmp_path / "small.beton", [pixels(20, 30, i) for i in range(5)], [0, 1, 0, 1, 1])


def assert_same_dtype(ours, theirs):
    """Field names aside, ffcv's own are generated."""
    assert ours.itemsize == theirs.itemsize
    assert [ours.fields[n][:2] for n in ours.names] == [theirs.fields[n][:2] for n in theirs.names]


def test_types_equal_ffcv():
    import torch
    from ffcv import types
    from ffcv.fields import (
        BytesField,
        FloatField,
        IntField,
        JSONField,
        NDArrayField,
        RGBImageField,
        TorchTensorField,
    )

    assert types.HeaderType == format_.HEADER_TYPE
    assert types.FieldDescType == format_.FIELD_TYPE
    assert format_.ALLOCATION_TYPE == types.ALLOC_TABLE_TYPE
    assert format_.VERSION == types.CURRENT_VERSION
    fields = [
        FloatField(),
        IntField(),
        RGBImageField(),
        BytesField(),
        NDArrayField(np.dtype("<f4"), (2, 3)),
        JSONField(),
        TorchTensorField(torch.float32, (4,)),
    ]
    for type_id, field in enumerate(fields):
        assert types.TYPE_ID_HANDLER[type_id] is type(field)
        assert format_.FIELD_METADATA[type_id] == field.metadata_type
    assert_same_dtype(
        format_.metadata_type([2, 1]), types.get_metadata_type([RGBImageField(), IntField()])
    )
    mixed = [1, 2, 0, 5, 2, 4]
    assert_same_dtype(
        format_.metadata_type(mixed), types.get_metadata_type([fields[i] for i in mixed])
    )


@pytest.mark.parametrize("os_cache", [True, False])
def test_stock_ffcv_loads_what_we_write(tmp_path, os_cache):
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    # 700x700 raw pixels fill most of a page, so that samples of both kinds land on several pages.
    images = [pixels(700, 700, i) for i in range(7)]
    modes = [MODE_RAW, MODE_JPEG, MODE_RAW, MODE_JPEG, MODE_RAW, MODE_RAW, MODE_JPEG]
    # Two announced samples never came.
    path = write(tmp_path / "x.beton", images, modes, max_samples=9)
    loader = Loader(
        str(path),
        batch_size=3,
        num_workers=1,
        os_cache=os_cache,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]},
    )
    batches = [(image.copy(), label.copy()) for image, label in loader]
    got = np.concatenate([np.asarray(image) for image, _ in batches])
    labels = np.concatenate([np.asarray(label) for _, label in batches])
    assert labels.ravel().tolist() == [i * 7 - 3 for i in range(7)]
    for i, (image, mode) in enumerate(zip(images, modes)):
        if mode == MODE_RAW:
            np.testing.assert_array_equal(got[i], image)
        else:
            reference = np.asarray(PIL.Image.open(io.BytesIO(jpeg(image))))
            # Ffcv decodes with the fast DCT.
            assert np.abs(got[i].astype(int) - reference).max() <= 8


def test_reads_what_ffcv_writes(tmp_path):
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    images = [pixels(10 + i, 12, i) for i in range(6)]

    class Dataset:
        def __len__(self):
            return 6

        def __getitem__(self, i):
            text = np.zeros(0 if i == 3 else i + 1, np.uint8)
            return (
                text,
                i * 0.5,
                images[i],
                100 + i,
                {"i": int(i)},
                np.full((2, 2), i, np.float32),
                i,
            )

    path = str(tmp_path / "theirs.beton")
    fields = {
        "text": BytesField(),
        "weight": FloatField(),
        "image": RGBImageField("raw"),
        "label": IntField(),
        "info": JSONField(),
        "array": NDArrayField(np.dtype("<f4"), (2, 2)),
        "other": IntField(),
    }
    signal.alarm(600)  # DatasetWriter waits for ever when its worker raises
    DatasetWriter(path, fields, num_workers=1).from_indexed_dataset(Dataset())
    signal.alarm(0)
    beton = read_beton(path)
    data = np.fromfile(path, np.uint8)
    assert beton.labels.tolist() == [100 + i for i in range(6)]
    for i, (row, size) in enumerate(zip(beton.images, beton.image_sizes)):
        stored = data[row["data_ptr"] : row["data_ptr"] + size].reshape(
            row["height"], row["width"], 3
        )
        np.testing.assert_array_equal(stored, images[i])


def test_round_trip(small):
    beton = read_beton(small)
    data = small.read_bytes()
    assert (
        len(beton) == 5
        and beton.labels.tolist() == [-3, 4, 11, 18, 25]
        and beton.labels.dtype == np.int64
    )
    assert beton.images.dtype == format_.IMAGE_TYPE and not beton.images.flags.writeable
    assert (np.diff(beton.pointers.astype(np.int64)) > 0).all()
    for i, (row, size) in enumerate(zip(beton.images, beton.image_sizes)):
        stored = data[int(row["data_ptr"]) :][: int(size)]
        assert (row["width"], row["height"]) == (30, 20)
        assert stored == (
            pixels(20, 30, i).tobytes() if row["mode"] == MODE_RAW else jpeg(pixels(20, 30, i))
        )


def test_samples_stay_within_pages_that_grow(tmp_path):
    random = np.random.default_rng(0)
    sizes = (
        [int(s) for s in random.integers(1, PAGE, 20)]
        + [3 * PAGE]
        + [int(s) for s in random.integers(1, PAGE, 20)]
    )
    with BetonWriter(tmp_path / "x.beton", len(sizes), PAGE) as writer:
        for size in sizes:
            writer.add(b"\x01" * size, MODE_JPEG, 1, 1, 0)
    beton = read_beton(tmp_path / "x.beton")
    assert beton.page_size == 4 * PAGE
    assert beton.image_sizes.tolist() == sizes
    data, covered = (
        (tmp_path / "x.beton").read_bytes(),
        np.zeros(os.path.getsize(tmp_path / "x.beton"), bool),
    )
    for pointer, size in zip(beton.images["data_ptr"].tolist(), sizes):
        assert pointer // beton.page_size == (pointer + size - 1) // beton.page_size
        assert not covered[pointer : pointer + size].any()
        covered[pointer : pointer + size] = True
    # Padding is zeros.
    end = int(beton.pointers[-1] + beton.sizes[-1])
    assert not np.frombuffer(data, np.uint8)[PAGE:end][~covered[PAGE:end]].any()


def test_writer_refuses_what_the_format_cannot_hold(tmp_path):
    for sample in [
        (b"x", 2, 1, 1, 0),
        (b"x", 0, 65536, 1, 0),
        (b"x", 0, 1, 0, 0),
        (b"", 0, 1, 1, 0),
        (b"xx", 1, 1, 1, 0),
    ]:
        with pytest.raises(ValueError), BetonWriter(tmp_path / "x.beton", 3) as writer:
            writer.add(*sample)
    with (
        pytest.raises(ValueError, match="announced"),
        BetonWriter(tmp_path / "x.beton", 1) as writer,
    ):
        writer.add(b"x", 0, 1, 1, 0)
        writer.add(b"x", 0, 1, 1, 0)
    with pytest.raises(UserError, match="no sample"), BetonWriter(tmp_path / "x.beton", 1):
        pass
    with pytest.raises(ValueError):
        BetonWriter(tmp_path / "x.beton", 1, page_size=3 << 20)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failed_writer_leaves_the_old_file(small, exception):
    before = small.read_bytes()
    with pytest.raises(exception), BetonWriter(small, 2) as writer:
        writer.add(b"new", MODE_JPEG, 1, 1, 0)
        raise exception
    assert small.read_bytes() == before and os.listdir(small.parent) == [small.name]


def test_file_size_limit_is_an_error_that_names_the_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE + 100_000, hard))
    try:
        with (
            pytest.raises(BetonWriteError, match=r"x\.beton.*larger than"),
            BetonWriter(tmp_path / "x.beton", 9, PAGE) as w,
        ):
            for _ in range(9):
                w.add(bytes(50_000), MODE_JPEG, 1, 1, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_full_disk_is_an_error_that_names_file_and_space(tmp_path, monkeypatch):
    with (
        pytest.raises(
            BetonWriteError, match=r"x\.beton: could not be written after 1 samples.*MB free"
        ),
        BetonWriter(tmp_path / "x.beton", 9) as writer,
    ):
        writer.add(b"fits", MODE_JPEG, 1, 1, 0)

        def full(data):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(
            writer,
            "_file",
            type("Full", (), {"write": staticmethod(full), "close": lambda self: None})(),
        )
        writer.add(b"does not", MODE_JPEG, 1, 1, 0)
    assert os.listdir(tmp_path) == []


def test_next_writer_removes_what_a_killed_one_left(tmp_path):
    program = (
        "import sys; from ffssl.data.beton.write import BetonWriter\n"
        "with BetonWriter(sys.argv[1], 9) as w: w.add(b'x', 0, 1, 1, 0); print(flush=True); "
        "sys.stdin.read()"
    )
    target = tmp_path / "x.beton"
    with subprocess.Popen(
        [sys.executable, "-c", program, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        (partial,) = tmp_path.iterdir()
        assert partial.name.startswith(".x.beton.partial-")
        # Of a writer that lives: not to be touched.
        write(tmp_path / "x.beton", [pixels(4, 4)], [1])
        assert partial.exists()
        process.send_signal(signal.SIGKILL)
    with pytest.raises(UserError, match="damaged|version|short|empty"):
        read_beton(partial)
    write(tmp_path / "x.beton", [pixels(4, 4)], [1])
    assert os.listdir(tmp_path) == ["x.beton"]


def write_fields(path, named: dict[str, tuple[int, list]]):
    """A file of three small images by our writer, its label field replaced by fields of a type and
    values, as ffcv would lay them out.
    """
    small = write(path, [pixels(8, 9, i) for i in range(3)], [MODE_RAW] * 3, labels=[0, 1, 2])
    old = read_beton(small)
    types = [format_.IMAGE_FIELD, *(kind for kind, _ in named.values())]
    header, fields = (
        np.fromfile(small, format_.HEADER_TYPE, 1),
        np.zeros(len(types), format_.FIELD_TYPE),
    )
    header["num_fields"] = len(types)
    rows = np.zeros(3, format_.metadata_type(types))
    rows["f0"] = old.images
    fields["type_id"] = types
    for i, (name, (_, values)) in enumerate({"image": (0, None), **named}.items()):
        fields["name"][i][: len(name)] = list(name.encode())
        if values is not None:
            rows[f"f{i}"] = values
    with open(small, "r+b") as file:
        file.write(b"".join(part.tobytes() for part in (header, fields, rows)))
    return small


INT, FLOAT, BYTES = format_.INT_FIELD, format_.FLOAT_FIELD, format_.BYTES_FIELD
FIELDS = {  # fields, which is asked for, which is taken, and its labels
    "label": ({"label": (INT, [5, 6, 7])}, None, "label", [5, 6, 7]),
    "label among others": (
        {"index": (INT, [0, 1, 2]), "label": (INT, [5, 6, 7])},
        None,
        "label",
        [5, 6, 7],
    ),
    "the only one that can be meant": (
        {"target": (INT, [5, 6, -(2**63)])},
        None,
        "target",
        [5, 6, -(2**63)],
    ),
    "beside one that can't": (
        {"target": (INT, [5, 6, 7]), "weight": (FLOAT, [0.5, 1, 1])},
        None,
        "target",
        [5, 6, 7],
    ),
    "whole floats": ({"label": (FLOAT, [5, -6, 7])}, None, "label", [5, -6, 7]),
    "label is no number of a class": (
        {"index": (INT, [0, 1, 2]), "label": (FLOAT, [0.5, 1, 2])},
        None,
        None,
        None,
    ),
    "not clear which": ({"index": (INT, [0, 1, 2]), "target": (INT, [5, 6, 7])}, None, None, None),
    "asked for": (
        {"index": (INT, [0, 1, 2]), "target": (INT, [5, 6, 7])},
        "target",
        "target",
        [5, 6, 7],
    ),
    "another than label": (
        {"label": (INT, [0, 1, 2]), "coarse": (FLOAT, [5, 6, 7])},
        "coarse",
        "coarse",
        [5, 6, 7],
    ),
    "none": ({}, None, None, None),
    "no numbers": ({"caption": (BYTES, None)}, None, None, None),
    "not finite": ({"label": (FLOAT, [1, np.nan, np.inf])}, None, None, None),
    "too large to be exact": ({"label": (FLOAT, [1, 2, 1e300])}, None, None, None),
}


@pytest.mark.parametrize("case", FIELDS)
def test_labels_are_found_by_name_or_where_they_can_only_be(tmp_path, case):
    named, wanted, field, labels = FIELDS[case]
    beton = read_beton(write_fields(tmp_path / "x.beton", named), wanted)
    assert beton.label_field == field
    assert (None if beton.labels is None else beton.labels.tolist()) == labels and (
        labels is None or beton.labels.dtype == np.int64
    )


@pytest.mark.parametrize(
    "wanted, message",
    [
        (
            "class",
            "the field of labels, 'class', is not in it; its fields: 'weight' (float), 'label' "
            "(int), 'caption' (bytes)",
        ),
        ("weight", "the field of labels, 'weight', holds no whole numbers; its fields: "),
        ("caption", "'caption', holds no whole numbers"),
        ("image", "'image', holds no whole numbers"),
    ],
)
def test_a_field_that_holds_no_labels_is_refused_with_those_there_are(tmp_path, wanted, message):
    named = {"weight": (FLOAT, [0.5, 1, 2]), "label": (INT, [0, 1, 2]), "caption": (BYTES, None)}
    with pytest.raises(UserError, match=re.escape(message)):
        read_beton(write_fields(tmp_path / "x.beton", named), wanted)


def test_a_file_is_the_same_whichever_field_of_labels_is_read(tmp_path):
    """Else a run could not be continued with the field named."""
    both = write_fields(
        tmp_path / "both.beton", {"label": (INT, [0, 1, 2]), "coarse": (INT, [0, 0, 1])}
    )
    assert (
        read_beton(both).digest()
        == read_beton(both, "coarse").digest()
        == read_beton(both, "label").digest()
    )
    others = {
        name: write_fields(tmp_path / f"{name}.beton", {name: (INT, values)})
        for name, values in (("label", [0, 1, 1]), ("coarse", [0, 1, 2]))
    }
    # A file's labels count, as they did.
    assert len({read_beton(path).digest() for path in (both, *others.values())}) == 3


def patch(path, offset, value, dtype):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(np.array(value, dtype).tobytes())


def table_of(path):
    return int(np.fromfile(path, format_.HEADER_TYPE, 1)["alloc_table_ptr"][0])


DAMAGES = {
    "is a folder": lambda p: (p.unlink(), p.mkdir()),
    "no such file": lambda p: p.unlink(),
    "is empty": lambda p: os.truncate(p, 0),
    "is 10 bytes long, too short": lambda p: os.truncate(p, 10),
    "not a beton file of version 2": lambda p: p.write_bytes(b"PK\x03\x04" * 1000),
    "holds no samples": lambda p: patch(p, 8, 0, "<u8"),
    "claims 1099511627776 samples": lambda p: patch(p, 8, 1 << 40, "<u8"),
    "claims 65535 fields": lambda p: patch(p, 2, 65535, "<u2"),
    "claims 0 fields": lambda p: patch(p, 2, 0, "<u2"),
    "its page size, 100, is not": lambda p: patch(p, 4, 100, "<u4"),
    "its page size, 3145728, is not": lambda p: patch(p, 4, 3 << 20, "<u4"),
    r"field 'image' has a custom type \(255\)": lambda p: patch(p, 24, 255, "<u1"),
    r"field 'imag\\n' has a custom": lambda p: (
        patch(p, 24, 255, "<u1"),
        patch(p, 24 + 5, ord("\n"), "<u1"),
    ),
    "no RGB image field": lambda p: patch(p, 24, 3, "<u1"),
    "several RGB image fields": lambda p: (
        patch(p, 24 + 1, ord("j"), "<u1"),
        patch(p, 24 + 1041, 2, "<u1"),
    ),
    "allocation table is cut short": lambda p: os.truncate(p, os.path.getsize(p) - 5),
    "table is cut short": lambda p: os.truncate(p, table_of(p) - 100),
    "table is cut short; ": lambda p: patch(p, 16, 1 << 60, "<u8"),
    "points to data that the allocation table does not list": lambda p: os.truncate(
        p, os.path.getsize(p) - 24
    ),
    "sample 2 points to data": lambda p: patch(p, ROWS_START + 2 * 24 + 5, 12345, "<u8"),
    "points outside the data": lambda p: patch(p, table_of(p) + 8, 1 << 62, "<u8"),
    "points outside": lambda p: patch(p, table_of(p) + 4 * 24 + 16, 1 << 63, "<u8"),
    "overlapping entries": lambda p: patch(p, table_of(p) + 16, 100_000 // 50, "<u8"),
    "sample 3 has no width or no height": lambda p: patch(p, ROWS_START + 3 * 24 + 1, 0, "<u2"),
    "sample 4 has no width": lambda p: patch(p, ROWS_START + 4 * 24 + 3, 0, "<u2"),
    "sample 1 is marked as neither": lambda p: patch(p, ROWS_START + 24, 2, "<u1"),
    "sample 2 claims more pixels than": lambda p: patch(
        p, ROWS_START + 2 * 24 + 1, [65535, 65535], "<u2"
    ),
    "sample 1 is raw but not of": lambda p: patch(p, ROWS_START + 24 + 1, 31, "<u2"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_every_damage_is_named(small, message):
    DAMAGES[message](small)
    with pytest.raises(UserError, match=message) as caught:
        read_beton(small)
    assert str(caught.value).startswith(str(small)) and "\n" not in str(caught.value)


def test_a_sample_across_pages_is_refused(tmp_path):
    path = write(tmp_path / "x.beton", [pixels(900, 900)], [1], page_size=2 * PAGE)
    patch(path, 4, PAGE, "<u4")
    with pytest.raises(UserError, match="crosses a page boundary"):
        read_beton(path)


def test_random_damage_never_crashes(small):
    whole = np.fromfile(small, np.uint8)
    random = np.random.default_rng(1)
    table = table_of(small)
    interesting = np.r_[0 : ROWS_START + 120, table : len(whole)]
    refused = 0
    for trial in range(300):
        damaged = whole.copy()
        if trial % 5 == 0:
            damaged = damaged[: random.integers(len(whole))]
        else:
            places = random.choice(
                interesting if trial % 2 else np.r_[0:24, ROWS_START : ROWS_START + 120], 4
            )
            damaged[places] ^= random.integers(1, 256, 4, np.uint8)
        damaged.tofile(small)
        try:
            read_beton(small)
        except UserError:
            refused += 1
    assert refused > 150


def test_reading_a_million_samples_calls_no_function_for_each(tmp_path):
    count = 1_281_167
    path = tmp_path / "big.beton"
    start = 1 << 26
    rows = np.zeros(count, format_.metadata_type([2, 1]))
    table = np.zeros(count, format_.ALLOCATION_TYPE)
    order = np.random.default_rng(0).permutation(count)  # as ffcv's concurrent workers leave it
    table["ptr"] = start + order * 64
    table["size"], table["sample_id"] = 64, np.arange(count)
    rows["f0"]["width"] = rows["f0"]["height"] = 8
    rows["f0"]["data_ptr"] = table["ptr"]
    header, fields = np.zeros(1, format_.HEADER_TYPE), np.zeros(2, format_.FIELD_TYPE)
    header[0] = (2, 2, 1 << 23, count, start + count * 64)
    fields["type_id"] = [2, 1]
    fields["name"][0][:5] = list(b"image")
    fields["name"][1][:5] = list(b"label")
    with open(path, "wb") as file:
        for part in (header, fields, rows):
            file.write(part.tobytes())
        file.seek(start + count * 64)
        file.write(table.tobytes())
    calls = Counter()
    sys.setprofile(lambda frame, event, argument: calls.update([event]))
    try:
        assert len(read_beton(path)) == count
    finally:
        sys.setprofile(None)
    assert 10 < calls.total() < 10_000
