import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import functional as V

from ffssl.backbones import SmallResNet, build_backbone
from ffssl.data.normalise import MEAN, STD
from ffssl.errors import UserError
from ffssl.hard_augment import (
    Selection,
    batch_statistics_untracked,
    check,
    choose_views,
    hardest_pairs,
    pairs,
    random_pairs,
    selection_losses,
    selection_pass,
    take_pair,
    take_rest,
)
from ffssl.methods import METHODS, build_method
from ffssl.methods.base import Method, cosines

WIDTHS = {"hidden": 32, "projection": 16}
OPTIONS = {
    "simsiam": {**WIDTHS, "predictor": 8},
    "byol": {**WIDTHS, "predictor": 8},
    "simclr": WIDTHS,
    "mocov2plus": {**WIDTHS, "queue": 64},
    "dino": {**WIDTHS, "prototypes": 24},
    "barlow_twins": WIDTHS,
    "vicreg": WIDTHS,
}
WITH_PAIR_LOSSES = ["simsiam", "byol", "simclr", "mocov2plus", "dino", "vicreg"]
WITH_A_TEACHER = ["byol", "mocov2plus", "dino"]
PREDICTING = ["simsiam", "byol", "mocov2plus", "dino"]


def build(name):
    """A method over a small network with dropout, trained a little, so that its teacher is not its
    student and its centre not zero.
    """
    torch.manual_seed(0)
    backbone = SmallResNet((8, 16))
    backbone.stem.append(nn.Dropout(0.1))
    method = build_method(name, backbone, OPTIONS[name]).train()
    with torch.no_grad():
        for i, (key, tensor) in enumerate(method.state_dict().items()):
            if (
                tensor.is_floating_point()
                and (key.startswith("teacher.") or key == "centre")
                and not key.endswith("running_var")
            ):
                tensor += 0.1 * torch.randn(
                    tensor.shape, generator=torch.Generator().manual_seed(i)
                )
    return method


@pytest.fixture
def method():
    return build("simsiam")


def uint8_views(*shape):
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def by_torchvision(views):
    """Normalised in float32, as torchvision does it."""
    return V.normalize(views.flatten(0, -4).float() / 255, MEAN, STD).view(views.shape)


class Recorder(Method):
    """Projects to the image's mean colour, and keeps what it was given."""

    def __init__(self):
        super().__init__(nn.Identity())

    def project(self, images):
        self.seen = images
        return images.mean((2, 3))


def test_pairs_are_all_the_pairs():
    for views in range(2, 9):
        assert pairs(views).tolist() == [
            list(pair) for pair in itertools.combinations(range(views), 2)
        ]


@pytest.mark.parametrize("views", [2, 3, 6, 8])
def test_hardest_pair_is_that_of_the_least_cosine(views):
    projections = torch.randn(40, views, 12, generator=torch.Generator().manual_seed(views))
    for z, chosen in zip(
        projections.double(), hardest_pairs(-cosines(projections, projections)).tolist()
    ):
        cosine = {
            (i, j): torch.dot(z[i] / z[i].norm(), z[j] / z[j].norm()).item()
            for i, j in itertools.combinations(range(views), 2)
        }
        assert tuple(chosen) == min(cosine, key=cosine.get)


def test_mixed_precision_around_it_does_not_change_the_hardest_pair():
    # Alike to within bfloat16's resolution, as the views of an image become in the course of
    # training.
    generator = torch.Generator().manual_seed(0)
    projections = torch.randn(50, 1, 64, generator=generator) + 0.1 * torch.randn(
        50, 6, 64, generator=generator
    )
    with torch.autocast("cpu", torch.bfloat16):
        chosen = hardest_pairs(-cosines(projections, projections))
    assert torch.equal(chosen, hardest_pairs(-cosines(projections, projections)))


def test_random_pairs_are_uniform_over_all_pairs():
    chosen = random_pairs(6000, 4, torch.Generator().manual_seed(0))
    counts = dict.fromkeys(itertools.combinations(range(4), 2), 0)
    for pair in chosen.tolist():
        counts[tuple(pair)] += 1
    assert all(abs(count - 1000) < 4 * (6000 * 1 / 6 * 5 / 6) ** 0.5 for count in counts.values())


