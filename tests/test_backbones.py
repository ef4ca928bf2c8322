"""Backbones against timm and torchvision themselves."""

import copy

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.layers import resample_abs_pos_embed
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from ffssl.backbones import BACKBONES, build_backbone, check_resolutions, resample_positions
from ffssl.errors import UserError
from ffssl.methods.teacher import Teacher

VIT = "vit_small_patch16_224"
TINY_VIT = "vit_tiny_patch16_224"


@pytest.mark.parametrize(
    "name, features, parameters",
    [
        ("resnet-small", 256, 1.22e6),
        ("resnet18", 512, 11.18e6),
        ("resnet34", 512, 21.28e6),
        ("resnet50", 2048, 23.51e6),
        ("resnet101", 2048, 42.50e6),
        (VIT, 384, 21.67e6),
        ("vit_base_patch16_224", 768, 85.80e6),
        ("convnext_atto", 320, 3.37e6),
        ("vgg11", 4096, 128.77e6),  # has a submodule `features`
        ("mobilenetv3_small_050", 1024, 0.57e6),  # has a layer after the pooling
    ],
)
def test_a_backbone_has_the_size_and_the_features_that_are_known(name, features, parameters):
    with torch.device("meta"):
        backbone = build_backbone(name)
    assert backbone.features == features
    assert sum(p.numel() for p in backbone.parameters()) == pytest.approx(parameters, rel=0.01)
    check_resolutions(name, backbone, {96: "--resolution.min", 224: "--resolution.max"})


def test_every_name_that_we_list_is_known():
    assert set(BACKBONES) - {"resnet-small"} <= {
        *torchvision.models.list_models(),
        *timm.list_models(),
    }


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "resnet19",
            (
                r"unknown backbone 'resnet19'; known are resnet-small, .* and the models of "
                r"timm; did you mean resnet18 or"
            ),
        ),
        ("vit_smal_patch16_224", f"did you mean {VIT}"),
        ("zzzz", "the models of timm$"),
    ],
)
def test_an_unknown_name_is_answered_with_those_that_are_close(name, message):
    with pytest.raises(UserError, match=message):
        build_backbone(name)


# Vision transformers


