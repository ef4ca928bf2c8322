import math
import multiprocessing
import os
import pickle
import shutil
import signal
import time
import warnings
from dataclasses import replace

import numba
import numpy as np
import pytest
import torch
from support.sample_images import write_beton

from ffssl.data.beton.read import read_beton
from ffssl.data.kernels.draw import uniform, view_key
from ffssl.data.kernels.own_step import compile_view_kernel
from ffssl.data.loader import ViewLoader
from ffssl.data.order import epoch_order, rank_part
from ffssl.data.policy import POLICIES, ViewPolicy
from ffssl.errors import UserError


def open_loader(path, **options):
    return ViewLoader(path, **{"batch_size": 4, "views": 2, "resolution": 24, "seed": 3} | options)


def epoch_of(loader, *settings):
    """An epoch's views, labels and indices, each concatenated."""
    loader.set_epoch(*settings)
    return collected(loader)


def collected(batches):
    parts = [(views.clone(), labels, indices) for views, labels, indices in batches]
    return tuple(torch.cat(part) for part in zip(*parts))


def views_by_index(views, _, indices):
    return {int(i): view for i, view in zip(indices, views)}


def assert_same(a, b):
    for ours, theirs in zip(a, b, strict=True):
        assert torch.equal(ours, theirs)


# What is served


def test_views_do_not_depend_on_workers_batch_size_or_batches_ahead(beton):
    with open_loader(beton, workers=1, drop_last=False) as loader:
        expected = epoch_of(loader, 5, 24, 6.0)
    for options in (
        {"workers": 2},
        {"workers": 4, "batches_ahead": 1},
        {"workers": 2, "batches_ahead": 9},
        {"batch_size": 7, "workers": 3},
    ):
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
    with (
        open_loader(beton, drop_last=False) as loader,
        open_loader(beton, drop_last=False, seed=4) as other,
    ):
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
            assert epoch_of(loader, epoch, resolution)[0].shape == (
                20,
                2,
                3,
                resolution,
                resolution,
            )


def test_an_epoch_may_serve_the_first_of_the_views_alone(beton):
    with open_loader(beton, views=5, scaled_decoding=False) as loader:
        loader.set_epoch(3, views=5)
        every = torch.cat([views.clone() for views, _, _ in loader])
        for count in (2, 1, 5):
            loader.set_epoch(3, views=count)
            assert torch.equal(torch.cat([v.clone() for v, _, _ in loader]), every[:, :count])
            assert loader.views == count
        loader.set_epoch(4)
        assert loader.views == 5
        for count in (0, 6):
            with pytest.raises(UserError, match=f"{count} views asked for, of 1 to 5"):
                loader.set_epoch(3, views=count)