@pytest.mark.parametrize("views, policies", [(3, 2), (6, 2), (5, 3)])
def test_only_views_of_different_policies_are_paired(views, policies):
    expected = [
        (i, j) for i, j in itertools.combinations(range(views), 2) if i % policies != j % policies
    ]
    assert sorted(tuple(p) for p in pairs(views, policies=policies).tolist()) == expected
    losses = torch.rand(50, views, views, generator=torch.Generator().manual_seed(0))
    losses = losses + losses.mT
    for one, chosen in zip(losses, hardest_pairs(losses, policies).tolist()):
        assert tuple(chosen) == max(expected, key=lambda pair: one[pair].item())
    drawn = random_pairs(500, views, torch.Generator().manual_seed(0), policies)
    assert {tuple(pair) for pair in drawn.tolist()} == set(expected)


def test_a_share_of_the_images_gets_its_hardest_pair_and_the_others_random_ones(method):
    views = uint8_views(400, 4, 3, 16, 16)
    hardest, _ = selection_pass(method, views, Selection("hard", 16))
    for share in (0.0, 0.25, 0.75):
        chosen, _ = selection_pass(method, views, Selection("hard", 16, share=share), seed=7)
        same = (chosen == hardest).all(1).float().mean().item()
        assert same == pytest.approx(share + (1 - share) / 6, abs=0.08)
        again, _ = selection_pass(method, views, Selection("hard", 16, share=share), seed=7)
        assert torch.equal(chosen, again)


@pytest.mark.parametrize("name", WITH_A_TEACHER)
def test_a_student_in_its_teachers_place_has_the_teachers_losses_once_it_is_its_equal(name):
    method = without_dropout(build(name)).eval()
    views = uint8_views(6, 4, 3, 32, 32)
    by_student, by_method = (Selection("hard", 16, loss) for loss in ("student", "method"))
    losses = selection_losses(method, views, by_student)
    assert not torch.allclose(losses, selection_losses(method, views, by_method), atol=1e-3)
    method.teacher.layers.load_state_dict(nn.Sequential(*method.student()).state_dict())
    torch.testing.assert_close(losses, selection_losses(method, views, by_method))


@pytest.mark.parametrize("name", METHODS)
def test_by_default_a_method_says_what_its_pairs_are_compared_by(name):
    method = without_dropout(build(name))
    views = uint8_views(6, 4, 3, 32, 32)
    loss = "method"
    if name in ("byol", "mocov2plus"):
        loss = "student"
    elif name in ("simclr", "barlow_twins"):
        loss = "cosine"
    default = selection_losses(method, views, Selection("hard", 16))
    assert torch.equal(default, selection_losses(method, views, Selection("hard", 16, loss)))


def test_take_pair_takes_the_chosen_views_of_each_image():
    views = torch.randn(5, 4, 3, 2, 2)
    chosen = torch.tensor([[0, 1], [2, 3], [0, 3], [1, 2], [1, 3]])
    first, second = take_pair(views, chosen)
    for b, (i, j) in enumerate(chosen.tolist()):
        assert torch.equal(first[b], views[b, i]) and torch.equal(second[b], views[b, j])


def without_dropout(method):
    for module in method.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return method


@pytest.mark.parametrize("training", [True, False])
def test_selection_is_the_hardest_pair_of_one_forward_pass_over_all_views(method, training):
    views = uint8_views(7, 4, 3, 32, 32)
    without_dropout(method).train(training)
    with torch.no_grad():
        projections = (
            copy.deepcopy(method).project(by_torchvision(views).flatten(0, 1)).view(7, 4, -1)
        )
    expected = []
    for z in F.normalize(projections.double(), dim=2):
        expected.append(
            list(
                min(
                    itertools.combinations(range(4), 2),
                    key=lambda pair: (z[pair[0]] @ z[pair[1]]).item(),
                )
            )
        )
    chosen, extra = selection_pass(method, views, Selection("hard", 32, "cosine"))
    assert chosen.tolist() == expected and extra is None


