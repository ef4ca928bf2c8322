import fcntl
import json
import os

import pytest

from ffssl.errors import UserError
from ffssl.files import exclusive_folder, natural_order, replacing, write_json


def test_a_file_has_the_old_content_until_the_new_is_whole(tmp_path):
    path = tmp_path / "a.json"
    for before, after in ((None, [1]), ([1], {"b": 2})):
        with replacing(path) as partial:
            partial.write_text(json.dumps(after))
            assert (json.loads(path.read_text()) if path.exists() else None) == before
        assert json.loads(path.read_text()) == after and os.listdir(tmp_path) == ["a.json"]
    write_json(path, [3])
    assert json.loads(path.read_text()) == [3] and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("begun", [False, True])
def test_what_was_begun_goes_when_the_block_raises(tmp_path, exception, begun):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(exception), replacing(path) as partial:
        if begun:
            partial.write_text("half")
        raise exception
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_a_file_and_then_its_name_are_on_the_disk_before_the_old_one_goes(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(
            os,
            name,
            lambda *words, name=name, call=getattr(os, name): (calls.append(name), call(*words)),
        )
    write_json(tmp_path / "a.json", [1])
    assert calls == ["fsync", "replace", "fsync"] and json.loads(
        (tmp_path / "a.json").read_text()
    ) == [1]


def test_a_folder_is_one_processs_at_a_time(tmp_path):
    with (
        exclusive_folder(tmp_path, "run", "--run.folder"),
        pytest.raises(UserError, match=f"--run.folder: a run is under way in {tmp_path} already"),
        exclusive_folder(tmp_path, "run", "--run.folder"),
    ):
        pass
    with exclusive_folder(tmp_path, "run", "--run.folder"):
        pass
    with (
        pytest.raises(UserError, match="--run.folder: .*missing can't be written to"),
        exclusive_folder(tmp_path / "missing", "run", "--run.folder"),
    ):
        pass


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
    def refused(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refused)
    with exclusive_folder(tmp_path, "run", "--run.folder"):
        assert (
            f"warning: {tmp_path}: no lock can be had (Function not implemented)"
            in capsys.readouterr().err
        )


def test_natural_order():
    assert sorted(["a10", "a9", "b1", "a-2", "1", "a"], key=natural_order) == [
        "1",
        "a",
        "a9",
        "a10",
        "a-2",
        "b1",
    ]
