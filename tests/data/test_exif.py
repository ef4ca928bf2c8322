"""Exif's orientation: blocks laid out by hand."""

import struct

import pytest

from ffssl.data.convert.exif import PREFIX, orientation

TYPES = {
    "BYTE": (1, "B"),
    "SHORT": (3, "H"),
    "LONG": (4, "I"),
    "SBYTE": (6, "b"),
    "SSHORT": (8, "h"),
    "SLONG": (9, "i"),
}


def block(value, kind="SHORT", order="<", count=1, before=b"", padding=0):
    """A TIFF header, whose one directory holds a maker and an orientation; `before`: what lies
    between header and directory."""
    number, letter = TYPES[kind]
    entries = struct.pack(order + "HHI4s", 0x010F, 2, 4, b"abc\0")
    entries += struct.pack(
        order + "HHI4s", 0x0112, number, count, struct.pack(order + letter, value).ljust(4, b"\0")
    )
    header = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(before))
    return header + before + struct.pack(order + "H", 2) + entries + bytes(4 + padding)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", TYPES)
def test_every_kind_of_integer(kind, order):
    for value in range(1, 9):
        assert orientation([PREFIX + block(value, kind, order)]) == value


@pytest.mark.parametrize("order", "<>")
def test_the_first_block_that_says_so_wins(order):
    six, one, eight = (PREFIX + block(value, order=order) for value in (6, 1, 8))
    assert orientation([six, one]) == orientation([six, eight]) == 6
    assert orientation([one, six]) == 1
    for nothing in (
        b"",
        PREFIX,
        PREFIX + b"rubbish rubbish",
        PREFIX + block(0),
        PREFIX + block(9),
        PREFIX + block(6, count=2),
    ):
        assert orientation([nothing, eight]) == orientation([eight, nothing]) == 8


@pytest.mark.parametrize("cut", [2, 9, 5000, 5020])
def test_a_block_may_go_on_in_the_next(cut):
    whole = block(6, before=bytes(5000), padding=5000)
    assert orientation([PREFIX + whole[:cut], PREFIX + whole[cut:]]) == 6
    assert orientation([PREFIX + whole[:cut]]) == 1


def test_prefixes_may_be_missing_or_repeated():
    assert orientation([block(6)]) == orientation([PREFIX + PREFIX + block(6)]) == 6


def test_what_is_damaged_counts_as_upright():
    sound = block(6)
    lengths = range(sound.index(b"\x12\x01") + 10)
    for damaged in [sound[:length] for length in lengths] + [
        b"XX" + sound[2:],
        sound[:4] + b"\xff\xff\xff\x7f" + sound[8:],
    ]:
        assert orientation([PREFIX + damaged]) == 1
    assert orientation([]) == 1
