"""What a folder for Hugging Face's hub has beside the weights: timm's config.json, front matter."""

import yaml
from torch import nn

from ffssl.backbones import ResizableViT
from ffssl.config import Options
from ffssl.data.beton.description import description_or_empty
from ffssl.data.normalise import MEAN, STD
from ffssl.data.policy import EVALUATION
from ffssl.evaluate.results import describe_settings

# The files' names, as timm looks for them.
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
# Names on the hub of what the converter's sources hold.
DATASETS = {
    "ImageNet": "ILSVRC/imagenet-1k",
    "Imagenette": "frgfm/imagenette",
    "Cifar10": "uoft-cs/cifar10",
}


def timm_config(name: str, backbone: nn.Module, resolution: int) -> dict:
    """Return the content of config.json, from which `timm.create_model` makes the network.

    name: of the backbone, one that timm has. resolution: side of the images in pixels.
    """
    import timm  # takes seconds

    usual = timm.get_pretrained_cfg(name)
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": backbone.features,
        "pretrained_cfg": {
            "input_size": [3, resolution, resolution],
            "fixed_input_size": usual.fixed_input_size,
            "interpolation": "bilinear",
            "crop_pct": EVALUATION.centre_crop,
            "mean": list(MEAN),
            "std": list(STD),
            "num_classes": 0,
            # By these names timm makes another classifier or another number of channels.
            "classifier": usual.classifier,
            "first_conv": usual.first_conv,
        },
    }
    if isinstance(backbone, ResizableViT):
        # The position embeddings keep the grid that they were trained for.
        config["pretrained_cfg"]["fixed_input_size"] = False
        config["model_args"] = {"dynamic_img_size": True}
    return config


def front_matter(options: Options, records: list[dict], licence: str | None) -> list[str]:
    """Return the lines before a card by which the hub files the model.

    records: what was measured of it, see `ffssl.evaluate.results`.
    """
    matter: dict[str, object] = {
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["timm", "ffssl", "self-supervised-learning", options.method.name],
    }
    if licence:
        matter["license"] = licence
    kind = description_or_empty(options.data.train).get("source", {}).get("kind")
    if kind in DATASETS:
        matter["datasets"] = [DATASETS[kind]]
    if records:
        matter["metrics"] = ["accuracy"]
        name = f"{options.model.backbone}, {options.method.name}"
        matter["model-index"] = [{"name": name, "results": [_result(r) for r in records]}]
    return ["---", yaml.safe_dump(matter, sort_keys=False).rstrip(), "---", ""]


def _result(record: dict) -> dict:
    """Return a record of an evaluation in the form of the hub's model-index."""
    images = record["data"]["validation"]["file"]
    how = f"{record['evaluation']}, {describe_settings(record)}"
    return {
        "task": {"type": "image-classification"},
        "dataset": {"name": images, "type": images},
        "metrics": [
            {"type": "accuracy", "name": f"{score} ({how})", "value": round(100 * share, 2)}
            for score, share in record["scores"].items()
            if share is not None
        ],
    }
