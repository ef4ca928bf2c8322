import errno
import itertools
import os
import pickle
import zipfile

import pytest
import torch
from support.small_runs import Code

from ffssl.errors import UserError
from ffssl.run_folder import checkpoint


def state(epoch):
    return {"epoch": epoch, "names": ["a", "b"], "model": {"w": torch.arange(300_000.0) + epoch}}


def assert_holds(folder, epoch):
    loaded = checkpoint.load(folder)
    assert loaded["epoch"] == epoch and loaded["names"] == ["a", "b"]
    assert torch.equal(loaded["model"]["w"], state(epoch)["model"]["w"])


def test_what_was_saved_last_is_loaded(tmp_path):
    assert checkpoint.load(tmp_path) is None
    for epoch in range(2):
        checkpoint.save(tmp_path, state(epoch))
        assert_holds(tmp_path, epoch)
    assert os.listdir(tmp_path) == [checkpoint.NAME]


def test_a_full_disk_is_reported_and_leaves_the_checkpoint_before(tmp_path):
    checkpoint.save(tmp_path, state(1))
    (tmp_path / f".{checkpoint.NAME}.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match="checkpoint.pt.*No space left"):
        checkpoint.save(tmp_path, state(2))
    assert_holds(tmp_path, 1)
    assert os.listdir(tmp_path) == [checkpoint.NAME]
    checkpoint.save(tmp_path, state(3))
    assert_holds(tmp_path, 3)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_process_stopped_while_it_saves_leaves_the_checkpoint_before(tmp_path, monkeypatch, call):
    checkpoint.save(tmp_path, state(1))

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, call, stopped)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, state(2))
    assert_holds(tmp_path, 1)
    checkpoint.save(tmp_path, state(3))  # over the partial file that may be left
    assert_holds(tmp_path, 3)


def test_a_checkpoint_cannot_run_code(tmp_path):
    trap = tmp_path / "ran"
    torch.save({"epoch": Code(trap)}, tmp_path / checkpoint.NAME)
    with pytest.raises(UserError, match="checkpoint.pt"):
        checkpoint.load(tmp_path)
    assert not trap.exists()
    torch.load(tmp_path / checkpoint.NAME, weights_only=False)
    assert trap.exists()  # the trap works


def test_the_last_few_are_kept_by_age(tmp_path):
    for epoch in range(5):
        checkpoint.save(tmp_path, state(epoch), keep=3)
    assert [
        checkpoint.read(tmp_path / name)["epoch"]
        for name in ("checkpoint.pt", "checkpoint.1.pt", "checkpoint.2.pt")
    ] == [4, 3, 2]
    assert len(os.listdir(tmp_path)) == 3
    checkpoint.save(tmp_path, state(5), keep=1)
    assert os.listdir(tmp_path) == [checkpoint.NAME]


def test_without_hard_links_the_one_before_is_kept_too(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    for epoch in range(3):
        checkpoint.save(tmp_path, state(epoch), keep=2)
    assert checkpoint.read(tmp_path / "checkpoint.1.pt")["epoch"] == 1
    assert_holds(tmp_path, 2)
    (tmp_path / checkpoint.NAME).unlink()  # as if killed between the two renames
    assert_holds(tmp_path, 1)


@pytest.mark.parametrize("renames", [0, 1])
def test_without_hard_links_a_stop_between_renames_leaves_the_one_before(
    tmp_path, monkeypatch, renames
):
    checkpoint.save(tmp_path, state(1), keep=2)
    replace, calls = os.replace, itertools.count()

    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    def stopped(*paths):
        if next(calls) == renames:
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refused)
        patch.setattr(os, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, state(2), keep=2)
    assert (tmp_path / checkpoint.NAME).exists() == (renames == 0)
    assert_holds(tmp_path, 1)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_is_not_taken_for_damage(tmp_path, monkeypatch, code):
    for epoch in range(2):
        checkpoint.save(tmp_path, state(epoch), keep=2)

    def fails(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "testzip", fails)
        with pytest.raises(
            UserError, match=f"checkpoint.pt: the checkpoint can't be read: {os.strerror(code)}"
        ):
            checkpoint.load(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.1.pt", "checkpoint.pt"]
    assert_holds(tmp_path, 1)


def test_who_may_not_mend_renames_nothing(tmp_path):
    for epoch in range(2):
        checkpoint.save(tmp_path, state(epoch), keep=2)
    (tmp_path / checkpoint.NAME).write_bytes(b"damaged")
    with pytest.raises(checkpoint.Damaged, match="checkpoint.pt: not a readable checkpoint"):
        checkpoint.load(tmp_path, mend=False)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.1.pt", "checkpoint.pt"]
    (tmp_path / checkpoint.NAME).unlink()
    assert checkpoint.load(tmp_path, mend=False)["epoch"] == 0
    assert os.listdir(tmp_path) == ["checkpoint.1.pt"]


@pytest.mark.parametrize("place", [0.01, 0.5, 0.99])
def test_a_changed_bit_is_noticed_and_the_one_before_takes_its_place(tmp_path, capsys, place):
    for epoch in range(3):
        checkpoint.save(tmp_path, state(epoch), keep=3)
    path = tmp_path / checkpoint.NAME
    data = bytearray(path.read_bytes())
    data[int(place * 1_200_000)] ^= 4
    path.write_bytes(data)
    assert_holds(tmp_path, 1)
    told = capsys.readouterr().err
    assert (
        told.startswith(f"warning: {path}: not a readable checkpoint")
        and "checkpoint.1.pt, takes its place" in told
    )
    assert (tmp_path / "checkpoint.pt.damaged").read_bytes() == data
    checkpoint.save(tmp_path, state(3), keep=3)
    assert checkpoint.read(tmp_path / "checkpoint.1.pt")["epoch"] == 1


def test_where_all_are_damaged_nothing_is_moved(tmp_path):
    for epoch in range(2):
        checkpoint.save(tmp_path, state(epoch), keep=2)
    for name in ("checkpoint.pt", "checkpoint.1.pt"):
        (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(UserError, match="checkpoint.pt: not a readable checkpoint .*delete it"):
        checkpoint.load(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.1.pt", "checkpoint.pt"]


@pytest.mark.parametrize("damage", ["cut short", "empty", "text", "pickle", "bytes changed"])
def test_a_damaged_checkpoint_is_named_with_what_to_do(tmp_path, damage):
    checkpoint.save(tmp_path, state(1))
    path = tmp_path / checkpoint.NAME
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut short": whole[: len(whole) // 2],
            "empty": b"",
            "text": b"not a checkpoint",
            "pickle": pickle.dumps(Code(tmp_path / "ran"), 2),
            "bytes changed": whole[:100] + bytes(200) + whole[300:],
        }[damage]
    )
    with pytest.raises(UserError, match="checkpoint.pt: not a readable checkpoint .*delete it"):
        checkpoint.load(tmp_path)