@pytest.mark.parametrize("samples, world_size", [(20, 4), (23, 4), (7, 3)])
def test_ranks_share_an_epoch_equally_without_overlap(samples, world_size):
    shares = [
        rank_part(epoch_order(samples, seed=1, epoch=5), rank, world_size)
        for rank in range(world_size)
    ]
    assert {len(own) for own in shares} == {samples // world_size}
    visited = np.concatenate(shares)
    assert len(set(visited)) == len(visited) and set(visited) <= set(range(samples))


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_batches_and_parts_of_them_are_together_those_of_one_process(beton, world_size):
    def batches(rank, ranks):
        with open_loader(beton, batch_size=8 // ranks, rank=rank, world_size=ranks) as loader:
            loader.set_epoch(3)
            return [dict(zip(indices.tolist(), views.clone())) for views, _, indices in loader]

    shares = [batches(rank, world_size) for rank in range(world_size)]
    alone = batches(0, 1)
    assert [len(share) for share in shares] == [len(alone)] * world_size == [2] * world_size
    for whole, *dealt in zip(alone, *shares):
        for index, views in whole.items():
            assert torch.equal(views, next(share[index] for share in dealt if index in share))
        for part in range(2):
            half = slice(part * 4 // world_size, (part + 1) * 4 // world_size)
            assert {i for share in dealt for i in list(share)[half]} == set(
                list(whole)[4 * part : 4 * part + 4]
            )


def test_over_the_epochs_every_rank_visits_every_sample():
    for rank in range(4):
        visited = {
            int(i)
            for epoch in range(60)
            for i in rank_part(epoch_order(23, seed=1, epoch=epoch), rank, 4)
        }
        assert visited == set(range(23))


def test_orders_are_uniform():
    first = [epoch_order(5, seed=2, epoch=epoch)[0] for epoch in range(2000)]
    assert np.abs(np.bincount(first, minlength=5) - 400).max() < 4 * np.sqrt(2000 * 0.2 * 0.8)


@pytest.mark.parametrize("batches_ahead", [1, 3])
@pytest.mark.parametrize("first", range(7))
def test_an_epoch_can_begin_at_any_of_its_batches(beton, first, batches_ahead):
    with open_loader(beton, drop_last=False, batches_ahead=batches_ahead) as loader:
        loader.set_epoch(1, 24)
        whole = [tuple(part.clone() for part in batch) for batch in loader]
        loader.set_epoch(1, 24, first_batch=first)
        rest = [tuple(part.clone() for part in batch) for batch in loader]
        assert len(rest) == 6 - first == len(loader) - first
        for ours, theirs in zip(rest, whole[first:]):
            assert_same(ours, theirs)
        loader.set_epoch(1)
        assert len(list(loader)) == 6


def test_an_epoch_cannot_begin_after_its_end(beton):
    with (
        open_loader(beton) as loader,
        pytest.raises(UserError, match="epoch of 5 batches can't begin at batch 6"),
    ):
        loader.set_epoch(0, first_batch=6)


def test_an_epoch_without_pixels_is_refused_and_changes_nothing(beton):
    with open_loader(beton) as loader:
        with pytest.raises(UserError, match="resolution 0"):
            loader.set_epoch(3, 0, first_batch=2)
        assert (loader.resolution, loader.epoch, len(list(loader))) == (24, 0, 5)


def break_images(beton, path, broken):
    """A copy of a beton file in which these images don't decode."""
    data = bytearray(beton.read_bytes())
    for begin in read_beton(beton).images["data_ptr"][broken].tolist():
        data[begin : begin + 20] = bytes(20)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("options", [{}, {"workers": 1, "batches_ahead": 1}, {"batch_size": 11}])
def test_a_broken_image_is_replaced_by_another_of_the_epoch(beton, tmp_path, options):
    order, broken = epoch_order(23, seed=3, epoch=2), [4, 5, 17]
    with open_loader(beton, drop_last=False, batch_size=23) as loader:
        by_index = views_by_index(*epoch_of(loader, 2))
    with open_loader(
        break_images(beton, tmp_path / "broken.beton", broken),
        drop_last=False,
        broken="replace",
        **options,
    ) as loader:
        for _ in range(2):
            views, labels, indices = epoch_of(loader, 2)
            assert loader.replaced == 3 and torch.equal(labels, 10 * indices)
        assert all(torch.equal(view, by_index[int(i)]) for view, i in zip(views, indices))
    expected = []
    for place in range(23):  # the first half an epoch on that decodes
        candidates = [place, *((place + 11 + k) % 23 for k in range(23))]
        expected.append(next(int(order[at]) for at in candidates if order[at] not in broken))
    assert indices.tolist() == expected


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_replaces_a_broken_image_does_not_depend_on_the_number_of_ranks(
    beton, tmp_path, ranks
):
    path = break_images(beton, tmp_path / "broken.beton", [1, 4, 5, 9, 17, 20])

    def served(rank, ranks):
        with open_loader(
            path, batch_size=8 // ranks, rank=rank, world_size=ranks, broken="replace"
        ) as loader:
            return epoch_of(loader, 2)[2]

    assert (
        torch.stack([served(rank, ranks) for rank in range(ranks)], dim=1).flatten().tolist()
        == served(0, 1).tolist()
    )


def test_a_file_of_broken_images_ends_even_if_they_are_to_be_replaced(beton, tmp_path):
    with (
        open_loader(
            break_images(beton, tmp_path / "broken.beton", list(range(23))), broken="replace"
        ) as loader,
        pytest.raises(UserError, match="image .* does not decode"),
    ):
        next(iter(loader))


# Several files


@pytest.fixture(scope="module")
def parts(images, tmp_path_factory):
    """The file of the fixture `beton` in three, of 9, 9 and 5 images."""
    folder = tmp_path_factory.mktemp("parts")
    labels = [10 * i for i in range(23)]
    for part in range(3):
        own = slice(9 * part, 9 * part + 9)
        write_beton(folder / f"part-{part + 9}.beton", images[own], labels[own])
    return folder / "part-*.beton"  # part-10 after part-9


def test_parts_of_a_file_are_served_as_the_whole_file_is(beton, parts):
    for options in ({}, {"drop_last": False}, {"shuffle": False}, {"scaled_decoding": False}):
        with open_loader(beton, **options) as one, open_loader(parts, **options) as several:
            for epoch in (0, 5):
                assert_same(epoch_of(several, epoch, 16, 6.0), epoch_of(one, epoch, 16, 6.0))


def test_an_epoch_of_parts_is_resumed_and_shared_as_one_of_the_whole_file_is(beton, parts):
    for options in ({"rank": 1, "world_size": 2}, {}):
        with open_loader(beton, **options) as one, open_loader(parts, **options) as several:
            several.set_epoch(3, first_batch=1)
            one.set_epoch(3, first_batch=1)
            assert_same(collected(several), collected(one))


def test_views_depend_on_the_files_order_and_the_samples_before(parts):
    names = sorted(parts.parent.glob("*.beton"))  # 10, 11, 9
    with (
        open_loader(parts, drop_last=False) as loader,
        open_loader(names, drop_last=False) as other,
    ):
        in_order, reordered = epoch_of(loader, 0), epoch_of(other, 0)
    assert torch.equal(in_order[1].sort()[0], reordered[1].sort()[0])
    by_label = dict(zip(reordered[1].tolist(), reordered[0]))
    same = [torch.equal(view, by_label[int(i)]) for view, i, _ in zip(*in_order)]
    assert not any(same)


def test_a_broken_image_of_several_files_is_named_by_its_file_or_replaced(beton, parts, tmp_path):
    files = sorted(parts.parent.glob("part-9*")) + sorted(parts.parent.glob("part-1*"))
    files[1] = break_images(files[1], tmp_path / "broken.beton", [4])
    with (
        open_loader(files, drop_last=False) as loader,
        pytest.raises(UserError, match=r"^\S*broken.beton: image 4 does not decode"),
    ):
        list(loader)
    whole = break_images(beton, tmp_path / "whole.beton", [13])
    replaced = {"broken": "replace", "drop_last": False}
    with open_loader(files, **replaced) as loader, open_loader(whole, **replaced) as one:
        assert_same(epoch_of(loader, 1), epoch_of(one, 1))
        assert loader.replaced == one.replaced == 1


def test_one_of_several_files_that_is_cut_short_in_use_is_told(parts, tmp_path):
    files = [shutil.copy(path, tmp_path) for path in sorted(parts.parent.glob("*.beton"))]
    with open_loader(files, batches_ahead=1) as loader:
        os.truncate(files[2], os.path.getsize(files[2]) - 1)
        with pytest.raises(UserError, match="part-9.beton: was cut short or written over while"):
            list(loader)


# Views of several sizes

TWO_SIZES = {"views": (2, 3), "resolution": (24, 10)}
PART = ViewPolicy(crop_scale=(0.05, 0.3), blur=0)


def sizes_of(loader, *settings, **more):
    """An epoch's views of each size and its indices, each concatenated."""
    loader.set_epoch(*settings, **more)
    batches = [(*(part.clone() for part in views), indices) for views, _, indices in loader]
    return tuple(torch.cat(part) for part in zip(*batches))


def test_views_of_each_size_are_those_of_a_loader_of_that_size(beton):
    words = {"scaled_decoding": False, "drop_last": False}
    policy = (POLICIES["byol"], PART)
    with open_loader(beton, policy=policy, **TWO_SIZES, **words) as loader:
        large, small, indices = sizes_of(loader, 2, (24, 10), 6.0)
        again = sizes_of(loader, 2, (16, 12), 6.0)
    assert large.shape == (23, 2, 3, 24, 24) and small.shape == (23, 3, 3, 10, 10)
    assert [part.shape[-1] for part in again[:2]] == [16, 12]
    of_views = (*POLICIES["byol"], PART, PART, PART)
    for side, mine, own in ((24, slice(2), large), (10, slice(2, 5), small)):
        with open_loader(beton, views=5, resolution=side, policy=of_views, **words) as loader:
            views, _, theirs = epoch_of(loader, 2, side, 6.0)
        assert torch.equal(views[:, mine], own) and torch.equal(theirs, indices)


def test_views_of_several_sizes_do_not_depend_on_workers_batch_size_ranks_or_restarts(beton):
    with open_loader(beton, workers=1, drop_last=False, **TWO_SIZES) as loader:
        *expected, order = sizes_of(loader, 5)
        *rest, _ = sizes_of(loader, 5, first_batch=2)
        assert all(torch.equal(a, b[8:]) for a, b in zip(rest, expected))
    for options in ({"workers": 4, "batches_ahead": 1}, {"batch_size": 7}, {"batches_ahead": 9}):
        with open_loader(beton, drop_last=False, **TWO_SIZES, **options) as loader:
            assert_same(sizes_of(loader, 5), (*expected, order))
    places = {int(index): place for place, index in enumerate(order)}
    for rank in range(2):
        with open_loader(beton, rank=rank, world_size=2, **TWO_SIZES) as loader:
            *shares, indices = sizes_of(loader, 5)
            taken = [places[int(index)] for index in indices]
            assert taken and all(torch.equal(a, b[taken]) for a, b in zip(shares, expected))


def test_a_view_keeps_its_number_where_fewer_of_another_size_are_served(beton):
    with open_loader(beton, **TWO_SIZES) as loader:
        large, small, _ = sizes_of(loader, 1)
        fewer = sizes_of(loader, 1, views=(1, 2))
        assert torch.equal(fewer[0], large[:, :1]) and torch.equal(fewer[1], small[:, :2])
        assert loader.views == (1, 2) and loader.resolution == (24, 10)


def test_a_kernel_changes_the_views_of_every_size(beton):
    plain, changed, words = [], [], {"drop_last": False, "scaled_decoding": False}
    for served, kernel in ((plain, None), (changed, blank_some)):
        with open_loader(beton, kernel=kernel, **TWO_SIZES, **words) as loader:
            served += sizes_of(loader, 3)[:2]
    with open_loader(beton, kernel=blank_some, views=5, resolution=10, **words) as loader:
        assert torch.equal(epoch_of(loader, 3)[0][:, 2:], changed[1])
    for before, after in zip(plain, changed):
        blank = (after == 0).flatten(2).all(2)
        assert 0 < blank.sum() < blank.numel()
        assert torch.equal(after[~blank][..., 1:, :], before[~blank][..., 1:, :])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"resolution": 24}, "resolution is 24, must be 2 numbers"),
        ({"resolution": (24, 10, 8)}, "resolution is .* must be 2 numbers"),
        ({"views": 2}, "resolution is .*, must be a number"),
        ({"views": (2, 0)}, r"\(2, 0\) views asked for"),
        ({"views": (), "resolution": ()}, r"\(\) views asked for"),
        ({"resolution": (24, 0)}, "resolution 0 asked for"),
        ({"policy": [PART, PART, PART]}, "policy has 3 entries"),
        ({"policy": [PART, ()]}, "no view policy"),
        ({"max_resolution": 24}, "max_resolution is 24, must be 2 numbers"),
        ({"max_resolution": (24, 8)}, r"more than max_resolution \(24, 8\)"),
    ],
)
def test_senseless_sizes_are_refused_in_a_line(beton, options, message):
    with pytest.raises(UserError, match=message) as raised:
        open_loader(beton, **TWO_SIZES | options)
    assert "\n" not in str(raised.value)


