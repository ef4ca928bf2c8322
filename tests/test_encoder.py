import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import Code, save_run
from torchvision.transforms import functional as V

from ffssl import load_backbone
from ffssl.data.normalise import MEAN, STD
from ffssl.errors import UserError
from ffssl.export.__main__ import export
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
    "name, stem, to",
    [
        ("resnet18", "imagenet", "torchvision"),
        ("resnet18", "cifar", "safetensors"),
        ("resnet-small", "imagenet", "safetensors"),
        ("vit_small_patch16_224", "imagenet", "timm"),
    ],
)
def test_an_exported_file_is_known_by_its_weights(tmp_path, name, stem, to):
    method = save_run(tmp_path / "run", f"--model.backbone={name}", f"--model.stem={stem}")
    file = tmp_path / ("weights.safetensors" if to == "safetensors" else "weights.pth")
    export(tmp_path / "run", to, file)
    with torch.no_grad():
        found = load_backbone(file)(LEVELS)
    torch.testing.assert_close(found, by_torchvision(method.backbone), rtol=1e-4, atol=1e-5)


def test_another_network_of_timm_is_named(tmp_path):
    name = "vit_tiny_patch16_224"
    method = save_run(tmp_path / "run", f"--model.backbone={name}")
    export(tmp_path / "run", "timm", tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights.pth: its weights .* none of .*backbone=NAME"):
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
        ("absent.pth", {}, "no such file; name a run's folder, or an exported file"),
        ("text.safetensors", {}, "not readable as safetensors"),
        ("text.pth", {}, "not a readable checkpoint"),
        ("code.pth", {}, "not a readable checkpoint"),
        ("number.pth", {}, "neither a run's checkpoint nor a network's weights"),
        ("more.safetensors", {}, "its weights are those of none of resnet-small, "),
        ("more.safetensors", {"backbone": "resnet-small"}, "are not those of resnet-small: .*more"),
        ("good.safetensors", {"backbone": "resnet18"}, "are not those of resnet18"),
    ):
        with pytest.raises(UserError, match=f"^{tmp_path / name}: .*{message}") as error:
            load_backbone(tmp_path / name, **options)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