# With one prefix token that has a position, with two, and with one that has none; and one that timm
# resizes by default.
@pytest.mark.parametrize(
    "name, side",
    [
        (TINY_VIT, 96),
        (TINY_VIT, 224),
        (TINY_VIT, 256),
        ("deit_tiny_distilled_patch16_224", 96),
        ("deit3_small_patch16_224", 96),
        ("test_vit", 96),
    ],
)
def test_a_vision_transformer_is_timms_at_any_size(name, side):
    torch.manual_seed(0)
    backbone = build_backbone(name)
    theirs = timm.create_model(name, num_classes=0, dynamic_img_size=True)
    for p in backbone.parameters():
        nn.init.normal_(p, std=0.1)
    theirs.load_state_dict(backbone.network.state_dict())
    backbone.eval(), theirs.eval()
    images, direction = torch.randn(2, 3, side, side), torch.randn(backbone.features)
    ours, expected = backbone(images), theirs(images)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    (ours @ direction).sum().backward()
    (expected @ direction).sum().backward()
    for (name, p), q in zip(backbone.network.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(
            p.grad, q.grad, rtol=1e-3, atol=1e-4 * q.grad.abs().max().item(), msg=name
        )


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("new", [(6, 6), (10, 14), (14, 14), (20, 20)])
@pytest.mark.parametrize("half", [False, True])
def test_resampled_positions_and_their_gradient_are_timms(prefix, new, half):
    torch.manual_seed(1)
    ours = torch.randn(1, prefix + 14 * 14, 24, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        a = resample_positions(ours, (14, 14), new)
    b = resample_abs_pos_embed(theirs, new, (14, 14), num_prefix_tokens=prefix)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    weights = torch.randn_like(a)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-5)


def test_positions_are_interpolated_once_for_each_size(monkeypatch):
    calls = []
    interpolate = nn.functional.interpolate
    monkeypatch.setattr(
        nn.functional, "interpolate", lambda *a, **k: calls.append(a) or interpolate(*a, **k)
    )
    backbone = build_backbone(TINY_VIT)
    for side in (48, 48, 64, 48, 48, 64):
        backbone(torch.zeros(1, 3, side, side))
    assert len(calls) <= 2  # fewer where another test had the size


def test_evaluation_in_inference_mode_leaves_training_possible():
    backbone = build_backbone(TINY_VIT)
    with torch.inference_mode():
        backbone(torch.zeros(1, 3, 80, 80))
    backbone(torch.zeros(1, 3, 80, 80)).sum().backward()
    assert backbone.network.pos_embed.grad is not None


def test_a_vision_transformer_has_no_batch_norm_and_its_copy_resizes_alone():
    backbone = build_backbone(TINY_VIT)
    assert not any(isinstance(m, _BatchNorm) for m in backbone.modules())
    clone = copy.deepcopy(backbone)
    assert clone(torch.zeros(1, 3, 64, 64)).shape == (1, 192)
    assert backbone.network.patch_embed.grid_size == (14, 14)
    clone.load_state_dict(backbone.state_dict())  # whatever size it saw last


def test_what_a_vision_transformer_costs_is_known():
    # 4.6 GMAC, published for DeiT-S.
    assert forward_flops(VIT, 224) == pytest.approx(2 * 4.6e9, rel=0.02)


def test_stochastic_depth_is_of_training_alone_and_rises_with_the_depth():
    backbone, plain = build_backbone(TINY_VIT, drop_path=0.3), build_backbone(TINY_VIT)
    plain.load_state_dict(backbone.state_dict())
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(backbone.eval()(images), plain.eval()(images))
        first, second = (backbone.train()(images) for _ in range(2))
    assert not torch.equal(first, second)
    rates = [getattr(block.drop_path2, "drop_prob", 0) for block in backbone.network.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.3, 12), atol=1e-6)


def test_a_teacher_has_no_stochastic_depth():
    student = build_backbone(TINY_VIT, drop_path=0.9)
    teacher, images = Teacher(student).train(), torch.randn(4, 3, 32, 32)
    assert torch.equal(teacher(images), teacher(images))
    with torch.no_grad():
        assert not torch.equal(student(images), student(images))


@pytest.mark.parametrize("name", [TINY_VIT, "test_vit"])
def test_patches_are_dropped_as_by_timm(name):
    torch.manual_seed(0)
    backbone, images = build_backbone(name, patch_drop=0.3), torch.randn(4, 3, 96, 96)
    theirs = timm.create_model(name, num_classes=0, dynamic_img_size=True, patch_drop_rate=0.3)
    theirs.load_state_dict(backbone.network.state_dict())
    for mode in (True, False):
        outputs = []
        for network in (backbone.train(mode), theirs.train(mode)):
            torch.manual_seed(1)
            outputs.append(network(images))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def tokens_seen(network, images):
    """The sequence (N, tokens, width) that the first block of a vision transformer is given."""
    seen, [block] = [], [m for name, m in network.named_modules() if name.endswith("blocks.0")]
    hook = block.register_forward_pre_hook(lambda block, given: seen.append(given[0]))
    with torch.no_grad():
        network(images)
    hook.remove()
    [tokens] = seen
    return tokens