def test_sizes_of_an_epoch_that_do_not_fit_the_loader_are_refused(beton):
    with open_loader(beton, **TWO_SIZES) as loader:
        for settings, more in (((1, 16), {}), ((1, (16, 8, 8)), {}), ((1,), {"views": 2})):
            with pytest.raises(UserError, match="must be 2 numbers, one for each size"):
                loader.set_epoch(*settings, **more)
        with pytest.raises(UserError, match="4 views asked for, of 1 to 3"):
            loader.set_epoch(1, views=(2, 4))


# Blur in proportion to the side

SIGMA = 1.5
BLURRED = ViewPolicy(blur=1, blur_sigma=(SIGMA, SIGMA))


def blurred(planes, sigma):
    """Square planes (..., R, R) weighted by a Gaussian, cut at three sigma and reflected."""
    side, radius = planes.shape[-1], math.ceil(3 * sigma)
    weights = np.zeros((side, side))
    for to in range(side):
        for k in range(-radius, radius + 1):
            at = abs(to + k)
            weights[to, min(at, 2 * (side - 1) - at)] += math.exp(-((k / sigma) ** 2) / 2)
    weights /= weights.sum(1, keepdims=True)
    return weights @ planes.double().numpy() @ weights.T


@pytest.mark.parametrize("side", [24, 16, 12])
def test_a_blur_in_proportion_is_narrower_on_smaller_views(beton, side):
    policies = ViewPolicy(blur=0), replace(BLURRED, blur_side=24)
    sharp, ours = (epoch_of(open_loader(beton, policy=one), 2, side)[0] for one in policies)
    off = np.abs(ours.double().numpy() - blurred(sharp, SIGMA * side / 24)).max()
    assert off <= 1.01  # both are rounded


