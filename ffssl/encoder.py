"""Trained backbones: of a run, or of a file or folder that was exported."""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from ffssl.backbones import BACKBONES, RESNETS, Backbone, build_backbone, check_resolutions
from ffssl.data.normalise import MEAN, STD
from ffssl.errors import UserError
from ffssl.export.hugging_face import WEIGHTS
from ffssl.export.model_card import card_path
from ffssl.load import LoadedRun, backbone_of, fingerprint, load_run, restored
from ffssl.run_folder import checkpoint
from ffssl.weights import is_run, load_weights, native_network, read_file, state_dict_in

_OPTIONS = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Encoder(nn.Module):
    """Pooled features (N, features), of images (N, 3, R, R).

    Images are RGB: uint8 in 0..255, or floating in 0..1, as torchvision has them. They are
    normalised here. Raise TypeError for images of another type.

    backbone: maps normalised images to features.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone
        self.features = backbone.features
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        elif not images.is_floating_point():
            raise TypeError(
                f"images of {images.dtype}, must be uint8 in 0..255 or floating in 0..1"
            )
        return self.backbone((images - self.mean) / self.std)


def load_backbone(
    run_or_file: str | Path,
    *,
    network: str = "student",
    backbone: str | None = None,
    stem: str | None = None,
) -> Encoder:
    """Return a trained backbone in evaluation mode, on the CPU.

    run_or_file: a run's folder or checkpoint, or a file or folder that `ffssl.export` wrote.
    network: of a run, "student" or "teacher".
    backbone, stem: of an exported file, as the run's options model.backbone and model.stem; see
        `load_trained`.

    No code in the file is run. Raise UserError, naming the file, if it can't be loaded.
    """
    trained = load_trained(Path(run_or_file), network=network, backbone=backbone, stem=stem)
    return Encoder(trained.backbone.to(memory_format=torch.contiguous_format)).eval()


@dataclass(frozen=True)
class Trained:
    """A trained backbone, and what is known of its training.

    backbone: in evaluation mode, on the CPU.
    name, stem: see `build_backbone`.
    network: "student" or "teacher" of a run; "" of a file, which holds one network alone.
    resolution: largest side in pixels of the images that it was trained on, if known.
    scaled_decoding: see `ffssl.data.policy.ViewSettings`.
    """

    backbone: Backbone
    name: str
    stem: str
    network: str
    resolution: int | None
    scaled_decoding: bool = True

    @property
    def weights(self) -> str:
        """What identifies the weights, see `fingerprint`."""
        return fingerprint(self.backbone)


def load_trained(
    path: Path,
    *,
    network: str = "student",
    backbone: str | None = None,
    stem: str | None = None,
) -> Trained:
    """Load the backbone of a run, or one that was exported.

    path: a run's folder or checkpoint; an exported file, or a folder for Hugging Face.
    network: whose backbone, of a run.
    backbone, stem: of an exported file. By default its card says them, or else the shapes of its
        weights, if they are those of one of BACKBONES.

    Raise UserError, naming the file, if it can't be loaded.
    """
    if not path.exists():
        raise UserError(f"{path}: no such run, and no such file; name a run or an exported file")
    file = path / WEIGHTS if (path / WEIGHTS).is_file() else path
    content = read_file(file) if file.is_file() else None
    if content is not None and not is_run(content):
        if network != "student":
            raise UserError(f"--network: {path} holds one network alone; leave this out")
        trained = _exported(file, state_dict_in(file, content), backbone, stem)
    else:
        if backbone or stem:
            raise UserError(f"--backbone: {path} is a run, which knows its own; leave this out")
        if path.is_dir() and not checkpoint.exists(path):
            raise UserError(
                f"{path}: holds neither {checkpoint.NAME} nor {WEIGHTS}; name the folder of a run, "
                "or an exported file or folder"
            )
        run = load_run(path) if content is None else restored(path, content)
        trained = _of_run(run, network)
    trained.backbone.eval()
    return trained


def check_side(trained: Trained, side: int) -> None:
    """Raise UserError if the backbone takes no images of `side` pixels."""
    check_resolutions(trained.name, trained.backbone, {side: "--resolution"})


def _of_run(run: LoadedRun, network: str) -> Trained:
    options = run.options
    return Trained(
        backbone_of(run.method, network),
        options.model.backbone,
        options.model.stem,
        network,
        options.resolution.max,
        options.data.scaled_decoding,
    )


def _exported(
    file: Path, tensors: Mapping[str, Tensor], name: str | None, stem: str | None
) -> Trained:
    card = _card_options(file)
    if name is None:
        model = card.get("model", {})
        name, stem = model.get("backbone"), stem or model.get("stem")
    if name is None:
        name, stem = _recognised(file, tensors)
    stem = stem or "imagenet"
    network = build_backbone(name, stem=stem)
    try:
        load_weights(network, name, tensors)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return Trained(
        network,
        name,
        stem,
        "",
        card.get("resolution", {}).get("max"),
        card.get("data", {}).get("scaled_decoding", True),
    )


def _recognised(path: Path, tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """Return the name and the stem of the network whose weights have these names and shapes."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    others = [(name, "imagenet") for name in BACKBONES if name not in RESNETS]
    for name, stem in [*itertools.product(RESNETS, ("imagenet", "cifar")), *others]:
        with torch.device("meta"):  # nothing is computed
            state = native_network(build_backbone(name, stem=stem)).state_dict()
        if {name: tensor.shape for name, tensor in state.items()} == shapes:
            return name, stem
    raise UserError(
        f"{path}: no card beside it says which backbone it is of ({_card_of(path).name}), and its "
        f"weights are those of none of {', '.join(BACKBONES)}; name it, backbone=NAME"
    )


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
        sections = [options.get(name, {}) for name in ("model", "resolution", "data")]
    except FileNotFoundError:
        return {}
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise UserError(f"{card}: the card can't be read ({type(error).__name__})") from error
    if not all(isinstance(section, dict) for section in sections):
        raise UserError(f"{card}: its options are not sections of options")
    return options
