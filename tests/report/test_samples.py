import json

import numpy as np
import pytest
import torch
from support.small_runs import save_run

from ffssl.hard_augment import Selection, by_pair, hardest_pairs, pairs, selection_losses
from ffssl.report.runs import read_runs
from ffssl.report.samples import (
    BATCH,
    COMPARED_IMAGES,
    _fixed_views,
    examine_choice,
    project,
    rank_of,
    spread,
    views_by_epoch,
)


def test_spread_goes_from_end_to_end():
    assert spread(9, 5).tolist() == [0, 2, 4, 6, 8]
    assert spread(3, 5).tolist() == [0, 1, 2]
    assert spread(1, 5).tolist() == [0]


def losses(images, views, seed=0):
    values = torch.rand(images, views, views, generator=torch.Generator().manual_seed(seed))
    return values + values.mT


def test_the_rank_counts_the_harder_pairs():
    low, high = losses(50, 4), losses(50, 4, seed=1)
    chosen = by_pair(low, pairs(4)).argmax(1)
    for image, rank in enumerate(rank_of(by_pair(high, pairs(4)), chosen).tolist()):
        ordered = sorted(
            ((high[image, a, b].item(), (a, b)) for a, b in pairs(4).tolist()), reverse=True
        )
        assert ordered[rank][1] == tuple(pairs(4)[chosen[image]].tolist())
    assert rank_of(by_pair(low, pairs(4)), chosen).sum() == 0


def run_that_chooses(folder, betons, *options, epoch):
    """A run with Hard Augment from the first epoch on, after some epochs."""
    hard = ["--hard_augment.select=hard", "--hard_augment.start_epoch=0"]
    save_run(folder, f"--data.train={betons['train']}", *hard, *options)
    (folder / "log.jsonl").write_text(json.dumps({"epoch": epoch}) + "\n")
    (run,) = read_runs([folder])
    return run


def test_the_choice_is_at_the_teachers_temperature_of_the_epoch(tmp_path, betons, monkeypatch):
    run = run_that_chooses(
        tmp_path,
        betons,
        "--method.name=dino",
        "--method.prototypes=32",
        "--method.teacher_temperature=0.07",
        "--method.teacher_temperature_epochs=3",
        "--augment.views=3",
        "--hard_augment.loss=method",
        epoch=2,
    )
    temperatures, pair_losses = [], run.method.pair_losses

    def observed(*arguments):
        temperatures.append(run.method.teacher_temperature.item())
        return pair_losses(*arguments)

    monkeypatch.setattr(run.method, "pair_losses", observed)
    views_by_epoch(run, run.method)
    assert temperatures == pytest.approx([0.04, 0.055, 0.07])
    temperatures.clear()
    examine_choice(run, run.method)
    assert temperatures and temperatures == pytest.approx([0.055] * len(temperatures))


def test_the_views_shown_as_chosen_are_those_that_the_epoch_trains_on(tmp_path, betons):
    """Of SimSiam's images none has its hardest pair in the first epoch, and all in the last."""
    run = run_that_chooses(
        tmp_path,
        betons,
        "--method.name=simsiam",
        "--augment.views=6",
        epoch=3,
    )
    first, *_, last = shown = views_by_epoch(run, run.method)
    assert [len(one.chosen) for one in shown] == [4] * 3
    selection = run.schedule.selection(2)
    with _fixed_views(run, BATCH) as loader:
        equal = []
        for one in (first, last):
            loader.set_epoch(one.epoch, one.resolution, one.magnitude, views=6)
            views = next(iter(loader)).views
            hardest = hardest_pairs(selection_losses(run.method.train(), views, selection))
            kept = spread(len(views), len(one.chosen))
            equal.append((hardest[kept] == one.chosen).all(1).float().mean().item())
    assert equal[0] < 1 and equal[1] == 1


def test_the_hardness_that_other_passes_would_reach_is_by_the_loss_at_the_resolution_trained(
    tmp_path, betons
):
    run = run_that_chooses(
        tmp_path,
        betons,
        "--method.name=simsiam",
        "--augment.views=4",
        "--resolution.max=64",
        "--hard_augment.resolution=24",
        epoch=1,
    )
    choice = examine_choice(run, run.method)
    assert list(choice.reached) == [18, 24, 36, 48] and choice.resolution == 64
    expected = {side: [] for side in choice.reached}
    trained, hardest = [], []
    with _fixed_views(run, COMPARED_IMAGES) as loader:
        loader.set_epoch(0, 64, run.schedule.magnitude(0), views=4)
        for views, _, _ in loader:
            at = {
                side: selection_losses(run.method.train(), views, Selection("hard", side))
                for side in (*expected, 64)
            }
            for image, losses in enumerate(at[64].tolist()):
                trained += [losses[a][b] for a in range(4) for b in range(a)]
                for side in expected:
                    small = at[side][image].tolist()
                    _, a, b = max((small[a][b], a, b) for a in range(4) for b in range(a))
                    expected[side].append(losses[a][b])
                hardest.append(max(losses[a][b] for a in range(4) for b in range(a)))
    floor, top = np.mean(trained), np.mean(hardest)
    for side, reached in choice.reached.items():
        assert reached == pytest.approx((np.mean(expected[side]) - floor) / (top - floor), abs=1e-4)
    assert choice.losses["hardest"] == pytest.approx(top, abs=1e-5)


def test_pca_keeps_the_distances_of_what_lies_in_a_plane():
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(10, 2, generator=generator))[0]
    flat = torch.randn(12, 2, generator=generator)  # fewer than UMAP is asked for
    points, explained = project(flat @ plane.T + 3)
    torch.testing.assert_close(
        torch.cdist(points, points), torch.cdist(flat, flat), atol=1e-4, rtol=1e-4
    )
    assert explained > 0.9999