def test_each_size_of_views_has_its_own_full_side_for_the_blur(beton):
    def served(*policy, sides=(24, 10)):
        with open_loader(beton, policy=policy, **TWO_SIZES) as loader:
            return sizes_of(loader, 1, sides)

    policies = replace(BLURRED, blur_side=24), replace(BLURRED, blur_side=10)
    assert_same(served(*policies), served(BLURRED, BLURRED))
    halves = [replace(BLURRED, blur_sigma=(SIGMA * share, SIGMA * share)) for share in (0.5, 0.6)]
    assert_same(served(*policies, sides=(12, 6)), served(*halves, sides=(12, 6)))


# A kernel of the user's own


def blank_some(view, key):
    """Blanks a view with probability 0.5, and marks the others with a random number."""
    if uniform(key, 0) < 0.5:
        view[:] = 0
    else:
        view[:, 0, 0] = 1 + np.uint8(254 * uniform(key, 1))


def test_a_kernel_changes_every_view_alike_whatever_the_workers_and_nothing_else(beton):
    with open_loader(beton, drop_last=False) as loader:
        plain = epoch_of(loader, 3)
    with open_loader(beton, drop_last=False, kernel=blank_some, workers=1) as loader:
        changed = epoch_of(loader, 3)
    with open_loader(
        beton, drop_last=False, kernel=numba.njit(blank_some), workers=3, batch_size=5
    ) as loader:
        assert_same(epoch_of(loader, 3), changed)
        assert not torch.equal(epoch_of(loader, 4)[0], changed[0])
    blank = (changed[0] == 0).flatten(2).all(2)
    assert 8 < blank.sum() < 38  # of 46
    marked, before = changed[0][~blank], plain[0][~blank]
    assert torch.equal(marked[..., 1:, :], before[..., 1:, :]) and torch.equal(
        marked[..., 0, 1:], before[..., 0, 1:]
    )
    assert len(marked[:, 0, 0, 0].unique()) > len(marked) / 2


