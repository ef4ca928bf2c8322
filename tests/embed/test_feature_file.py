import contextlib
import resource

import numpy as np
import pytest

from ffssl.embed.feature_file import FeatureFile
from ffssl.errors import UserError

WIDTH = 1000


def opened(path, **identity):
    return FeatureFile(path, {"weights": "w"} | identity, width=WIDTH, images=9)


def batches():
    features = np.random.default_rng(0).random((9, WIDTH), np.float32)
    names = [f"{i},\n\udce9.jpg" for i in range(9)]  # as names of files may be
    for i in range(0, 9, 3):
        yield features[i : i + 3], names[i : i + 3], np.arange(i, i + 3)


def killed(file):
    """Leave a file as a process that is killed does."""
    file._close()


def assert_whole(path):
    features = np.concatenate([rows for rows, _, _ in batches()])
    assert np.array_equal(np.load(path), features)
    lines = path.with_suffix(".csv").read_bytes()
    assert lines.startswith(b"image,label\n") and lines.count(b"\xe9.jpg") == 9
    assert lines.endswith(b'"8,\n\xe9.jpg",8\n')


def test_what_a_killed_process_had_not_saved_is_written_again(tmp_path):
    first, second, third = batches()
    file = opened(tmp_path / "a.npy")
    file.add(*first)
    file.save()
    file.add(*second)
    killed(file)
    with opened(tmp_path / "a.npy") as file:
        assert (file.done, file.rows) == (3, 3)
        file.add(*second)
        file.add(*third)
        file.finish({})
    assert_whole(tmp_path / "a.npy")


def test_a_file_that_lost_what_was_saved_is_begun_anew(tmp_path):
    with opened(tmp_path / "a.npy") as file:
        file.add(*next(batches()))
    (tmp_path / ".a.npy.features").write_bytes(b"")
    with opened(tmp_path / "a.npy") as file:
        assert file.done == file.rows == 0
        for batch in batches():
            file.add(*batch)
        file.finish({})
    assert_whole(tmp_path / "a.npy")


def test_a_full_disk_costs_a_line_and_only_the_batch_under_way(tmp_path):
    first, second, third = batches()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    told = "--output: .*a.npy can't be written: File too large; the same command continues with"
    with pytest.raises(UserError, match=told), opened(tmp_path / "a.npy") as file:
        file.add(*first)
        with contextlib.ExitStack() as stack:
            stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
            file.add(*second)
    with opened(tmp_path / "a.npy") as file:
        assert file.done == 3
        file.add(*second)
        file.add(*third)
        file.finish({})
    assert_whole(tmp_path / "a.npy")


def test_images_left_out_count_as_done_and_not_as_rows(tmp_path):
    first, second, _ = batches()
    with opened(tmp_path / "a.npy") as file:
        file.add(*first)
        file.add(*(part[:2] for part in second), [("x.jpg", "is empty")])
    with opened(tmp_path / "a.npy") as file:
        assert (file.done, file.rows, file.skipped) == (6, 5, [("x.jpg", "is empty")])
        file.finish({})
    assert np.load(tmp_path / "a.npy").shape == (5, WIDTH)


def test_two_processes_do_not_write_one_file_and_other_features_do_not_mix(tmp_path):
    with opened(tmp_path / "a.npy") as file:
        with pytest.raises(UserError, match="another process is writing .*a.npy"):
            opened(tmp_path / "a.npy")
        file.add(*next(batches()))
    with pytest.raises(UserError, match="a.npy was begun with other resolution and weights"):
        opened(tmp_path / "a.npy", weights="v", resolution=32)
    with opened(tmp_path / "a.npy") as file:
        assert file.done == 3