@pytest.mark.parametrize(
    "name, prefix, side, share, kept",
    [
        (TINY_VIT, 1, 64, 0.5, 8),
        (TINY_VIT, 1, 64, 0.3, 11),
        (TINY_VIT, 1, 48, 0.5, 4),
        (TINY_VIT, 1, 16, 0.9, 1),
        ("deit_tiny_distilled_patch16_224", 2, 64, 0.5, 8),
    ],
)
def test_a_student_sees_some_patches_of_each_image_and_evaluation_and_teacher_all(
    name, prefix, side, share, kept
):
    torch.manual_seed(0)
    student, images = build_backbone(name, patch_drop=share), torch.randn(6, 3, side, side)
    teacher = Teacher(student).train()
    every, some = (tokens_seen(student.train(mode), images) for mode in (False, True))
    assert every.shape == (6, prefix + (side // 16) ** 2, 192)
    assert torch.equal(tokens_seen(teacher, images), every)
    # Where each token that is left was, by comparing it with all.
    where = (some[:, :, None] == every[:, None]).all(-1)
    assert where.shape[1] == prefix + kept and (where.sum(2) == 1).all()
    assert (where.sum(1) <= 1).all()
    assert where[:, range(prefix), range(prefix)].all()  # the tokens that are no patches stay
    if side > 16:
        assert len({tuple(places) for places in where.any(1).tolist()}) > 1


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet-small", "vgg11", "swin_tiny_patch4_window7_224"]
)
def test_dropping_patches_is_refused_where_there_are_none(name):
    message = f"model.patch_drop: {name} can't drop patches; leave it 0, or take a vision"
    with pytest.raises(UserError, match=message), torch.device("meta"):
        build_backbone(name, patch_drop=0.5)


@pytest.mark.parametrize("name", ["resnet18", "resnet-small", "vgg11"])
def test_stochastic_depth_is_refused_where_there_is_none(name):
    message = f"model.drop_path: {name} has no stochastic depth"
    with pytest.raises(UserError, match=message), torch.device("meta"):
        build_backbone(name, drop_path=0.1)


def forward_flops(name, side, **options):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build_backbone(name, **options)(torch.empty(1, 3, side, side))
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "name, sides, message",
    [
        (
            VIT,
            {96: "--resolution.min", 100: "--resolution.max"},
            (
                "--resolution.max: vit_small_patch16_224 can't take views of 100 px: its "
                "patches of 16 px do not"
            ),
        ),
        (
            "swin_tiny_patch4_window7_224",
            {96: "--resolution.min", 224: "--resolution.max"},
            "--resolution.min: swin_tiny.* can't take views of 96 px",
        ),
    ],
)
def test_views_that_a_backbone_cannot_take_are_named(name, sides, message):
    with pytest.raises(UserError, match=message) as error, torch.device("meta"):
        check_resolutions(name, build_backbone(name), sides)
    assert "\n" not in str(error.value)


# ResNets


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_zero_init_residual_makes_every_block_the_identity(name):
    def last_norms(backbone):
        return [
            m.bn3 if hasattr(m, "bn3") else m.bn2 for m in backbone.modules() if hasattr(m, "bn2")
        ]

    assert all(
        (norm.weight == 0).all()
        for norm in last_norms(build_backbone(name, zero_init_residual=True))
    )
    assert all((norm.weight == 1).all() for norm in last_norms(build_backbone(name)))


@pytest.mark.parametrize("stem, stride", [("imagenet", 32), ("cifar", 8)])
def test_the_stem_decides_the_stride(stem, stride):
    backbone = build_backbone("resnet18", stem=stem)
    sizes = []
    backbone.layer4.register_forward_hook(lambda *args: sizes.append(args[2].shape[-1]))
    assert backbone(torch.zeros(2, 3, 32, 32)).shape == (2, 512)
    assert sizes == [32 // stride]


def test_a_cifar_stem_costs_what_is_known_and_is_for_resnets_only():
    # 0.56 GMAC is the usual figure.
    assert forward_flops("resnet18", 32, stem="cifar") == pytest.approx(2 * 0.556e9, rel=0.01)
    for name in (VIT, "resnet-small"):
        with pytest.raises(
            UserError, match=f"model.stem: {name} has no cifar stem; resnet18, .* have one"
        ):
            build_backbone(name, stem="cifar")