def test_a_kernels_random_numbers_are_none_of_the_policys():
    counters = np.array([3, 0])  # seed, epoch
    apply = compile_view_kernel(write_first_numbers)
    view = np.zeros((1, 1, 3, 1, 200), np.uint8)
    apply(counters, np.zeros(1, np.int64), view)
    key = np.uint64(view_key(counters[0], counters[1], 0, 0))
    of_policy = [np.uint8(256 * uniform(key, k)) for k in range(200)]
    assert (view[0, 0, 0, 0] == of_policy).mean() < 0.05


def write_first_numbers(view, key):
    for k in range(view.shape[2]):
        view[0, 0, k] = np.uint8(256 * uniform(key, k))


def takes_one(view):
    view[:] = 0


def uses_the_unknown(view, key):
    view[:] = undefined_anywhere  # noqa: F821


@pytest.mark.parametrize(
    "kernel, message",
    [
        (takes_one, "takes_one.*takes 1 arg"),
        (uses_the_unknown, "uses_the_unknown.*undefined_anywhere"),
        (3, "must be a function"),
    ],
)
def test_a_kernel_that_does_not_compile_is_refused_at_once_in_a_line_that_names_it(
    beton, kernel, message
):
    with pytest.raises(UserError, match=message) as raised:
        open_loader(beton, kernel=kernel)
    assert "\n" not in str(raised.value)


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
def test_an_image_that_does_not_decode_is_named_in_the_loop_and_the_loader_goes_on(
    damaged, workers
):
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
    with pytest.raises(UserError, match="23 samples are fewer than the 24 processes"):
        open_loader(beton, drop_last=False, world_size=24)
    with open_loader(beton, batch_size=50, drop_last=False) as loader:
        (batch,) = loader
        assert sorted(batch.indices.tolist()) == list(range(23))


