import json

import pytest
import torch
from support.small_runs import save_run

from ffssl.hard_augment import hardest_pair, pairs
from ffssl.report.runs import read_runs
from ffssl.report.samples import by_pair, examine_choice, project, rank_of, spread, views_by_epoch


def test_spread_goes_from_end_to_end():
    assert spread(9, 5).tolist() == [0, 2, 4, 6, 8]
    assert spread(3, 5).tolist() == [0, 1, 2]
    assert spread(1, 5).tolist() == [0]


def losses(images, views, seed=0):
    values = torch.rand(images, views, views, generator=torch.Generator().manual_seed(seed))
    return values + values.mT


@pytest.mark.parametrize("policies", [1, 2])
def test_the_chosen_pair_is_that_of_the_selection(policies):
    values = losses(50, 4)
    chosen = by_pair(values, policies).argmax(1)
    assert torch.equal(pairs(4, policies=policies)[chosen], hardest_pair(values, policies))


def test_the_rank_counts_the_harder_pairs():
    low, high = losses(50, 4), losses(50, 4, seed=1)
    chosen = by_pair(low).argmax(1)
    for image, rank in enumerate(rank_of(by_pair(high), chosen).tolist()):
        ordered = sorted(
            ((high[image, a, b].item(), (a, b)) for a, b in pairs(4).tolist()), reverse=True
        )
        assert ordered[rank][1] == tuple(pairs(4)[chosen[image]].tolist())
    assert rank_of(by_pair(low), chosen).sum() == 0


def test_the_choice_is_at_the_teachers_temperature_of_the_epoch(tmp_path, betons, monkeypatch):
    save_run(
        tmp_path,
        f"--data.train={betons['train']}",
        "--method.name=dino",
        "--method.prototypes=32",
        "--method.teacher_temperature=0.07",
        "--method.teacher_temperature_epochs=3",
        "--augment.views=3",
        "--hard_augment.select=hard",
        "--hard_augment.loss=method",
    )
    (tmp_path / "log.jsonl").write_text(json.dumps({"epoch": 2}) + "\n")
    (run,) = read_runs([tmp_path])
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


def test_pca_keeps_the_distances_of_what_lies_in_a_plane():
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(10, 2, generator=generator))[0]
    flat = torch.randn(12, 2, generator=generator)  # fewer than UMAP is asked for
    points, explained = project(flat @ plane.T + 3)
    torch.testing.assert_close(
        torch.cdist(points, points), torch.cdist(flat, flat), atol=1e-4, rtol=1e-4
    )
    assert explained > 0.9999
