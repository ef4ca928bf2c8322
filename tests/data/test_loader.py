import threading
import time

import numpy as np
import pytest
import torch

from ffssl.data.beton import read_beton
from ffssl.data.loader import ViewLoader
from ffssl.data.order import epoch_order
from ffssl.errors import UserError
from sample_images import write_beton


def open_loader(path, **options):
    return ViewLoader(path, **{"batch_size": 4, "views": 2, "resolution": 24, "seed": 3} | options)


def epoch_of(loader, *settings):
    """An epoch's views, labels and indices, each concatenated."""
    loader.set_epoch(*settings)
    batches = [(views.clone(), labels, indices) for views, labels, indices in loader]
    return tuple(torch.cat(part) for part in zip(*batches))


def views_by_index(views, _, indices):
    return {int(i): view for i, view in zip(indices, views)}


def assert_same(a, b):
    for ours, theirs in zip(a, b, strict=True):
        assert torch.equal(ours, theirs)


# What is served


def test_views_do_not_depend_on_workers_batch_size_or_batches_ahead(beton):
    with open_loader(beton, workers=1, drop_last=False) as loader:
        expected = epoch_of(loader, 5, 24, 6.0)
    for options in ({"workers": 2}, {"workers": 4, "batches_ahead": 1}, {"batch_size": 7, "workers": 3}):
        with open_loader(beton, drop_last=False, **options) as loader:
            assert_same(epoch_of(loader, 5, 24, 6.0), expected)


def test_a_view_does_not_depend_on_rank_or_order(beton):
    with open_loader(beton, drop_last=False, shuffle=False) as loader:
        expected = views_by_index(*epoch_of(loader, 2))
    for rank in range(2):
        with open_loader(beton, drop_last=False, rank=rank, world_size=2) as loader:
            for index, views in views_by_index(*epoch_of(loader, 2)).items():
                assert torch.equal(views, expected[index])


def test_views_and_order_change_with_epoch_and_seed_and_come_back(beton):
    with open_loader(beton, drop_last=False) as loader, open_loader(beton, drop_last=False, seed=4) as other:
        first, second = epoch_of(loader, 0), epoch_of(loader, 1)
        assert_same(epoch_of(loader, 0), first)
        for views, _, indices in (second, epoch_of(other, 0)):
            assert not torch.equal(indices, first[2])
            mine, before = views_by_index(views, None, indices), views_by_index(*first)
            assert all((mine[i] != before[i]).any() for i in mine)


def test_labels_and_indices_are_those_of_the_views(beton):
    with open_loader(beton, drop_last=False) as loader:
        views, labels, indices = epoch_of(loader, 0)
    assert views.dtype == torch.uint8 and labels.dtype == indices.dtype == torch.int64
    assert torch.equal(labels, 10 * indices)


def test_every_sample_is_visited_once_and_drop_last_leaves_out_the_incomplete_batch(beton):
    with open_loader(beton, drop_last=False) as loader:
        sizes = [len(batch.indices) for batch in loader]
        assert sizes == [4] * 5 + [3] and len(loader) == 6
        assert sorted(epoch_of(loader, 1)[2].tolist()) == list(range(23))
    with open_loader(beton, drop_last=True) as loader:
        assert [len(batch.views) for batch in loader] == [4] * 5 and len(loader) == 5
        assert len(set(epoch_of(loader, 1)[2].tolist())) == 20


def test_only_the_samples_asked_for_are_visited(beton):
    with open_loader(beton, indices=[20, 3, 5], shuffle=False, drop_last=False) as loader:
        assert epoch_of(loader, 0)[2].tolist() == [20, 3, 5]


def test_resolution_may_fall_and_rise_beyond_the_first(beton):
    with open_loader(beton) as loader:
        for epoch, resolution in enumerate((24, 8, 40, 24)):
            assert epoch_of(loader, epoch, resolution)[0].shape == (20, 2, 3, resolution, resolution)