def test_labels_of_a_field_of_another_name_are_served(images, tmp_path):
    path = write_beton(tmp_path / "images.beton", images)
    path.write_bytes(path.read_bytes().replace(b"label", b"taxon", 1))
    for field in (None, "taxon"):
        with open_loader(path, label_field=field) as loader:
            batch = next(iter(loader))
            assert torch.equal(batch.labels, 10 * batch.indices)
    with pytest.raises(
        UserError,
        match="images.beton: the field of labels, 'label', is not in it; its fields: 'taxon' .int.",
    ):
        open_loader(path, label_field="label")


def test_where_several_fields_may_hold_the_labels_none_are_served_and_told(images, tmp_path):
    path = write_beton(tmp_path / "images.beton", images)
    content = path.read_bytes().replace(b"label", b"score", 1)
    # Its type is the byte before the name: of floats, which the integers' bits are not whole
    # numbers of.
    at = content.index(b"score")
    path.write_bytes(content[: at - 1] + b"\0" + content[at:])
    with (
        pytest.warns(
            UserWarning, match=r"images.beton: no labels are served.*its fields: 'score' \(float\)"
        ),
        open_loader(path) as loader,
    ):
        assert next(iter(loader)).labels.tolist() == [-1] * 4


@pytest.mark.parametrize(
    "options",
    [
        {"views": 0},
        {"resolution": 0},
        {"batches_ahead": 0},
        {"batch_size": 0},
        {"batch_size": -4},
        {"max_resolution": 8},
        {"workers": -1},
        {"indices": range(20, 24)},
        {"indices": [-1, 0, 1, 2]},
        {"indices": []},
        {"policy": ()},
        {"rank": 1},
        {"broken": "replaced"},
    ],
)
def test_senseless_settings_are_refused_in_a_line_that_names_them(beton, options):
    with pytest.raises(UserError, match=next(iter(options))) as raised:
        open_loader(beton, **options)
    assert "\n" not in str(raised.value)