@pytest.mark.parametrize("name", WITH_PAIR_LOSSES)
def test_selection_by_the_methods_loss_is_that_of_a_loop_over_images_and_pairs(name):
    # In eval mode a view's outputs do not depend on the others in its batch.
    method = without_dropout(build(name)).eval()
    views = uint8_views(7, 4, 3, 32, 32)
    images = by_torchvision(views)
    losses = {pair: torch.zeros(7) for pair in itertools.combinations(range(4), 2)}
    with torch.no_grad():
        for i, j in losses:
            if name == "vicreg":  # whose other terms do not depend on which views are a pair
                difference = method.project(images[:, i]) - method.project(images[:, j])
                losses[i, j] = 25 * difference.double().square().mean(1)
            # Its loss of an image is among the batch: what the gradient of one image's terms would
            # see.
            elif name == "simclr":
                z = F.normalize(
                    torch.cat([method.project(images[:, i]), method.project(images[:, j])]), dim=1
                )
                similarity = (z @ z.T / method.temperature).fill_diagonal_(float("-inf"))
                terms = F.cross_entropy(similarity, torch.arange(14).roll(7), reduction="none")
                losses[i, j] = (terms[:7] + terms[7:]) / 2
            else:
                for b in range(7):
                    # A copy: it changes queue and centre.
                    losses[i, j][b], _ = copy.deepcopy(method).loss(
                        images[b : b + 1, i], images[b : b + 1, j]
                    )
        chosen, _ = selection_pass(method, views, Selection("hard", 32, "method"))
    expected = [max(losses, key=lambda pair: losses[pair][b].item()) for b in range(7)]
    assert [tuple(pair) for pair in chosen.tolist()] == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("name", PREDICTING)