@pytest.mark.parametrize("samples, world_size", [(20, 4), (23, 4), (7, 3)])
def test_ranks_share_an_epoch_equally_without_overlap(samples, world_size):
    shares = [epoch_order(samples, seed=1, epoch=5, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {samples // world_size}
    visited = np.concatenate(shares)
    assert len(set(visited)) == len(visited) and set(visited) <= set(range(samples))


def test_over_the_epochs_every_rank_visits_every_sample():
    for rank in range(4):
        visited = {int(i) for epoch in range(60) for i in epoch_order(23, seed=1, epoch=epoch, rank=rank, world_size=4)}
        assert visited == set(range(23))


def test_orders_are_uniform():
    first = [epoch_order(5, seed=2, epoch=epoch)[0] for epoch in range(2000)]
    assert np.abs(np.bincount(first, minlength=5) - 400).max() < 4 * np.sqrt(2000 * 0.2 * 0.8)


# What goes wrong


@pytest.fixture
def damaged(images, tmp_path):
    """A file whose image 9 is a JPEG no more."""
    path = write_beton(tmp_path / "damaged.beton", images)
    beton = read_beton(path)
    with open(path, "r+b") as file:
        file.seek(int(beton.images["data_ptr"][9]))
        file.write(b"\0" * int(beton.image_sizes[9]))
    return path


@pytest.mark.parametrize("workers", [1, 4])
def test_an_image_that_does_not_decode_is_named_in_the_loop_and_the_loader_goes_on(damaged, workers):
    with open_loader(damaged, workers=workers, shuffle=False) as loader:
        for _ in range(2):
            served = []
            with pytest.raises(UserError, match=r"damaged\.beton.* 9 "):
                for batch in loader:
                    served += batch.indices.tolist()
            assert served == list(range(8))  # all batches before the one that holds it
        loader.samples = np.array([i for i in range(23) if i != 9])
        assert len(epoch_of(loader, 1)[2]) == 20


def test_too_few_samples_for_a_batch_are_refused_or_served_as_one(beton):
    with pytest.raises(UserError, match="23 samples"):
        open_loader(beton, batch_size=24)
    with pytest.raises(UserError, match="2 processes"):
        open_loader(beton, batch_size=12, world_size=2)
    with open_loader(beton, batch_size=50, drop_last=False) as loader:
        (batch,) = loader
        assert sorted(batch.indices.tolist()) == list(range(23))


def test_missing_labels_are_minus_one_and_can_be_required(images, tmp_path):
    path = write_beton(tmp_path / "images.beton", images)
    path.write_bytes(path.read_bytes().replace(b"label", b"other", 1))
    with open_loader(path) as loader:
        assert next(iter(loader)).labels.tolist() == [-1] * 4
        with pytest.raises(UserError, match="images.beton.*labels"):
            loader.require_labels()
    partly = write_beton(tmp_path / "partly.beton", images, labels=[-1] + [1] * 22)
    with open_loader(partly) as loader:
        with pytest.raises(UserError, match="labels"):
            loader.require_labels()
    with open_loader(partly, indices=range(1, 23)) as loader:
        loader.require_labels()


@pytest.mark.parametrize(
    "options",
    [
        {"views": 0}, {"resolution": 0}, {"batches_ahead": 0}, {"batch_size": 0}, {"max_resolution": 8}, {"indices": range(20, 24)},
        {"indices": [-1, 0, 1, 2]}, {"policy": ()},
    ],
)  # fmt: skip
def test_senseless_settings_are_refused(beton, options):
    with pytest.raises(UserError):
        open_loader(beton, **options)


# Leaving early


def test_a_batch_holds_until_the_next_is_asked_for(beton):
    with open_loader(beton, batches_ahead=1) as loader:
        for batch in loader:
            copy = batch.views.clone()
            time.sleep(0.02)
            assert torch.equal(batch.views, copy)


def test_closing_an_iteration_stops_the_rendering(beton):
    # One thread, with 20 large batches ahead of it.
    with open_loader(beton, batch_size=1, views=12, resolution=256, batches_ahead=20, workers=1) as loader:
        started = time.perf_counter()
        for batch in loader:
            pass
        epoch = time.perf_counter() - started
        iteration = iter(loader)
        buffers = torch.empty(0, dtype=torch.uint8).set_(next(iteration).views.untyped_storage())
        started = time.perf_counter()
        iteration.close()
        assert time.perf_counter() - started < epoch / 3
        before = buffers.clone()
        time.sleep(epoch / 3)
        assert torch.equal(buffers, before)


def test_set_epoch_ends_the_iteration_under_way(beton):
    with open_loader(beton) as loader:
        expected = epoch_of(loader, 1, 16)
        loader.set_epoch(0, 24)
        iteration = iter(loader)
        next(iteration)
        assert_same(epoch_of(loader, 1, 16), expected)
        with pytest.raises(StopIteration):
            next(iteration)


def test_an_exception_in_the_loop_leaves_a_loader_that_works(beton):
    with open_loader(beton) as loader:
        expected = epoch_of(loader, 1)
        with pytest.raises(ZeroDivisionError):
            for batch in loader:
                1 / 0
        assert_same(epoch_of(loader, 1), expected)


def test_two_loaders_at_once_do_not_disturb_each_other(beton):
    with open_loader(beton) as a, open_loader(beton, seed=8, resolution=16) as b:
        expected = epoch_of(a, 0), epoch_of(b, 0)
        pairs = [(x.views.clone(), y.views.clone()) for x, y in zip(a, b)]
    for views, alone in zip(zip(*pairs), expected):
        assert torch.equal(torch.cat(views), alone[0])


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_thirty_early_exits_leave_neither_threads_nor_memory_behind(beton):
    def leave_early(loader):
        for _ in loader:
            break

    options = {"batch_size": 8, "views": 4, "resolution": 128, "workers": 2}
    with open_loader(beton, **options) as loader:
        assert loader.buffer_bytes > 4e6
        leave_early(loader)
        threads, memory = threading.active_count(), resident_bytes()
        for _ in range(30):
            leave_early(loader)
        assert threading.active_count() == threads
    for _ in range(30):
        with open_loader(beton, **options) as loader:
            leave_early(loader)
    assert threading.active_count() == threads - 2
    assert resident_bytes() - memory < 30e6  # 30 leaked loaders would hold 140 MB
