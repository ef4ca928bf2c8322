"""A trained backbone as one module, from images to features: its normalisation is part of it."""

import itertools
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ffssl.backbones import BACKBONES, RESNETS, Backbone, TimmModel, build_backbone
from ffssl.data.normalise import MEAN, STD
from ffssl.errors import UserError
from ffssl.load import backbone_of, load_run
from ffssl.run_folder import checkpoint


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
    stem: str = "imagenet",
) -> Encoder:
    """Return a trained backbone in evaluation mode, on the CPU.

    run_or_file: a run's folder or checkpoint, or a file that `ffssl.export` wrote.
    network: of a run, "student" or "teacher".
    backbone, stem: of an exported file, as the run's options model.backbone and model.stem. Without
        them the shapes of its weights tell which of the ResNets and vision transformers that
        `ffssl.backbones.BACKBONES` lists it is.

    No code in the file is run. Raise UserError, naming the file, if it can't be loaded.
    """
    path = Path(run_or_file)
    weights = None if path.is_dir() else _read(path)
    if weights is None or "method" in weights:
        trained = backbone_of(load_run(path).method, network)
    else:
        trained = _network_of(path, weights, backbone, stem)
    return Encoder(trained.to(memory_format=torch.contiguous_format)).eval()


def _read(path: Path) -> dict:
    """Return what the file holds: the state of a run, or weights by name."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a run's folder, or an exported file")
    if path.suffix != ".safetensors":
        state = checkpoint.read(path)
        if isinstance(state, dict) and (
            "method" in state or all(isinstance(value, Tensor) for value in state.values())
        ):
            return state
        raise UserError(f"{path}: neither a run's checkpoint nor a network's weights")
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not readable as safetensors: {error}") from error


def _network_of(path: Path, weights: dict[str, Tensor], name: str | None, stem: str) -> Backbone:
    """Return the network of an exported file's weights, with these."""
    if name is None:
        name, stem = _recognised(path, weights)
    network = build_backbone(name, stem=stem)
    try:
        _native(network).load_state_dict(weights)
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise UserError(f"{path}: its weights are not those of {name}: {told:.300}") from error
    return network


def _recognised(path: Path, weights: dict[str, Tensor]) -> tuple[str, str]:
    """Return the name and the stem of the network whose weights have these names and shapes."""
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    others = [(name, "imagenet") for name in BACKBONES if name not in RESNETS]
    for name, stem in [*itertools.product(RESNETS, ("imagenet", "cifar")), *others]:
        with torch.device("meta"):  # nothing is computed
            state = _native(build_backbone(name, stem=stem)).state_dict()
        if {name: tensor.shape for name, tensor in state.items()} == shapes:
            return name, stem
    raise UserError(
        f"{path}: its weights are those of none of {', '.join(BACKBONES)}; say of which network of "
        "timm, backbone=NAME"
    )


def _native(backbone: nn.Module) -> nn.Module:
    """Return the network whose names an exported file has."""
    return backbone.network if isinstance(backbone, TimmModel) else backbone
