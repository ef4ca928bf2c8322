import json
import re
import sys

import pytest
import torch
from support.small_runs import save_run

from ffssl.config.command_line import exit_status
from ffssl.evaluate.results import add_result
from ffssl.export.__main__ import main
from ffssl.load import fingerprint


def export(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["export", *map(str, words)])
    return exit_status(main)


def loaded_by_the_cards_code(path, monkeypatch):
    """The backbone that the model card's Python makes of the file, run as it stands."""
    (code,) = re.findall(
        r"^```python\n(.*?)^```$",
        path.with_name(path.name + ".md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    monkeypatch.chdir(path.parent)
    scope = {}
    exec(code, scope)
    return scope["backbone"]


@pytest.mark.parametrize(
    "backbone, stem, to",
    [
        ("resnet18", "imagenet", "torchvision"),
        ("resnet18", "imagenet", "timm"),
        ("resnet18", "imagenet", "safetensors"),
        ("resnet50", "imagenet", "torchvision"),
        ("resnet50", "imagenet", "timm"),
        ("vit_small_patch16_224", "imagenet", "timm"),
        ("vit_small_patch16_224", "imagenet", "safetensors"),
        ("resnet18", "cifar", "safetensors"),
        ("resnet-small", "imagenet", "safetensors"),
    ],
)
@torch.no_grad()
def test_the_file_gives_the_features_of_the_run(tmp_path, monkeypatch, backbone, stem, to):
    side = 96 if backbone.startswith("vit") else 64
    method = save_run(
        tmp_path / "run",
        f"--model.backbone={backbone}",
        f"--model.stem={stem}",
        f"--resolution.max={side}",
    )
    path = tmp_path / ("weights.safetensors" if to == "safetensors" else "weights.pth")
    assert export(monkeypatch, tmp_path / "run", "--to", to, "--output", path) == 0
    images = torch.randn(2, 3, side, side)
    network = loaded_by_the_cards_code(path, monkeypatch).eval()
    features = method.backbone.to(memory_format=torch.contiguous_format)(images)
    tolerance = 1e-5 if backbone.startswith("vit") else 0  # its position embeddings are resampled
    torch.testing.assert_close(network(images), features, atol=tolerance, rtol=tolerance)
    if to != "safetensors":
        assert all(
            isinstance(tensor, torch.Tensor)
            for tensor in torch.load(path, weights_only=True).values()
        )


def test_torchvisions_network_lacks_only_its_classifier(tmp_path, monkeypatch):
    import torchvision

    save_run(tmp_path / "run", "--model.backbone=resnet18", "--resolution.max=64")
    assert (
        export(
            monkeypatch,
            tmp_path / "run",
            "--to",
            "torchvision",
            "--output",
            tmp_path / "weights.pth",
        )
        == 0
    )
    left = torchvision.models.resnet18().load_state_dict(
        torch.load(tmp_path / "weights.pth", weights_only=True), strict=False
    )
    assert left.missing_keys == ["fc.weight", "fc.bias"] and not left.unexpected_keys


@torch.no_grad()
def test_the_teacher_by_option(tmp_path, monkeypatch):
    method = save_run(tmp_path / "run", "--method.name=byol", "--method.predictor=8")
    path, images = tmp_path / "teacher.safetensors", torch.randn(2, 3, 32, 32)
    assert (
        export(
            monkeypatch,
            tmp_path / "run",
            "--to",
            "safetensors",
            "--output",
            path,
            "--network",
            "teacher",
        )
        == 0
    )
    features = loaded_by_the_cards_code(path, monkeypatch).eval()(images)
    assert torch.equal(
        features, method.teacher.layers[0].to(memory_format=torch.contiguous_format)(images)
    )
    assert not torch.equal(features, method.backbone(images))


def record(weights, top1):
    data = {name: {"file": f"{name}.beton", "images": 40} for name in ("train", "validation")}
    settings = {
        "k": 20,
        "temperature": 0.07,
        "resolution": 32,
        "classes": 8,
        "precision": "float32",
    }
    return {
        "evaluation": "knn",
        "checkpoint": "checkpoint.pt",
        "epoch": 2,
        "network": "student",
        "weights": weights,
        "settings": settings,
        "data": data,
        "machine": "",
        "scores": {"top1": top1},
    }


def test_the_card_has_what_was_recorded_of_these_weights_and_nothing_else(tmp_path, monkeypatch):
    method = save_run(
        tmp_path / "run",
        "--data.train=/home/someone/photos.beton",
        "--data.validation=/home/someone/labelled.beton",
        "--run.seed=41",
        "--training.schedule=f1-clr",
        "--training.warmup_epochs=1",
        epoch=2,
    )
    (tmp_path / "run" / "log.jsonl").write_text(
        "".join(
            json.dumps(
                {"epoch": e, "knn": 0.1 * e + 0.0123}
                | {"linear_top1": 0.1 * e + 0.0234, "linear_top5": 0.1 * e + 0.0345}
            )
            + "\n"
            for e in (1, 2, 3)
        )
    )
    add_result(tmp_path / "run", record(fingerprint(method.backbone), 0.8765))
    add_result(tmp_path / "run", record("of others", 0.4321))
    for network in ("student", "teacher"):
        path = tmp_path / f"{network}.safetensors"
        status = export(
            monkeypatch,
            tmp_path / "run",
            "--to",
            "safetensors",
            "--output",
            path,
            "--network",
            network,
        )
        assert status == (0 if network == "student" else 2)
    card = (tmp_path / "student.safetensors.md").read_text()
    for fact in (
        "# resnet-small, pre-trained without labels by simclr",
        "2 of 3 epochs: the run had not finished",
        "images: photos.beton\n",
        "seed 41",
        "3.5e+12 FLOPs",
        "12 s of training",
        "schedule: f1-clr",
        "Online kNN after epoch 2: 21.23% (k = 200, T = 0.1",
        "Online linear classifier: top-1 22.34%, top-5 23.45% (",
        "learning rate 0.1 for a batch of 256; centre crops of 32 px of labelled.beton)",
        "87.65%",
        "k = 20, T = 0.07",
    ):
        assert fact in card, fact
    for claim in ("43.21%", "11.23%", "31.23%", "/home/someone", str(tmp_path)):
        assert claim not in card, claim


def test_the_card_of_a_run_within_an_epoch_has_no_score_of_other_weights(tmp_path, monkeypatch):
    save_run(tmp_path / "run", "--data.validation=labelled.beton", epoch=2, steps=5)
    (tmp_path / "run" / "log.jsonl").write_text(json.dumps({"epoch": 2, "knn": 0.2123}) + "\n")
    assert (
        export(
            monkeypatch,
            tmp_path / "run",
            "--to",
            "safetensors",
            "--output",
            tmp_path / "a.safetensors",
        )
        == 0
    )
    card = (tmp_path / "a.safetensors.md").read_text()
    assert (
        "- 2 of 3 epochs and 5 steps of the next: the run had not finished\n" in card
        and "12 s of training, in the 2 epochs\n" in card
    )
    assert "Nothing was recorded of these weights." in card and "21.23%" not in card


def test_a_description_that_can_not_be_read_is_left_out(tmp_path, monkeypatch):
    save_run(tmp_path / "run", f"--data.train={tmp_path / 'images.beton'}")
    (tmp_path / "images.beton.json").mkdir()
    assert (
        export(
            monkeypatch,
            tmp_path / "run",
            "--to",
            "safetensors",
            "--output",
            tmp_path / "a.safetensors",
        )
        == 0
    )
    assert "- images: images.beton\n" in (tmp_path / "a.safetensors.md").read_text()


def test_a_card_without_scores_says_so(tmp_path, monkeypatch):
    save_run(tmp_path / "run")
    assert (
        export(
            monkeypatch,
            tmp_path / "run",
            "--to",
            "safetensors",
            "--output",
            tmp_path / "a.safetensors",
        )
        == 0
    )
    card = (tmp_path / "a.safetensors.md").read_text()
    assert (
        "Nothing was recorded of these weights." in card
        and "%" not in card
        and "- 3 epochs\n" in card
    )


@pytest.mark.parametrize(
    "options, words, message",
    [
        ("", "--to onnx --output a.pth", "argument --to: invalid choice: 'onnx'"),
        (
            "",
            "--to torchvision --output a.pth",
            "--to: torchvision has no resnet-small; choose safetensors, which FFSSL loads",
        ),
        ("", "--to timm --output a.pth", "--to: timm has no resnet-small"),
        (
            "--model.backbone=resnet18 --model.stem=cifar",
            "--to torchvision --output a.pth",
            "torchvision's resnet18 has no cifar stem .3x3, no pooling",
        ),
        (
            "--model.backbone=vit_small_patch16_224",
            "--to torchvision --output a.pth",
            "FFSSL has vit_small_patch16_224 from timm, not from torchvision; choose timm or",
        ),
        (
            "",
            "--to safetensors --output a.pth",
            "a.pth: a file for safetensors must end in .safetensors",
        ),
        (
            "",
            "--to timm --output a.safetensors",
            "a.safetensors: a file for timm must not end in .safetensors",
        ),
        (
            "",
            "--to safetensors --output absent/a.safetensors",
            "absent/a.safetensors can't be written: No such file",
        ),
        (
            "",
            "--to safetensors --output a.safetensors --network teacher",
            "--network: simclr has no teacher; choose student",
        ),
        ("", "--to safetensors", "the following arguments are required: --output"),
    ],
)
def test_mistakes_cost_a_line_and_status_2(tmp_path, monkeypatch, capsys, options, words, message):
    save_run(tmp_path / "run", *options.split())
    monkeypatch.chdir(tmp_path)
    assert export(monkeypatch, "run", *words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and re.search(message, error), (
        error
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