@pytest.mark.parametrize("loss", ["cosine", "student", "method"])
def test_extra_targets_are_those_of_the_other_views_at_the_selections_side(name, loss):
    method = without_dropout(build(name)).eval()
    views = uint8_views(5, 4, 3, 32, 32)
    images = by_torchvision(views)
    if loss == "student" and name not in WITH_A_TEACHER:
        pytest.skip("has no teacher")
    selection = Selection("hard", 16, loss, extra_targets=True)
    chosen, extra = selection_pass(method, views, selection)
    assert (
        torch.equal(chosen, selection_pass(method, views, Selection("hard", 16, loss))[0])
        and not extra.requires_grad
    )
    for b in range(5):
        rest = [v for v in range(4) if v not in chosen[b].tolist()]
        small = F.interpolate(images[b, rest], (16, 16), mode="bilinear", antialias=True)
        torch.testing.assert_close(extra[b], method.targets(small), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", PREDICTING)
def test_random_pairs_may_have_extra_targets_too(name):
    method = without_dropout(build(name)).eval()
    views = uint8_views(5, 4, 3, 32, 32)
    images = by_torchvision(views)
    selection = Selection("random", 16, extra_targets=True)
    first, second, extra = choose_views(method, views, selection, seed=3)
    chosen = random_pairs(5, 4, torch.Generator().manual_seed(3))
    torch.testing.assert_close(first, images[range(5), chosen[:, 0]])
    torch.testing.assert_close(second, images[range(5), chosen[:, 1]])
    small = F.interpolate(
        take_rest(images, chosen).flatten(0, 1), (16, 16), mode="bilinear", antialias=True
    )
    torch.testing.assert_close(extra.flatten(0, 1), method.targets(small), atol=1e-5, rtol=1e-4)
    assert len(choose_views(method, views, Selection("random", 16))) == 2


def test_without_selection_the_first_two_views_are_trained_on(method):
    views = uint8_views(5, 2, 3, 32, 32)
    first, second = choose_views(method, views)
    torch.testing.assert_close(torch.stack([first, second], dim=1), by_torchvision(views))
    assert first.is_contiguous(memory_format=torch.channels_last)


def test_the_pair_is_in_autocasts_precision_rounded_once(method):
    views = uint8_views(5, 3, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        pair = choose_views(method, views, Selection("hard", 16))
    assert [view.dtype for view in pair] == [torch.bfloat16] * 2
    with torch.autocast("cpu", torch.bfloat16):
        chosen, _ = selection_pass(method, views, Selection("hard", 16))
    for view, exact in zip(pair, take_pair(by_torchvision(views), chosen)):
        # Half of bfloat16's last place.
        torch.testing.assert_close(view.float(), exact, rtol=2**-8, atol=1e-6)


def test_take_rest_takes_the_others_in_their_order():
    values = torch.arange(20).view(2, 5, 2)
    rest = take_rest(values, torch.tensor([[3, 0], [1, 4]]))
    assert rest.tolist() == [values[0, [1, 2, 4]].tolist(), values[1, [0, 2, 3]].tolist()]


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_has_not_is_refused(name):
    method = build(name)
    check(method, Selection("hard"))
    for selection, allowed in (
        (Selection("hard", loss="method"), name in WITH_PAIR_LOSSES),
        (Selection("hard", loss="student"), name in WITH_A_TEACHER),
        (Selection("hard", loss="cosine", extra_targets=True), name in PREDICTING),
    ):
        if allowed:
            check(method, selection)
        else:
            option = "extra_targets" if selection.extra_targets else "loss"
            with pytest.raises(UserError, match=rf"--hard_augment\.{option}: {name}"):
                check(method, selection)


def test_selection_sees_antialiased_views_and_never_enlarges_them():
    views = uint8_views(2, 3, 3, 96, 96)
    recorder = Recorder()
    selection_pass(recorder, views, Selection("hard", 32, "cosine"))
    torch.testing.assert_close(
        recorder.seen, V.resize(by_torchvision(views).flatten(0, 1), [32, 32], antialias=True)
    )
    assert recorder.seen.is_contiguous(memory_format=torch.channels_last)
    selection_pass(recorder, views, Selection("hard", 128, "cosine"))
    torch.testing.assert_close(recorder.seen, by_torchvision(views).flatten(0, 1))


SELECTIONS = [
    Selection("hard", 32, loss, extra, share)
    for loss in ("cosine", "student", "method")
    for extra in (False, True)
    for share in (1, 0.5)
] + [Selection("random", 32, extra_targets=True)]


def supported(name, selection):
    try:
        check(build(name), selection)
    except UserError:
        return False
    return True


@pytest.mark.parametrize(
    "name, selection", [(n, s) for n in METHODS for s in SELECTIONS if supported(n, s)]
)
def test_choosing_views_leaves_no_trace(name, selection):
    method = build(name)
    before = copy.deepcopy(method.state_dict())
    method.backbone.stem[0].weight.requires_grad_(False)
    method.projector.eval()

    def flags():
        return [(m.training, getattr(m, "track_running_stats", None)) for m in method.modules()], [
            p.requires_grad for p in method.parameters()
        ]

    flags_before = flags()
    random_state = torch.get_rng_state()
    views = uint8_views(4, 3, 3, 48, 48)
    kept = views.clone()

    chosen = choose_views(method, views, selection)

    assert not any(tensor.requires_grad for tensor in chosen)
    assert all(torch.equal(before[key], value) for key, value in method.state_dict().items())
    assert flags_before == flags()
    assert all(p.grad is None for p in method.parameters())
    assert torch.equal(random_state, torch.get_rng_state())
    assert torch.equal(views, kept)
    if not selection.extra_targets:
        method(*chosen)
        assert not torch.equal(random_state, torch.get_rng_state())  # dropout does draw


@pytest.mark.parametrize("name", ["simsiam", "dino"])
def test_the_selection_sees_all_patches_of_a_student_that_trains_on_half(name):
    method = build_method(
        name, build_backbone("vit_tiny_patch16_224", patch_drop=0.5), OPTIONS[name]
    )
    lengths = []
    for part, module in method.train().named_modules():
        if part.endswith("blocks.0"):
            who = "teacher" if part.startswith("teacher") else "student"
            module.register_forward_pre_hook(
                lambda block, given, who=who: lengths.append((who, given[0].shape[1]))
            )
    targets = [("teacher", 10)] if name == "dino" else []  # 9 patches and the class token
    for loss in ("method", "cosine"):
        chosen = choose_views(method, uint8_views(2, 3, 3, 48, 48), Selection("hard", 48, loss))
        assert lengths == [("student", 10), *(targets if loss == "method" else [])]
        lengths.clear()
        method.loss(*chosen)
        assert {*lengths} == {("student", 5), *targets}
        lengths.clear()


def test_statistics_are_tracked_again_after_an_error(method):
    untracked = nn.BatchNorm1d(3, track_running_stats=False)
    both = nn.ModuleList([method, untracked])
    with pytest.raises(ZeroDivisionError), batch_statistics_untracked(both):
        1 / 0
    norms = [m for m in method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(norm.track_running_stats for norm in norms)
    assert not untracked.track_running_stats
