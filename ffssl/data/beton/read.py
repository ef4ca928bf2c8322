"""Read beton files, FFCV's format (version 2), and check all that they claim.

Layout of a file:

    header             version, number of fields, page size, number of samples, table's place
    field descriptors  one a field: type and name
    metadata rows      one a sample: of an image its mode, width, height and place
    images' bytes      JPEG files or raw pixels
    allocation table   (sample, pointer, size) of each stored piece, up to the end of the file

FFCV reads the data in pages of `page_size` bytes, counted from the start of the file. So no sample
may cross a page boundary.

The types are those of ffcv/types.py and ffcv/fields. They are declared again here because importing
ffcv takes seconds.
"""

import dataclasses
import hashlib
import os
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ffssl.data.turbojpeg import MOST_PIXELS_PER_BYTE
from ffssl.errors import UserError

VERSION = 2
HEADER_TYPE = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD_TYPE = np.dtype(
    [("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True
)
ALLOCATION_TYPE = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE_TYPE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
LABEL_TYPE = np.dtype("<i8")
MODE_JPEG, MODE_RAW = 0, 1

FLOAT_FIELD, INT_FIELD, IMAGE_FIELD, BYTES_FIELD, ARRAY_FIELD, JSON_FIELD, TENSOR_FIELD = range(7)
# Their names in messages, in the same order.
FIELD_KINDS = ("float", "int", "image", "bytes", "array", "JSON", "tensor")
LABEL = "label"  # what the converter calls its labels
UNLABELLED = -1  # the label of an image that has none
_POINTER_AND_SIZE = np.dtype([("ptr", "<u8"), ("size", "<u8")])
FIELD_METADATA = {
    FLOAT_FIELD: np.dtype("<f8"),
    INT_FIELD: LABEL_TYPE,
    IMAGE_FIELD: IMAGE_TYPE,
    BYTES_FIELD: _POINTER_AND_SIZE,
    ARRAY_FIELD: np.dtype("<u8"),
    JSON_FIELD: _POINTER_AND_SIZE,
    TENSOR_FIELD: np.dtype("<u8"),
}
MIN_PAGE_SIZE = 1 << 21
MAX_PAGE_SIZE = 1 << 31  # the header holds it in 32 bits


def metadata_type(field_types: list[int]) -> np.dtype:
    """Return the dtype of one sample's metadata row.

    Its fields are f0, f1, ... in order, aligned as ffcv aligns them.
    """
    return np.dtype(
        [(f"f{i}", FIELD_METADATA[type_id]) for i, type_id in enumerate(field_types)], align=True
    )


@dataclass(frozen=True)
class BetonFile:
    """One of the files of a `Beton`.

    size: in bytes. start: address of the file's first byte, as pointers count. first: index of its
    first sample.
    """

    path: Path
    size: int
    start: int = 0
    first: int = 0


@dataclass(frozen=True, eq=False)
class Beton:
    """The tables of a beton file: all that it holds but the images' bytes.

    Those of several files are joined as if the files lay one behind the other, see `read_betons`.
    All arrays are read-only.

    images: IMAGE_TYPE (n,): mode (MODE_JPEG or MODE_RAW), width, height, data_ptr.
    image_sizes: uint64 (n,), the bytes of each image.
    labels: int64 (n,). None if no field holds labels, or if several could be meant.
    pointers, sizes: uint64, the allocation table sorted by pointer, other fields' data included.
    page_size: in bytes.
    fields: name and type of each field.
    label_field: the field that holds `labels`, or None.
    named_labels: int64 (n,), the values of the int field "label", whichever field was asked for;
        None if there is no such field.
    """

    files: tuple[BetonFile, ...]
    images: np.ndarray
    image_sizes: np.ndarray
    labels: np.ndarray | None
    pointers: np.ndarray
    sizes: np.ndarray
    page_size: int
    fields: list[tuple[str, int]]
    label_field: str | None
    named_labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def name(self) -> str:
        """The file, for a message; of several, the first and how many more."""
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{self.files[0].path}{more}"

    @property
    def may_have_labels(self) -> bool:
        """Whether there is a field of numbers."""
        return any(kind in (FLOAT_FIELD, INT_FIELD) for _, kind in self.fields)

    def place(self, sample: int) -> tuple[Path, int]:
        """Return the file that holds a sample, and the sample's index in that file."""
        file = self.files[bisect_right(self.files, sample, key=lambda file: file.first) - 1]
        return file.path, sample - file.first

    def protect(self) -> None:
        """Make the arrays read-only."""
        for field in dataclasses.fields(self):
            if isinstance(array := getattr(self, field.name), np.ndarray):
                array.setflags(write=False)

    def digest(self) -> str:
        """Return 16 hexadecimal digits that tell these samples from others.

        They are computed from the tables, without reading the images' bytes.
        """
        digest = hashlib.sha256()
        for array in (self.images, self.named_labels, self.pointers, self.sizes):
            digest.update(b"" if array is None else array.tobytes())
        return digest.hexdigest()[:16]


def read_beton(path: str | os.PathLike, label_field: str | None = None) -> Beton:
    """Read the tables of a beton file; check them against each other and the file's size.

    The images' bytes are not read.

    label_field: the field that holds the labels: integers, or floats that are whole numbers. By
        default it is "label" or, if no field has that name, the only such field.

    Raises UserError, which names the file, what is wrong and what to do.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder, not a beton file; name the file inside it")
        with open(path, "rb") as file:
            return _read(path, file, os.fstat(file.fileno()).st_size, label_field)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; write it with ffssl convert") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; check the file and its permissions"
        ) from error


def _read(path: Path, file, file_size: int, label_field: str | None) -> Beton:
    header = _read_header(path, file, file_size)
    fields = _read_fields(path, file, file_size, int(header["num_fields"]))
    rows_type = metadata_type([type_id for _, type_id in fields])

    num_samples, table_ptr = int(header["num_samples"]), int(header["alloc_table_ptr"])
    rows_end = file.tell() + num_samples * rows_type.itemsize
    if num_samples == 0:
        raise UserError(f"{path}: holds no samples; write it again")
    if table_ptr >= file_size or (file_size - table_ptr) % ALLOCATION_TYPE.itemsize:
        raise _damaged(path, "its allocation table is cut short")
    if not rows_end <= table_ptr:
        raise _damaged(path, f"it claims {num_samples} samples, more than its size allows")

    rows = np.fromfile(file, rows_type, num_samples)
    file.seek(table_ptr)
    table = np.fromfile(file, ALLOCATION_TYPE, (file_size - table_ptr) // ALLOCATION_TYPE.itemsize)
    pointers, sizes = _sorted_allocations(path, table, rows_end, table_ptr)

    # Contiguous copies: the rows interleave the fields, and every later look-up would stride over
    # all of them.
    images = np.ascontiguousarray(rows[_image_column(path, fields)])
    label_field, labels = _labels(path, fields, rows, label_field)
    named_labels = None
    if (LABEL, INT_FIELD) in fields:
        named_labels = (
            labels
            if label_field == LABEL
            else _whole_numbers(fields, rows, fields.index((LABEL, INT_FIELD)))
        )
    page_size = int(header["page_size"])
    image_sizes = _check_images(path, images, pointers, sizes, page_size)

    beton = Beton(
        (BetonFile(path, file_size),),
        images,
        image_sizes,
        labels,
        pointers,
        sizes,
        page_size,
        fields,
        label_field,
        named_labels,
    )
    beton.protect()
    return beton


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: damaged: {what}; write or copy it again")


def _read_header(path: Path, file, file_size: int) -> np.void:
    if file_size < HEADER_TYPE.itemsize:
        what = (
            "is empty"
            if file_size == 0
            else f"is {file_size} bytes long, too short for a beton file"
        )
        raise UserError(f"{path}: {what}; write or copy it again")
    header = np.fromfile(file, HEADER_TYPE, 1)[0]
    if header["version"] != VERSION:
        raise UserError(
            f"{path}: not a beton file of version {VERSION} (found {header['version']}); "
            "write one with ffssl convert or ffcv 1.0"
        )
    page_size = int(header["page_size"])
    if page_size < MIN_PAGE_SIZE or page_size & (page_size - 1):
        raise _damaged(
            path, f"its page size, {page_size}, is not a power of two of at least {MIN_PAGE_SIZE}"
        )
    return header


def _read_fields(path: Path, file, file_size: int, num_fields: int) -> list[tuple[str, int]]:
    if num_fields == 0 or HEADER_TYPE.itemsize + num_fields * FIELD_TYPE.itemsize > file_size:
        raise _damaged(path, f"it claims {num_fields} fields")
    fields = []
    for descriptor in np.fromfile(file, FIELD_TYPE, num_fields):
        name_bytes = descriptor["name"].tobytes().split(b"\0")[0]
        # Escaped, so that it can be printed in a message.
        name = name_bytes.decode("latin-1").encode("unicode_escape").decode("ascii")
        type_id = int(descriptor["type_id"])
        if type_id not in FIELD_METADATA:
            raise UserError(
                f"{path}: field '{name}' has a custom type ({type_id}) whose layout is unknown; "
                "write the file with ffcv's own fields only"
            )
        fields.append((name, type_id))
    return fields


def _image_column(path: Path, fields: list[tuple[str, int]]) -> str:
    candidates = [i for i, (_, type_id) in enumerate(fields) if type_id == IMAGE_FIELD]
    named = [i for i in candidates if fields[i][0] == "image"]
    if len(named) == 1:
        return f"f{named[0]}"
    if len(candidates) == 1:
        return f"f{candidates[0]}"
    names = ", ".join(f"'{name}'" for name, _ in fields)
    which = (
        "no RGB image field"
        if not candidates
        else "several RGB image fields and not one named 'image'"
    )
    raise UserError(
        f"{path}: has {which} (fields: {names}); write it with one RGBImageField named 'image'"
    )


def describe_fields(fields: list[tuple[str, int]]) -> str:
    """Describe the fields besides the image, for a message."""
    others = [
        f"'{name}' ({FIELD_KINDS[type_id]})" for name, type_id in fields if type_id != IMAGE_FIELD
    ]
    return ", ".join(others) or "none besides the image"


def _labels(
    path: Path, fields: list[tuple[str, int]], rows: np.ndarray, wanted: str | None
) -> tuple[str | None, np.ndarray | None]:
    """Return the name of the field that holds the labels, and the labels, int64 (n,).

    Return None twice if no field does, or if it is not clear which.
    """
    if wanted is not None:
        columns = [i for i, (name, _) in enumerate(fields) if name == wanted]
        labels = _whole_numbers(fields, rows, columns[0]) if columns else None
        if labels is None:
            what = "holds no whole numbers" if columns else "is not in it"
            raise UserError(
                f"{path}: the field of labels, '{wanted}', {what}; its fields: "
                f"{describe_fields(fields)}"
            )
        return wanted, labels
    named = [i for i, (name, _) in enumerate(fields) if name == LABEL]
    columns = ((i, _whole_numbers(fields, rows, i)) for i in named or range(len(fields)))
    able = [(fields[i][0], labels) for i, labels in columns if labels is not None]
    return able[0] if len(able) == 1 else (None, None)


def _whole_numbers(
    fields: list[tuple[str, int]], rows: np.ndarray, column: int
) -> np.ndarray | None:
    """Return a field as int64 (n,), or None if it holds no whole numbers."""
    kind, values = fields[column][1], rows[f"f{column}"]
    if kind == INT_FIELD:
        return np.ascontiguousarray(values)
    if (
        kind == FLOAT_FIELD
        and (np.isfinite(values) & (values == np.rint(values)) & (np.abs(values) < 2.0**53)).all()
    ):
        return values.astype(np.int64)
    return None


def _sorted_allocations(
    path: Path, table: np.ndarray, start: int, end: int
) -> tuple[np.ndarray, np.ndarray]:
    # ffcv gives an empty BytesField an entry of no bytes, at the address of the next piece. It
    # would hide that piece's entry.
    table = table[table["size"] > 0]
    pointers, sizes = table["ptr"].copy(), table["size"].copy()
    if np.any(pointers[1:] < pointers[:-1]):
        order = np.argsort(pointers, kind="stable")
        pointers, sizes = pointers[order], sizes[order]
    # Compared without adding pointer and size: damaged ones could wrap around.
    if np.any(pointers < start) or np.any(pointers > end) or np.any(sizes > end - pointers):
        raise _damaged(path, "its allocation table points outside the data")
    if np.any(sizes[:-1] > np.diff(pointers)):
        raise _damaged(path, "its allocation table has overlapping entries")
    return pointers, sizes


def _check_images(
    path: Path, images: np.ndarray, pointers: np.ndarray, sizes: np.ndarray, page_size: int
) -> np.ndarray:
    """Check all metadata against the allocation table; return each image's size in bytes."""

    def refuse_any(bad: np.ndarray, what: str) -> None:
        if bad.any():
            raise _damaged(
                path, f"sample {int(bad.argmax())} {what} ({int(bad.sum())} such of {len(images)})"
            )

    data_ptr, width, height = images["data_ptr"], images["width"], images["height"]
    refuse_any(images["mode"] > MODE_RAW, "is marked as neither JPEG nor raw")
    refuse_any((width == 0) | (height == 0), "has no width or no height")
    if len(pointers) == 0:
        raise _damaged(path, "its allocation table is empty")
    entry = np.minimum(np.searchsorted(pointers, data_ptr), len(pointers) - 1)
    refuse_any(
        pointers[entry] != data_ptr, "points to data that the allocation table does not list"
    )
    image_sizes = sizes[entry]
    pixels = height.astype(np.uint64) * width
    refuse_any(
        (images["mode"] == MODE_RAW) & (image_sizes != 3 * pixels),
        "is raw but not of 3 x width x height bytes",
    )
    # Unless checked, a damaged size would make the loader reserve memory for an image of that size.
    refuse_any(
        (images["mode"] == MODE_JPEG) & (pixels > MOST_PIXELS_PER_BYTE * image_sizes),
        "claims more pixels than its bytes can hold",
    )
    page_bits = np.uint64(page_size.bit_length() - 1)
    last_byte = data_ptr + image_sizes - np.uint64(1)
    refuse_any(data_ptr >> page_bits != last_byte >> page_bits, "crosses a page boundary")
    return image_sizes
