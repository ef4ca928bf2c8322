import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import functional as V

from ffssl.backbones import build_backbone
from ffssl.hard_augment import batch_statistics_untracked, hardest_pair, pairs, random_pair, select_hardest, take_pair
from ffssl.methods import build_method
from ffssl.methods.base import Method


@pytest.fixture
def method():
    torch.manual_seed(0)
    return build_method("simsiam", build_backbone("resnet-small"), {"hidden": 32, "projection": 16, "predictor": 8}).train()


class Recorder(Method):
    """Projects to the image's mean colour, and keeps what it was given."""

    def __init__(self):
        super().__init__(nn.Identity())

    def project(self, images):
        self.seen = images
        return images.mean((2, 3))


def test_pairs_are_all_the_pairs():
    for views in range(2, 9):
        assert pairs(views).tolist() == [list(pair) for pair in itertools.combinations(range(views), 2)]


@pytest.mark.parametrize("views", [2, 3, 6, 8])
def test_hardest_pair_is_that_of_the_least_cosine(views):
    projections = torch.randn(40, views, 12, generator=torch.Generator().manual_seed(views))
    for z, chosen in zip(projections.double(), hardest_pair(projections).tolist()):
        cosine = {(i, j): torch.dot(z[i] / z[i].norm(), z[j] / z[j].norm()).item() for i, j in itertools.combinations(range(views), 2)}
        assert tuple(chosen) == min(cosine, key=cosine.get)


def test_mixed_precision_around_it_does_not_change_the_hardest_pair():
    # Alike to within bfloat16's resolution, as the views of an image become in the course of training.
    generator = torch.Generator().manual_seed(0)
    projections = torch.randn(50, 1, 64, generator=generator) + 0.1 * torch.randn(50, 6, 64, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        chosen = hardest_pair(projections)
    assert torch.equal(chosen, hardest_pair(projections))


def test_random_pairs_are_uniform_over_all_pairs():
    chosen = random_pair(6000, 4, torch.Generator().manual_seed(0))
    counts = {pair: 0 for pair in itertools.combinations(range(4), 2)}
    for pair in chosen.tolist():
        counts[tuple(pair)] += 1
    assert all(abs(count - 1000) < 4 * (6000 * 1 / 6 * 5 / 6) ** 0.5 for count in counts.values())


def test_take_pair_takes_the_chosen_views_of_each_image():
    views = torch.randn(5, 4, 3, 2, 2)
    chosen = torch.tensor([[0, 1], [2, 3], [0, 3], [1, 2], [1, 3]])
    first, second = take_pair(views, chosen)
    for b, (i, j) in enumerate(chosen.tolist()):
        assert torch.equal(first[b], views[b, i]) and torch.equal(second[b], views[b, j])


@pytest.mark.parametrize("training", [True, False])
def test_selection_is_the_hardest_pair_of_one_forward_pass_over_all_views(method, training):
    views = torch.randn(7, 4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    method.train(training)
    with torch.no_grad():
        projections = copy.deepcopy(method).project(views.flatten(0, 1)).view(7, 4, -1)
    expected = []
    for z in F.normalize(projections.double(), dim=2):
        expected.append(list(min(itertools.combinations(range(4), 2), key=lambda pair: (z[pair[0]] @ z[pair[1]]).item())))
    assert select_hardest(method, views, 32).tolist() == expected


def test_selection_sees_antialiased_views_and_never_enlarges_them():
    views = torch.rand(2, 3, 3, 96, 96)
    recorder = Recorder()
    select_hardest(recorder, views, 32)
    torch.testing.assert_close(recorder.seen, V.resize(views.flatten(0, 1), [32, 32], antialias=True))
    select_hardest(recorder, views, 128)
    assert torch.equal(recorder.seen, views.flatten(0, 1))


def test_selection_leaves_no_trace(method):
    before = copy.deepcopy(method.state_dict())
    method.backbone.stem[0].weight.requires_grad_(False)
    method.predictor.eval()
    flags = [(m.training, getattr(m, "track_running_stats", None)) for m in method.modules()]
    gradients = [p.requires_grad for p in method.parameters()]
    random_state = torch.get_rng_state()
    views = torch.randn(4, 3, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    kept = views.clone()

    chosen = select_hardest(method, views, 32)

    assert not chosen.requires_grad
    assert all(torch.equal(before[name], value) for name, value in method.state_dict().items())
    assert flags == [(m.training, getattr(m, "track_running_stats", None)) for m in method.modules()]
    assert gradients == [p.requires_grad for p in method.parameters()]
    assert all(p.grad is None for p in method.parameters())
    assert torch.equal(random_state, torch.get_rng_state())
    assert torch.equal(views, kept)


def test_statistics_are_tracked_again_after_an_error(method):
    untracked = nn.BatchNorm1d(3, track_running_stats=False)
    with pytest.raises(ZeroDivisionError):
        with batch_statistics_untracked(nn.ModuleList([method, untracked])):
            1 / 0
    norms = [m for m in method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(norm.track_running_stats for norm in norms)
    assert not untracked.track_running_stats
