"""A folder for Hugging Face's hub, as timm loads it."""

import json

import pytest
import timm
import torch
import yaml
from support.small_runs import save_run

from ffssl.errors import UserError
from ffssl.evaluate.results import add_result
from ffssl.export.__main__ import export
from ffssl.load import fingerprint


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "vit_tiny_patch16_224"])
def test_timm_loads_the_folder_with_the_features_of_the_run(tmp_path, monkeypatch, backbone):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    method = save_run(tmp_path / "run", f"--model.backbone={backbone}", "--resolution.max=96")
    export(tmp_path / "run", "huggingface", tmp_path / "hub")
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    network = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    ours = method.backbone.to(memory_format=torch.contiguous_format)
    for side in (96, 224):
        images = torch.randn(1, 3, side, side)
        torch.testing.assert_close(network(images), ours(images), atol=1e-5, rtol=1e-5)
    data = timm.data.resolve_model_data_config(network)
    assert tuple(data["input_size"]) == (3, 96, 96) and data["crop_pct"] == 224 / 256
    assert tuple(data["mean"]) == (0.485, 0.456, 0.406)
    classifier = timm.create_model(
        f"local-dir:{tmp_path / 'hub'}", pretrained=True, num_classes=10
    ).eval()
    assert classifier(images).shape == (1, 10)
    features = classifier.forward_head(classifier.forward_features(images), pre_logits=True)
    torch.testing.assert_close(features, ours(images), atol=1e-5, rtol=1e-5)


def test_the_card_begins_with_what_the_hub_reads(tmp_path):
    beton = tmp_path / "train.beton"
    method = save_run(tmp_path / "run", "--model.backbone=resnet18", f"--data.train={beton}")
    export(tmp_path / "run", "huggingface", tmp_path / "plain")
    _, front, card = (tmp_path / "plain" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["timm", "ffssl", "self-supervised-learning", "simclr"],
    }
    assert 'timm.create_model("local-dir:plain", pretrained=True)' in card
    about = {"samples": 9469, "class_names": None, "sha256": "0", "source": {"kind": "Imagenette"}}
    beton.with_name("train.beton.json").write_text(json.dumps(about))
    settings = {"k": 20, "temperature": 0.07, "resolution": 32, "precision": "float32"}
    record = {
        "evaluation": "knn",
        "checkpoint": "checkpoint.pt",
        "epoch": 3,
        "network": "student",
        "weights": fingerprint(method.backbone),
        "settings": settings,
        "data": {"validation": {"file": "val.beton", "images": 40}},
        "machine": "",
        "scores": {"top1": 0.87654, "top5": None},
    }
    add_result(tmp_path / "run", record)
    export(tmp_path / "run", "huggingface", tmp_path / "full", licence="apache-2.0")
    front = yaml.safe_load((tmp_path / "full" / "README.md").read_text().split("---\n")[1])
    assert front["license"] == "apache-2.0" and front["datasets"] == ["frgfm/imagenette"]
    assert front["metrics"] == ["accuracy"]
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"] == {"name": "val.beton", "type": "val.beton"}
    (metric,) = result["metrics"]
    assert metric["value"] == 87.65 and metric["name"].startswith("top1 (knn, k = 20, T = 0.07;")


def test_what_can_not_be_written_is_told_in_a_line(tmp_path):
    save_run(tmp_path / "run", "--model.backbone=resnet18")
    save_run(tmp_path / "small")
    (tmp_path / "file").write_text("kept")
    for run, to, output, licence, message in (
        ("run", "huggingface", "file", None, "--output: .*file: is a file; for huggingface name a"),
        ("run", "timm", "a.pth", "mit", "--licence: only the card for huggingface states it"),
        ("small", "huggingface", "a", None, "--to: huggingface has no resnet-small; choose"),
    ):
        with pytest.raises(UserError, match=message):
            export(tmp_path / run, to, tmp_path / output, licence=licence)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run", "small"]
