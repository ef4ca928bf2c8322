"""The encoder whose features are computed: of a run, or of a file that was exported."""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from torch import nn

from ffssl.backbones import build_backbone, check_resolutions
from ffssl.errors import UserError
from ffssl.export.hugging_face import WEIGHTS
from ffssl.export.model_card import card_path
from ffssl.load import backbone_of, fingerprint, load_run
from ffssl.run_folder import checkpoint
from ffssl.weights import is_run, load_weights, read_file, read_weights

_OPTIONS = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Encoder:
    """A frozen backbone.

    backbone: in evaluation mode, on the CPU, without gradients.
    name, stem: see `build_backbone`.
    network: "student" or "teacher" of a run; "" of a file, which holds one network alone.
    resolution: side of the images in pixels.
    scaled_decoding: see `ffssl.data.policy.ViewSettings`.
    """

    backbone: nn.Module
    name: str
    stem: str
    network: str
    resolution: int
    scaled_decoding: bool = True

    @property
    def weights(self) -> str:
        """What identifies the weights, see `fingerprint`."""
        return fingerprint(self.backbone)


def load_encoder(
    path: Path,
    *,
    network: str = "student",
    backbone: str | None = None,
    stem: str | None = None,
    resolution: int | None = None,
) -> Encoder:
    """Load the encoder of a run, or one that was exported.

    path: a run's folder or checkpoint; an exported file, or a folder for Hugging Face.
    network: whose backbone, of a run.
    backbone, stem: of an exported file without its card, which says them.
    resolution: side of the images; by default the largest that the encoder was trained on.

    Raise UserError, naming the file, if it can't be loaded.
    """
    file = path / WEIGHTS if (path / WEIGHTS).is_file() else path
    is_export = file.is_file() and (
        file.suffix == ".safetensors" or backbone is not None or not is_run(read_file(file))
    )
    encoder = (
        _exported(file, backbone, stem, resolution)
        if is_export
        else _of_run(path, network, resolution)
    )
    if is_export and network != "student":
        raise UserError(f"--network: {path} holds one network alone; leave this out")
    if not is_export and (backbone or stem):
        raise UserError(f"--backbone: {path} is a run, which knows its own; leave this out")
    check_resolutions(encoder.name, encoder.backbone, {encoder.resolution: "--resolution"})
    encoder.backbone.requires_grad_(False).eval()
    return encoder


def _of_run(path: Path, network: str, resolution: int | None) -> Encoder:
    if path.is_dir() and not checkpoint.exists(path):
        raise UserError(
            f"{path}: holds neither {checkpoint.NAME} nor {WEIGHTS}; name the folder of a run, or "
            "an exported file or folder"
        )
    options, method, _ = load_run(path)
    return Encoder(
        backbone_of(method, network),
        options.model.backbone,
        options.model.stem,
        network,
        resolution or options.resolution.max,
        options.data.scaled_decoding,
    )


def _exported(
    file: Path, backbone: str | None, stem: str | None, resolution: int | None
) -> Encoder:
    card = _card_options(file)
    model = card.get("model", {})
    name = backbone or model.get("backbone")
    if name is None:
        raise UserError(
            f"{file}: no card beside it says which backbone it is of ({_card_of(file).name}); "
            "name it with --backbone"
        )
    stem = stem or model.get("stem", "imagenet")
    resolution = resolution or card.get("resolution", {}).get("max")
    if resolution is None:
        raise UserError(
            f"{file}: no card beside it says the side of its images; name it with --resolution"
        )
    network = build_backbone(name, stem=stem)
    tensors = read_weights(file)
    try:
        load_weights(network, name, tensors)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return Encoder(network, name, stem, "", resolution)


def _card_of(file: Path) -> Path:
    if file.name == WEIGHTS:
        return card_path(file.parent, "huggingface")
    return card_path(file, "safetensors")


def _card_options(file: Path) -> dict:
    """Return the options that the card beside an exported file states; none without a card."""
    card = _card_of(file)
    try:
        found = _OPTIONS.search(card.read_text(encoding="utf-8", errors="replace"))
        options = yaml.safe_load(found[1]) if found else {}
        sections = [options.get("model", {}), options.get("resolution", {})]
    except FileNotFoundError:
        return {}
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise UserError(f"{card}: the card can't be read ({type(error).__name__})") from error
    if not all(isinstance(section, dict) for section in sections):
        raise UserError(f"{card}: its options are not sections of options")
    return options
