import os
import pickle

import pytest
import torch
from small_runs import Code

from ffssl import checkpoint
from ffssl.errors import UserError


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


@pytest.mark.parametrize("damage", ["cut short", "empty", "text", "pickle", "bytes changed"])
def test_a_damaged_checkpoint_is_named_with_what_to_do(tmp_path, damage):
    checkpoint.save(tmp_path, state(1))
    path = tmp_path / checkpoint.NAME
    whole = path.read_bytes()
    path.write_bytes({
        "cut short": whole[: len(whole) // 2], "empty": b"", "text": b"not a checkpoint", "pickle": pickle.dumps(Code(tmp_path / "ran"), 2),
        "bytes changed": whole[:100] + bytes(200) + whole[300:],
    }[damage])  # fmt: skip
    with pytest.raises(UserError, match="checkpoint.pt: not a readable checkpoint .*delete it"):
        checkpoint.load(tmp_path)
