"""Files of weights against torchvision's and timm's own loading."""

import pickle
import re

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from support.small_runs import Code, save_run
from timm.layers import resample_abs_pos_embed

from ffssl.backbones import build_backbone
from ffssl.errors import UserError
from ffssl.weights import load_weights, read_weights

TINY_VIT = "vit_tiny_patch16_224"


def written(path, tensors):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_torchvisions_weights_give_its_features_and_its_classifier_is_told(tmp_path, name):
    torch.manual_seed(1)
    theirs = torchvision.models.resnet18().eval()
    path = written(tmp_path / name, theirs.state_dict())
    backbone = build_backbone("resnet18").eval()
    fit = load_weights(backbone, "resnet18", read_weights(path))
    assert set(fit.heads) == {"fc.weight", "fc.bias"} and not fit.ignored and not fit.left
    theirs.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(backbone(images), theirs(images))


@torch.no_grad()
@pytest.mark.parametrize("name", [TINY_VIT, "convnext_atto", "deit_tiny_distilled_patch16_224"])
def test_timms_weights_give_its_features(tmp_path, name):
    torch.manual_seed(2)
    theirs = timm.create_model(name).eval()
    path = written(tmp_path / "a.safetensors", theirs.state_dict())
    backbone = build_backbone(name).eval()
    fit = load_weights(backbone, name, read_weights(path))
    assert fit.heads and not fit.ignored and not fit.left and not fit.resampled
    theirs.reset_classifier(0)
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(backbone(images), theirs(images), atol=1e-5, rtol=1e-5)


def test_positions_of_another_resolution_are_interpolated_as_timm_does():
    torch.manual_seed(3)
    theirs = timm.create_model(TINY_VIT, img_size=96).state_dict()
    theirs["pos_embed"].normal_()
    backbone = build_backbone(TINY_VIT)
    fit = load_weights(backbone, TINY_VIT, theirs)
    assert fit.resampled == ["pos_embed"] and not fit.left
    expected = resample_abs_pos_embed(theirs["pos_embed"], [14, 14], num_prefix_tokens=1)
    torch.testing.assert_close(backbone.network.pos_embed.data, expected)
    odd = theirs | {"pos_embed": torch.zeros(1, 1 + 35, 192)}
    with pytest.raises(UserError, match=r"pos_embed is \(1, 36, 192\), not \(1, 197, 192\)"):
        load_weights(backbone, TINY_VIT, odd)


def test_names_may_have_the_prefixes_of_training_programs_and_old_files_lack_counters(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    named = {
        f"module._orig_mod.{name}": tensor
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")
    }
    path = written(tmp_path / "a.pth", {"state_dict": named, "epoch": 3})
    fit = load_weights(build_backbone("resnet18"), "resnet18", read_weights(path))
    assert not fit.left and not fit.ignored
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_weights(tmp_path / "old.pth").keys() == state.keys()


def test_what_does_not_fit_is_named_and_refused_unless_a_part_is_enough():
    state = build_backbone("resnet18").state_dict()
    changed = {name: tensor for name, tensor in state.items() if name != "bn1.bias"}
    changed |= {"extra": torch.zeros(1), "conv1.weight": torch.zeros(64, 3, 3, 3)}
    backbone = build_backbone("resnet18")
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_weights(backbone, "resnet18", changed)
    assert str(error.value) == (
        "does not fit resnet18: of its tensors 118 fit; 1 of other shapes (conv1.weight is "
        "(64, 3, 3, 3), not (64, 3, 7, 7)), 1 not in it (bn1.bias), 1 not in the network (extra)"
    )
    assert all(torch.equal(before[n], t) for n, t in backbone.state_dict().items())
    fit = load_weights(backbone, "resnet18", changed, partial=True)
    assert (fit.left, fit.ignored) == (["conv1.weight", "bn1.bias"], ["extra", "conv1.weight"])
    for name, tensor in backbone.state_dict().items():
        source = before if name in fit.left else changed
        assert torch.equal(tensor, source[name]), name
    with pytest.raises(UserError, match=r"none of its 1 tensors fits resnet18: stem\.0\.weight"):
        load_weights(backbone, "resnet18", {"stem.0.weight": torch.zeros(1)}, partial=True)


@pytest.mark.parametrize("old", [False, True])
def test_code_in_a_file_is_named_and_not_run(tmp_path, old):
    content, path = {"conv1.weight": Code(tmp_path / "ran")}, tmp_path / "a.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    refused(path, r"not loaded: it holds posix\.mkdir, which could run code")
    path.write_bytes(pickle.dumps(content))
    refused(path, "damaged, or not a file of weights")
    assert not (tmp_path / "ran").exists()


def test_a_whole_network_is_not_loaded(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"it holds torch\.nn\.modules\.linear\.Linear, .*alone$"):
        read_weights(tmp_path / "a.pth")


def test_damaged_and_other_files_are_named_in_a_line(tmp_path):
    state = {"a": torch.arange(1000.0)}
    for name, message in (("a.pth", "damaged, or not a file"), ("a.safetensors", "damaged, or")):
        path = written(tmp_path / name, state)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        refused(path, message)
        path.write_bytes(b"")
        refused(path, message)
    path = written(tmp_path / "a.pth", state)
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 1  # torch.load would not notice
    path.write_bytes(flipped)
    refused(path, "damaged, or not a file")
    refused(written(tmp_path / "b.pth", [torch.zeros(1)]), "holds no state dict")
    refused(written(tmp_path / "b.pth", {"a": 1}), "holds no state dict")
    refused(tmp_path / "absent.pth", "can't be read: No such file or directory")
    refused(tmp_path, "is a folder; name a file of weights in it")
    save_run(tmp_path / "run")
    refused(tmp_path / "run" / "checkpoint.pt", "is the checkpoint of a run; .*ffssl.export")


def refused(path, message):
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: {message}") as error:
        read_weights(path)
    assert "\n" not in str(error.value)
