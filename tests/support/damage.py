"""Damage to JPEG and beton files, drawn at random, and memory whose ends can't be overstepped
unnoticed.
"""

import ctypes
import mmap

import numpy as np

from ffssl.data.beton.read import (
    ALLOCATION_TYPE,
    FIELD_TYPE,
    HEADER_TYPE,
    IMAGE_FIELD,
    INT_FIELD,
    metadata_type,
)

ROWS_TYPE = metadata_type([IMAGE_FIELD, INT_FIELD])
ROWS_START = HEADER_TYPE.itemsize + 2 * FIELD_TYPE.itemsize
_START_OF_SCAN = 0xDA
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


class Guarded:
    """Memory between two pages that may not be touched: the first byte read or written before or
    behind them ends the process.
    """

    def __init__(self, capacity: int):
        size = -(-capacity // mmap.PAGESIZE) * mmap.PAGESIZE
        self._pages = np.frombuffer(mmap.mmap(-1, size + 2 * mmap.PAGESIZE), np.uint8)
        self._room = self._pages[mmap.PAGESIZE : -mmap.PAGESIZE]
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        for place in (0, mmap.PAGESIZE + size):
            if protect(
                ctypes.c_void_p(self._pages.ctypes.data + place), ctypes.c_size_t(mmap.PAGESIZE), 0
            ):
                raise OSError(ctypes.get_errno(), "mprotect")

    def array(self, size: int, at_end: bool) -> np.ndarray:
        """uint8 (size,), with a forbidden page right behind it, or right before it."""
        if size > len(self._room):
            raise ValueError(f"{size} bytes asked for, {len(self._room)} are there")
        return self._room[len(self._room) - size :] if at_end else self._room[:size]


# JPEG files: each kind of damage takes and returns a bytearray


def damage_jpeg(random: np.random.Generator, sound: bytes, other: bytes) -> bytes:
    """`sound` with one to three kinds of damage, some of which take pieces of `other`."""
    data = bytearray(sound)
    for _ in range(random.integers(1, 4)):
        if len(data) > 4:
            data = _JPEG_DAMAGES[random.integers(len(_JPEG_DAMAGES))](random, data, other)
    return bytes(data)


def _flip_bits(random, data, _):
    for place in random.integers(0, len(data), random.integers(1, 9)):
        data[place] ^= 1 << random.integers(8)
    return data


def _overwrite(random, data, _):
    start, length = random.integers(len(data)), int(random.geometric(0.03))
    fill = (bytes(length), b"\xff" * length, random.bytes(length))[random.integers(3)]
    data[start : start + length] = fill[: len(data) - start]
    return data


def _truncate(random, data, _):
    return data[: random.integers(1, len(data))]


def _extend(random, data, other):
    tail = (bytes(500), random.bytes(500), other)[random.integers(3)]
    # With and without its end-of-image marker before it.
    return data + tail if random.integers(2) else data[:-2] + tail


def _splice(random, data, other):
    return data[: random.integers(2, len(data))] + other[random.integers(2, len(other)) :]


def _swap_segments(random, data, _):
    found = segments(data)
    if len(found) < 2:
        return data
    (a, b), (c, d) = (found[i] for i in sorted(random.choice(len(found), 2, replace=False)))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _drop_segment(random, data, _):
    a, b = _one_of(random, segments(data))
    return data[:a] + data[b:]


def _repeat_segment(random, data, _):
    a, b = _one_of(random, segments(data))
    return data[:b] + data[a:b] * int(random.integers(1, 20)) + data[b:]


def _change_segment(random, data, _):
    """A marker, a length or what follows it: tables, sizes, sampling factors, references to
    tables.
    """
    a, b = _one_of(random, segments(data))
    if b > a:
        place = min(a + 1 + random.integers(min(b - a, 24)), len(data) - 1)
        data[place] = random.choice(
            [0, 1, 2, 3, 0x11, 0x22, 0x41, 0xC4, 0xDB, 0xFF, random.integers(256)]
        )
    return data


def _resize_frame(random, data, _):
    place = frame_size_at(data)
    if place is not None:
        start = place + 2 * random.integers(2)
        old = int.from_bytes(data[start : start + 2], "big")
        data[start : start + 2] = damaged_number(random, old, 16).to_bytes(2, "big")
    return data


_JPEG_DAMAGES = (
    _flip_bits,
    _overwrite,
    _truncate,
    _extend,
    _splice,
    _swap_segments,
    _drop_segment,
    _repeat_segment,
    _change_segment,
    _resize_frame,
)


def segments(data: bytes) -> list[tuple[int, int]]:
    """Where the marker segments up to the first scan's begin and end, as far as they can be
    followed.
    """
    found, position = [], 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        found.append((position, min(end, len(data))))
        if data[position + 1] == _START_OF_SCAN:
            break
        position = end
    return found


def without_segments(data: bytes, marker: int) -> bytes:
    """The file without those of its marker segments that begin with `marker`."""
    for a, b in reversed(segments(data)):
        data = data[:a] + data[b:] if data[a + 1] == marker else data
    return data


def segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload


def behind_start(data: bytes, *inserted: bytes) -> bytes:
    """The file with something more behind its start-of-image marker."""
    return data[:2] + b"".join(inserted) + data[2:]


def frame_size_at(data: bytes) -> int | None:
    """Where height and width (16 bits each) stand."""
    return next((a + 5 for a, b in segments(data) if data[a + 1] in _FRAMES and b - a >= 9), None)


def _one_of(random, found):
    return found[random.integers(len(found))] if found else (0, 0)


def damaged_number(
    random: np.random.Generator, old: int, bits: int, places: tuple[int, ...] = ()
) -> int:
    """An unsigned number of so many bits in place of `old`: near it, at a limit, negative,
    anything, or one of `places`.
    """
    near = old + int(random.integers(-9, 10))
    anything = int.from_bytes(random.bytes(bits // 8), "big")
    choices = (
        0,
        1,
        -1,
        -old,
        1 << (bits - 1),
        near,
        2 * old,
        old // 2,
        anything,
        anything >> int(random.integers(bits)),
        *places,
    )
    return choices[random.integers(len(choices))] % (1 << bits)


# Beton files


class BetonParts:
    """A beton file with the fields image and label in memory, and its parts, which are views of
    it.
    """

    def __init__(self, whole: bytes):
        self.data = np.frombuffer(whole, np.uint8).copy()
        self.header = self.data[: HEADER_TYPE.itemsize].view(HEADER_TYPE)
        self.fields = self.data[HEADER_TYPE.itemsize : ROWS_START].view(FIELD_TYPE)
        samples, self.table_at = (
            int(self.header["num_samples"][0]),
            int(self.header["alloc_table_ptr"][0]),
        )
        self.rows = self.data[ROWS_START : ROWS_START + samples * ROWS_TYPE.itemsize].view(
            ROWS_TYPE
        )
        self.table = self.data[self.table_at :].view(ALLOCATION_TYPE)

    @property
    def places(self) -> tuple[int, ...]:
        """Positions that a pointer may be mistaken for."""
        return (
            len(self.data),
            len(self.data) - 1,
            self.table_at,
            self.table_at - 1,
            *self.table["ptr"].tolist(),
            *self.table["size"].tolist(),
        )


def compact(whole: bytes) -> bytes:
    """The same file without the empty space between rows and images, so that it can be written and
    read thousands of times.
    """
    parts = BetonParts(whole)
    begin, rows_end = int(parts.table["ptr"].min()), ROWS_START + parts.rows.nbytes
    for numbers in (
        parts.table["ptr"],
        parts.rows["f0"]["data_ptr"],
        parts.header["alloc_table_ptr"],
    ):
        numbers -= np.uint64(begin - rows_end)
    return parts.data[:rows_end].tobytes() + parts.data[begin:].tobytes()


def damage_beton(random: np.random.Generator, sound: bytes, other_jpeg: bytes) -> bytes:
    """`sound` with one to three kinds of damage; at times cut off, or with something behind it."""
    parts = BetonParts(sound)
    for _ in range(random.integers(1, 4)):
        _BETON_DAMAGES[random.integers(len(_BETON_DAMAGES))](random, parts, other_jpeg)
    data = parts.data.tobytes()
    cut = random.integers(20)
    if cut == 0:
        return data[: random.integers(len(data))]
    return data + random.bytes(24 * random.integers(1, 4)) if cut == 1 else data


def _damage_number_of(random, parts, rows):
    """One number of a structured array."""
    row = random.integers(len(rows))
    while rows.dtype.names:
        rows = rows[rows.dtype.names[random.integers(len(rows.dtype.names))]]
    if rows.ndim == 1:
        bits = 8 * rows.dtype.itemsize
        rows.view(f"<u{rows.dtype.itemsize}")[row] = damaged_number(
            random, int(rows[row]) % (1 << bits), bits, parts.places
        )
    else:
        rows[row, random.integers(rows.shape[1])] = random.integers(256)


def _damage_header(random, parts, _):
    _damage_number_of(random, parts, parts.header)


def _damage_fields(random, parts, _):
    parts.fields[random.integers(2)]["type_id"] = (
        random.integers(0, 9) if random.integers(2) else 255
    )
    _damage_number_of(random, parts, parts.fields)


def _damage_rows(random, parts, _):
    _damage_number_of(random, parts, parts.rows)


def _damage_table(random, parts, _):
    _damage_number_of(random, parts, parts.table)


def _move_sample(random, parts, _):
    """A sample's pointer, in row and table alike."""
    i = random.integers(len(parts.table))
    moved = damaged_number(random, int(parts.table["ptr"][i]), 64, parts.places)
    parts.rows["f0"]["data_ptr"][parts.rows["f0"]["data_ptr"] == parts.table["ptr"][i]] = moved
    parts.table["ptr"][i] = moved


def _resize_sample(random, parts, _):
    """A sample's size in pixels, in its row and in its JPEG alike."""
    i = random.integers(len(parts.rows))
    stored = _stored(parts, i)
    place = frame_size_at(stored.tobytes())
    height, width = (
        damaged_number(random, int(parts.rows["f0"][side][i]), 16) for side in ("height", "width")
    )
    parts.rows["f0"]["height"][i], parts.rows["f0"]["width"][i] = height, width
    if place is not None:
        stored[place : place + 4] = list(height.to_bytes(2, "big") + width.to_bytes(2, "big"))


def _shorten_sample(random, parts, _):
    i = random.integers(len(parts.table))
    parts.table["size"][i] = random.integers(
        1, max(1, int(min(parts.table["size"][i], 1 << 20))) + 1
    )


def _damage_stored_jpeg(random, parts, other):
    stored = _stored(parts, random.integers(len(parts.rows)))
    if len(stored) > 4:
        damaged = np.frombuffer(
            damage_jpeg(random, stored.tobytes(), other)[: len(stored)], np.uint8
        )
        stored[: len(damaged)] = damaged


def _flip_bits_of_tables(random, parts, _):
    tables = np.r_[
        0:24, ROWS_START : ROWS_START + parts.rows.nbytes, parts.table_at : len(parts.data)
    ]
    for place in random.choice(tables, random.integers(1, 5)):
        parts.data[place] ^= 1 << random.integers(8)


_BETON_DAMAGES = (
    _damage_header,
    _damage_fields,
    _damage_rows,
    _damage_table,
    _move_sample,
    _resize_sample,
    _shorten_sample,
    _damage_stored_jpeg,
    _damage_stored_jpeg,
    _damage_stored_jpeg,
    _flip_bits_of_tables,
)


def _stored(parts, i):
    """The bytes of a sample, as a view; empty where earlier damage has led them out of the file."""
    begin = int(parts.rows["f0"]["data_ptr"][i])
    size = parts.table["size"][parts.table["ptr"] == begin]
    return (
        parts.data[begin : begin + int(size[0])]
        if len(size) and begin + int(size[0]) <= parts.table_at
        else parts.data[:0]
    )
