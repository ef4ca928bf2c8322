import copy
import itertools

import pytest
import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import functional as V

from ffssl import hardest_views, to_input
from ffssl.backbones import SmallResNet
from ffssl.data.normalise import MEAN, STD
from ffssl.errors import UserError

IMAGES, VIEWS, SIDE = 5, 4, 24


class SimSiam(nn.Module):
    """As lightly's example has it, over a small network."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(SmallResNet((8, 16)), nn.Dropout(dropout))
        self.projector = SimSiamProjectionHead(16, 16, 8)
        self.predictor = SimSiamPredictionHead(8, 4, 8)

    def forward(self, x):
        z = self.projector(self.backbone(x))
        return z.detach(), self.predictor(z)


def views_of(dtype=torch.uint8, images=IMAGES, views=VIEWS):
    generator = torch.Generator().manual_seed(1)
    levels = torch.randint(0, 256, (images, views, 3, SIDE, SIDE), generator=generator)
    return levels.to(torch.uint8) if dtype == torch.uint8 else (levels / 255).to(dtype)


def training_loss(a, b):
    (z0, p0), (z1, p1) = a, b
    return -(F.cosine_similarity(p0, z1) + F.cosine_similarity(p1, z0)) / 2


def brute_force(images, views, loss):
    """The pair of the largest loss, image by image and pair by pair."""
    chosen = []
    for image in range(len(images)):
        losses = {
            (i, j): loss(images[image : image + 1, i], images[image : image + 1, j]).item()
            for i, j in itertools.combinations(range(images.shape[1]), 2)
        }
        i, j = max(losses, key=losses.get)
        chosen.append((views[image, i], views[image, j]))
    return tuple(torch.stack(side) for side in zip(*chosen))


def assert_pairs(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["uint8", "floats", "list", "few pixels"])
def test_the_pair_has_the_largest_loss_of_all_as_lightlys_criterion_has_it(kind):
    # In eval mode what a view gives does not depend on the others.
    model, criterion = SimSiam().eval(), NegativeCosineSimilarity()
    views = views_of(torch.uint8 if kind == "uint8" else torch.float32)
    side = 99 if kind == "few pixels" else 12  # views are never enlarged

    def normalised(images):
        return V.normalize(images / 255 if kind == "uint8" else images, MEAN, STD)

    def loss(first, second):
        (z0, p0), (z1, p1) = model(first), model(second)
        return (criterion(z0, p1) + criterion(z1, p0)) / 2

    with torch.no_grad():
        images = views.flatten(0, 1).float()
        if side < SIDE:
            images = V.resize(images, [side, side], antialias=True)
        expected = brute_force(normalised(images).unflatten(0, views.shape[:2]), views, loss)
    found = hardest_views(
        model,
        list(views.unbind(1)) if kind == "list" else views,
        training_loss,
        resolution=side,
        normalise=to_input if kind == "uint8" else normalised,
    )
    assert_pairs(found, expected)
    assert found[0].dtype == views.dtype


def test_by_default_it_is_the_pair_of_the_least_alike_embeddings():
    network, views = SmallResNet((8, 16)).eval(), views_of(torch.float64)
    with torch.no_grad():
        expected = brute_force(
            views.float(), views, lambda a, b: -F.cosine_similarity(network(a), network(b))
        )
    assert_pairs(
        hardest_views(network, views, resolution=SIDE, normalise=torch.Tensor.float), expected
    )
    # A method of a module, and a function that names its modules, are as good.
    for embed in (network.forward, lambda images: network(images)):
        found = hardest_views(embed, views.float(), resolution=SIDE)
        assert_pairs(found, [side.float() for side in expected])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_step_after_it_is_as_without_it(precision):
    """In training mode, with dropout; the predictor is in the loss, where no argument names it."""

    def step(choosing):
        model = SimSiam(dropout=0.3).train()
        predictor, views = model.predictor, views_of(torch.float32)
        encoder = nn.Sequential(model.backbone, model.projector)
        before = copy.deepcopy(model.state_dict())
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            if choosing:
                hardest_views(
                    encoder,
                    views,
                    lambda z0, z1: -F.cosine_similarity(predictor(z0), z1),
                    resolution=12,
                )
                after = model.state_dict()
                assert all(torch.equal(before[name], after[name]) for name in before)
                assert all(p.grad is None and p.requires_grad for p in model.parameters())
                assert all(module.training for module in model.modules())
            training_loss(model(views[:, 0]), model(views[:, 1])).mean().backward()
        changed = model.state_dict()
        assert not torch.equal(
            *(state["predictor.layers.1.running_mean"] for state in (before, changed))
        )
        return [*changed.values(), *(p.grad for p in model.parameters()), torch.rand(3)]

    for with_it, without in zip(step(True), step(False), strict=True):
        assert torch.equal(with_it, without)


def test_in_training_batchnorm_takes_all_views_as_one_batch():
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3 * SIDE * SIDE)).train()
    seen = []
    network[1].register_forward_hook(lambda module, given, result: seen.append(result))
    hardest_views(network, views_of(torch.float32), resolution=SIDE)
    x = views_of(torch.float64).flatten(0, 1).flatten(1)
    expected = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(seen[0].double(), expected, atol=1e-4, rtol=1e-4)


def test_a_network_of_several_processes_is_not_called_through_its_wrapper(monkeypatch):
    network = SmallResNet((8, 16)).eval()
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = network
    monkeypatch.setattr(type(wrapper), "forward", None)
    views = views_of(torch.float32)
    found = hardest_views(wrapper, views, resolution=12)
    assert_pairs(found, hardest_views(network, views, resolution=12))


NETWORK = SmallResNet((8, 16))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"views": views_of(views=2)}, "2 views of each image leave nothing to choose"),
        ({"views": [torch.rand(5, 3, 8, 8)] * 2}, "2 views of each image"),
        ({"views": []}, r"views of shape \(0,\), must be \(images, views"),
        ({"views": torch.rand(5, 3, 8, 8)}, r"views of shape \(5, 3, 8, 8\), must be"),
        ({"views": [torch.rand(5, 3, s, s) for s in (8, 8, 4)]}, "views of different shapes"),
        ({"views": [1, 2, 3]}, "must be a tensor, or a list of tensors"),
        ({"views": views_of().long()}, "views of torch.int64, must be uint8 or floating"),
        ({"normalise": None}, r"uint8 views need normalise=.*ffssl.to_input"),
        ({"resolution": 0}, "resolution is 0"),
        ({"embed": torch.flatten}, "names no module whose BatchNorm"),
        ({"embed": NETWORK.stem}, None),
        ({"embed": SimSiam()}, "embed gives 2 tensors; say by what loss="),
        ({"loss": lambda a, b: (a - b).square().mean()}, r"loss gives \(\) for 5 images"),
        ({"embed": nn.Sequential(NETWORK, nn.Flatten(0))}, r"embed gives \(320,\) for 20 images"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused_in_one_line(change, message):
    given = {"embed": NETWORK, "views": views_of(), "resolution": 12, "normalise": to_input}
    given |= change
    embed, views = given.pop("embed"), given.pop("views")
    if message is None:  # maps are embeddings, too
        hardest_views(embed, views, **given)
        return
    with pytest.raises(UserError, match=message) as error:
        hardest_views(embed, views, **given)
    assert "\n" not in str(error.value)
