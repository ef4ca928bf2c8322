import pytest
import torch
from small_runs import save_run

from ffssl.embed.encoder import load_encoder
from ffssl.errors import UserError
from ffssl.export.__main__ import export
from ffssl.load import fingerprint


@pytest.mark.parametrize(
    "backbone, to, output",
    [
        ("resnet18", "torchvision", "a.pth"),
        ("resnet18", "timm", "a.pt"),
        ("resnet18", "huggingface", "a"),
        ("resnet-small", "safetensors", "a.safetensors"),
        ("vit_tiny_patch16_224", "safetensors", "a.safetensors"),
        ("vit_tiny_patch16_224", "huggingface", "a"),
    ],
)
def test_an_exported_encoder_is_that_of_its_run(tmp_path, backbone, to, output):
    method = save_run(tmp_path / "run", f"--model.backbone={backbone}", "--resolution.max=64")
    export(tmp_path / "run", to, tmp_path / output)
    for path, network in ((tmp_path / "run", "student"), (tmp_path / output, "")):
        encoder = load_encoder(path)
        assert encoder.weights == fingerprint(method.backbone)
        assert (encoder.name, encoder.network, encoder.resolution) == (backbone, network, 64)
        assert not any(module.training for module in encoder.backbone.modules())
        assert not any(p.requires_grad for p in encoder.backbone.parameters())
    assert load_encoder(tmp_path / output, resolution=96).resolution == 96


def test_the_teachers_backbone_by_name(tmp_path):
    method = save_run(tmp_path, "--method.name=byol", "--method.predictor=8")
    with torch.no_grad():
        method.teacher.layers[0].stem[0].weight.add_(1)
    found = load_encoder(tmp_path, network="teacher")
    assert found.network == "teacher" and found.name == "resnet-small"


def test_without_a_card_the_backbone_must_be_named(tmp_path):
    save_run(tmp_path / "run", "--model.backbone=resnet18", "--model.stem=cifar")
    export(tmp_path / "run", "safetensors", tmp_path / "a.safetensors")
    card = tmp_path / "a.safetensors.md"
    assert load_encoder(tmp_path / "a.safetensors").stem == "cifar"
    card.write_text("```yaml\nmodel: [\n```\n")
    refused(tmp_path, r"a\.safetensors\.md: the card can't be read")
    card.write_text("```yaml\nmodel: 3\n```\n")
    refused(tmp_path, r"a\.safetensors\.md: its options are not sections")
    card.unlink()
    refused(tmp_path, "no card beside it says which backbone .*name it with --backbone")
    refused(tmp_path, "the side of its images; name it with --resolution", backbone="resnet18")
    refused(
        tmp_path,
        r"does not fit resnet18: .*conv1.weight is \(64, 3, 3, 3\), not \(64, 3, 7, 7\)",
        backbone="resnet18",
        resolution=64,
    )
    refused(tmp_path, "unknown backbone 'resnet19'", backbone="resnet19", resolution=64)
    refused(tmp_path, "holds one network alone", network="teacher", **CIFAR)
    assert load_encoder(tmp_path / "a.safetensors", **CIFAR).resolution == 64


CIFAR = {"backbone": "resnet18", "stem": "cifar", "resolution": 64}


def refused(folder, message, **settings):
    with pytest.raises(UserError, match=message) as error:
        load_encoder(folder / "a.safetensors", **settings)
    assert "\n" not in str(error.value)
