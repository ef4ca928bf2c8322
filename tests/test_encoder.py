import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_runs import Code, save_run
from torchvision.transforms import functional as V

from ffssl import load_backbone
from ffssl.data.normalise import MEAN, STD
from ffssl.encoder import load_trained
from ffssl.errors import UserError
from ffssl.export.__main__ import export
from ffssl.export.model_card import card_path
from ffssl.load import fingerprint
from ffssl.run_folder.checkpoint import NAME

LEVELS = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)


def by_torchvision(network, images=LEVELS):
    """Features of uint8 images, normalised by torchvision."""
    network = network.to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        return network(V.normalize(images.float() / 255, MEAN, STD))


@torch.no_grad()
def test_a_runs_backbone_takes_levels_and_floats(tmp_path):
    method = save_run(tmp_path)
    expected = by_torchvision(method.backbone)
    for path in (tmp_path, str(tmp_path / NAME)):
        encoder = load_backbone(path)
        assert not any(module.training for module in encoder.modules())
        assert encoder.features == expected.shape[1]
        torch.testing.assert_close(encoder(LEVELS), expected)
        torch.testing.assert_close(encoder(LEVELS.float() / 255), expected)
    halved = encoder.bfloat16()
    torch.testing.assert_close(halved(LEVELS).float(), expected, rtol=0.1, atol=0.1)
    with pytest.raises(TypeError, match="images of torch.int64, must be uint8 in 0..255"):
        encoder(LEVELS.long())


def test_the_teachers_backbone_too(tmp_path):
    method = save_run(tmp_path, "--method.name=byol", "--method.predictor=8")
    found = {n: load_backbone(tmp_path, network=n) for n in ("student", "teacher")}
    with torch.no_grad():  # their BatchNorm statistics differ
        student, teacher = (found[network](LEVELS) for network in found)
    torch.testing.assert_close(student, by_torchvision(method.backbone))
    torch.testing.assert_close(teacher, by_torchvision(method.teacher.layers[0]))
    assert not torch.allclose(student, teacher)
    save_run(tmp_path / "simclr")
    with pytest.raises(UserError, match="simclr has no teacher"):
        load_backbone(tmp_path / "simclr", network="teacher")


@pytest.mark.parametrize(
    "name, stem, to, file",
    [
        ("resnet18", "imagenet", "torchvision", "a.pth"),
        ("resnet18", "cifar", "safetensors", "a.safetensors"),
        ("resnet18", "imagenet", "huggingface", "a"),
        ("resnet-small", "imagenet", "safetensors", "a.safetensors"),
        ("vit_small_patch16_224", "imagenet", "timm", "a.pt"),
    ],
)
def test_an_exported_file_is_known_by_its_card_or_by_its_weights(tmp_path, name, stem, to, file):
    settings = [f"--model.backbone={name}", f"--model.stem={stem}", "--resolution.max=64"]
    method = save_run(tmp_path / "run", *settings, "--data.scaled_decoding=false")
    export(tmp_path / "run", to, tmp_path / file)
    trained = load_trained(tmp_path / file)
    assert trained.weights == fingerprint(method.backbone)
    known = (trained.name, trained.stem, trained.network, trained.resolution)
    assert known == (name, stem, "", 64) and not trained.scaled_decoding
    card_path(tmp_path / file, to).unlink()
    assert load_trained(tmp_path / file).resolution is None
    with torch.no_grad():
        found = load_backbone(tmp_path / file)(LEVELS)
    torch.testing.assert_close(found, by_torchvision(method.backbone), rtol=1e-4, atol=1e-5)


def test_a_card_that_is_damaged_is_named(tmp_path):
    save_run(tmp_path / "run")
    export(tmp_path / "run", "safetensors", tmp_path / "a.safetensors")
    for text, message in (
        ("```yaml\nmodel: [\n```\n", "the card can't be read"),
        ("```yaml\nmodel: 3\n```\n", "its options are not sections"),
    ):
        (tmp_path / "a.safetensors.md").write_text(text)
        with pytest.raises(UserError, match=rf"a\.safetensors\.md: {message}"):
            load_backbone(tmp_path / "a.safetensors")


def test_another_network_of_timm_is_named(tmp_path):
    name = "vit_tiny_patch16_224"
    method = save_run(tmp_path / "run", f"--model.backbone={name}")
    export(tmp_path / "run", "timm", tmp_path / "weights.pth")
    card_path(tmp_path / "weights.pth", "timm").unlink()
    with pytest.raises(UserError, match=r"weights.pth: no card .* none of .*backbone=NAME"):
        load_backbone(tmp_path / "weights.pth")
    with torch.no_grad():
        found = load_backbone(tmp_path / "weights.pth", backbone=name)(LEVELS)
    torch.testing.assert_close(found, by_torchvision(method.backbone), rtol=1e-4, atol=1e-5)


def test_what_is_no_encoder_is_refused_in_one_line_and_runs_no_code(tmp_path):
    save_run(tmp_path / "run")
    export(tmp_path / "run", "safetensors", tmp_path / "good.safetensors")
    weights = load_file(tmp_path / "good.safetensors")
    save_file(weights | {"more": torch.zeros(2)}, tmp_path / "more.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    (tmp_path / "text.pth").write_text("text")
    torch.save({"weight": Code(tmp_path / "ran")}, tmp_path / "code.pth")
    torch.save({"weight": 3}, tmp_path / "number.pth")
    for name, options, message in (
        ("absent.pth", {}, "no such run"),
        ("text.safetensors", {}, "damaged, or not a file of weights"),
        ("text.pth", {}, "damaged, or not a file of weights"),
        ("code.pth", {}, "holds .*, which could run code"),
        ("number.pth", {}, "holds no state dict"),
        ("more.safetensors", {}, "its weights are those of none of resnet-small, "),
        ("more.safetensors", {"backbone": "resnet-small"}, "does not fit resnet-small: .*more"),
        ("good.safetensors", {"backbone": "resnet18"}, "none of its 72 tensors fits resnet18"),
    ):
        with pytest.raises(UserError, match=f"^{tmp_path / name}: .*{message}") as error:
            load_backbone(tmp_path / name, **options)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
