import json
import os

import pytest

from ffssl.files import replacing, write_json


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