def test_indices_that_are_a_mask_or_fractions_are_refused(beton):
    for indices in ([True] * 23, [0.0, 1.0, 2.0, 3.0], [[0, 1], [2, 3]]):
        with pytest.raises(UserError, match="indices must be a list of integers"):
            open_loader(beton, indices=indices)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        (b"", "is empty"),
        (b"\xff\xd8 a photograph" * 99, "not a beton file"),
        ("folder", "is a folder"),
    ],
)
def test_what_is_no_beton_file_is_refused_in_a_line_that_names_it(tmp_path, content, message):
    path = tmp_path / "some.beton"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        open_loader(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("views", [1, 32])
def test_one_view_and_many_are_served(beton, views):
    with open_loader(beton, views=views, resolution=16) as loader:
        batch = next(iter(loader)).views
        assert batch.shape == (4, views, 3, 16, 16)
        assert len({view.numpy().tobytes() for view in batch[0]}) == views


# Leaving early


def test_a_batch_holds_until_the_next_is_asked_for(beton):
    with open_loader(beton, batches_ahead=1) as loader:
        for batch in loader:
            copy = batch.views.clone()
            time.sleep(0.02)
            assert torch.equal(batch.views, copy)


def test_closing_an_iteration_stops_the_rendering(beton, monkeypatch):
    # One thread, with 20 batches ahead of it. It is held up in the second until that which comes
    # last has been given up.
    with open_loader(beton, batch_size=1, batches_ahead=20, workers=1) as loader:
        submit, render, tasks, rendered = loader._pool.submit, loader._render, [], []

        def kept(*task):
            tasks.append(submit(*task))
            return tasks[-1]

        def held_up(*what):
            deadline = time.monotonic() + 600
            while rendered and not tasks[-1].cancelled():
                assert time.monotonic() < deadline
                time.sleep(0.001)
            rendered.append(what)
            render(*what)

        monkeypatch.setattr(loader._pool, "submit", kept)
        monkeypatch.setattr(loader, "_render", held_up)
        iteration = iter(loader)
        next(iteration)
        iteration.close()
        assert len(tasks) == 20 and len(rendered) <= 2 and all(task.done() for task in tasks)


def test_set_epoch_ends_the_iteration_under_way(beton):
    with open_loader(beton) as loader:
        expected = epoch_of(loader, 1, 16)
        loader.set_epoch(0, 24)
        iteration = iter(loader)
        next(iteration)
        assert_same(epoch_of(loader, 1, 16), expected)
        with pytest.raises(UserError, match="one loop at a time"):
            next(iteration)


def test_two_loops_over_one_loader_are_refused_only_at_the_same_time(beton):
    with open_loader(beton) as loader:
        with pytest.raises(UserError, match="second loader"):
            list(zip(loader, loader))
        finished = iter(loader)
        assert len(list(finished)) == len(list(loader)) == 5
        assert list(finished) == []


def test_an_iteration_that_has_served_nothing_serves_the_epoch_that_is_set_then(beton):
    with open_loader(beton) as loader:
        expected = epoch_of(loader, 3)
        early = iter(loader)
        loader.set_epoch(3)
        assert_same(collected(early), expected)
        early, later = iter(loader), iter(loader)
        loader.set_epoch(3)
        assert_same(collected(later), expected)
        with pytest.raises(UserError, match="one loop at a time"):
            next(early)


def test_an_exception_in_the_loop_leaves_a_loader_that_works(beton):
    with open_loader(beton) as loader:
        expected = epoch_of(loader, 1)
        with pytest.raises(ZeroDivisionError):
            for _batch in loader:
                1 / 0
        assert_same(epoch_of(loader, 1), expected)


# Other processes


def in_a_fork(work):
    """What `work()` returns, or the text of the UserError that it raises, in a process that is
    forked from this one.
    """
    receive, send = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if not pid:
        try:
            send.send(work())
        except UserError as error:
            send.send(str(error))
        finally:
            os._exit(0)
    send.close()
    answer = receive.recv() if receive.poll(600) else os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return answer


@pytest.mark.filterwarnings(
    "ignore:This process .*is multi-threaded, use of fork:DeprecationWarning"
)
def test_a_loader_works_in_a_forked_process_and_goes_on_in_its_own(beton):
    with open_loader(beton, workers=2) as loader:
        expected = [part.numpy() for part in epoch_of(loader, 3)]  # its threads are there by now
        loader.set_epoch(3)
        iteration = iter(loader)
        begun = next(iteration).views.clone()

        def work():
            with pytest.raises(
                UserError,
                match="belongs to the process that this one was forked from; begin another",
            ):
                next(iteration)
            iteration.close()  # whose batches under way nobody will end
            found = [part.numpy() for part in epoch_of(loader, 3)]
            loader.close()
            return found

        for ours, theirs in zip(expected, in_a_fork(work), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        views = torch.cat([begun, *(batch.views.clone() for batch in iteration)])
        np.testing.assert_array_equal(views, expected[0])


def test_a_loader_serves_torchs_data_loader_after_it_was_used(beton):
    class Views(torch.utils.data.IterableDataset):
        def __iter__(self):
            return (batch.indices for batch in loader)

    with open_loader(beton, workers=1) as loader:
        before = [batch.indices.tolist() for batch in loader]
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            after = [
                batch.tolist()
                for batch in torch.utils.data.DataLoader(
                    Views(), None, num_workers=1, multiprocessing_context="fork", timeout=600
                )
            ]
    assert before == after


def test_a_loader_can_not_be_sent_to_another_process(beton):
    with (
        open_loader(beton) as loader,
        pytest.raises(
            UserError, match="images.beton: a ViewLoader can't be sent .*; open one there"
        ),
    ):
        pickle.dumps(loader)


def test_two_loaders_at_once_do_not_disturb_each_other(beton):
    with open_loader(beton) as a, open_loader(beton, seed=8, resolution=16) as b:
        expected = epoch_of(a, 0), epoch_of(b, 0)
        pairs = [(x.views.clone(), y.views.clone()) for x, y in zip(a, b)]
    for views, alone in zip(zip(*pairs), expected):
        assert torch.equal(torch.cat(views), alone[0])


def test_a_file_that_is_cut_short_in_use_is_told(beton, tmp_path):
    own = tmp_path / "own.beton"
    shutil.copyfile(beton, own)
    with open_loader(own, batches_ahead=1) as loader:
        iteration = iter(loader)
        # With a single batch ahead no other is being read until the next is asked for.
        next(iteration)
        os.truncate(own, 4096)
        with pytest.raises(UserError, match=f"{own}: was cut short or written over while in use"):
            next(iteration)
