"""Backbones: networks with random weights that map images to pooled features.

Images are (N, 3, R, R), features (N, features).
"""

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torchvision
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

from ffssl.errors import UserError, did_you_mean
from ffssl.parallel.device import full_precision

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


class Backbone(nn.Module):
    """A network that maps images (N, 3, R, R) to pooled features (N, `features`).

    torchvision's ResNets get the attribute and pass for one.
    """

    features: int


class SmallResNet(Backbone):
    """A residual network for CPUs and images of 32 to 64 pixels.

    It has a 3x3 stem of stride 2 and one basic block for each width. With the default widths it has
    1.2 M parameters and a stride of 16.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256)):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        halving = [_halving_block(inputs, outputs) for inputs, outputs in zip(widths, widths[1:])]
        self.blocks = nn.Sequential(BasicBlock(widths[0], widths[0]), *halving)
        self.features = widths[-1]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(self.stem(images)).mean((2, 3))


def _halving_block(inputs: int, outputs: int) -> BasicBlock:
    shortcut = nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs)
    )
    return BasicBlock(inputs, outputs, stride=2, downsample=shortcut)


class TimmModel(Backbone):
    """A network of timm without its classifier."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        # Some networks have a layer after the pooling.
        has_layer = hasattr(network, "head_hidden_size")
        self.features = getattr(network, "head_hidden_size" if has_layer else "num_features")

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


class ResizableViT(TimmModel):
    """A vision transformer of timm (`VisionTransformer`) for images of any size.

    The patches must divide the size; raise ValueError if they do not. A matrix resamples the
    position embeddings to the images' grid, and gradients pass through it. In eager mode the matrix
    is computed once for each grid, and a step costs one small product. torch.compile's code
    computes it in each step.
    """

    network: "VisionTransformer"

    def __init__(self, network: "VisionTransformer"):
        super().__init__(network)
        network.patch_embed.strict_img_size = False

    def forward(self, images: Tensor) -> Tensor:
        (height, width), patch = images.shape[-2:], self.network.patch_embed.patch_size
        if height % patch[0] or width % patch[1]:
            raise ValueError(f"its patches of {patch[0]} px do not divide {height} px")
        embedding = self.network.pos_embed
        if embedding is None or self.network.dynamic_img_size:  # timm then resamples them itself
            return super().forward(images)
        resampled = resample_positions(
            embedding, self.network.patch_embed.grid_size, (height // patch[0], width // patch[1])
        )
        return functional_call(self.network, {"pos_embed": resampled}, (images,))


@contextmanager
def all_patches(model: nn.Module) -> Iterator[None]:
    """Let vision transformers that drop patches in training see them all inside the block."""
    layers = [m.network.patch_drop for m in model.modules() if isinstance(m, ResizableViT)]
    dropping = [layer.eval() for layer in layers if layer.training]
    try:
        yield
    finally:
        for layer in dropping:
            layer.train()


def resample_positions(embedding: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resample position embeddings (1, p + h w, d) from an `old` grid (h, w) to a `new` one.

    The interpolation is timm's: bicubic with antialiasing. The first p embeddings, of tokens that
    are no patches, stay.
    """
    if old == new:
        return embedding
    prefix = embedding.shape[1] - old[0] * old[1]
    # Autocast would round the positions.
    with full_precision(embedding):
        patches = _resampling_matrix(old, new, embedding.device) @ embedding[:, prefix:].float()
    return torch.cat([embedding[:, :prefix], patches.to(embedding.dtype)], dim=1)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # a tensor made in inference mode could not be used in training later
def _resampling_matrix(old: tuple[int, int], new: tuple[int, int], device: torch.device) -> Tensor:
    """Return the interpolation as a matrix (new patches, old patches).

    Its columns are the interpolated unit vectors.
    """
    positions = old[0] * old[1]
    units = torch.eye(positions, device=device).view(positions, 1, *old)
    images = F.interpolate(units, new, mode="bicubic", antialias=True)
    return images.view(positions, -1).T.contiguous()


RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
BACKBONES = ("resnet-small", *RESNETS, "vit_small_patch16_224", "vit_base_patch16_224")


def build_backbone(
    name: str,
    *,
    zero_init_residual: bool = False,
    stem: str = "imagenet",
    drop_path: float = 0.0,
    patch_drop: float = 0.0,
) -> Backbone:
    """Return a backbone with random weights.

    name: one of BACKBONES, or any model of timm that has pooled features. timm's vision
        transformers take images of any size that their patches divide. Nothing is downloaded.
    zero_init_residual: start every residual block as the identity, as SimSiam's official code does.
        For the networks of RESNETS.
    stem: "cifar" is for images of up to 64 pixels and the networks of RESNETS: a 3x3 convolution of
        stride 1 and no pooling, as in SimCLR on CIFAR-10 (section B.9).
    drop_path: rate of stochastic depth in training (Huang et al. 2016), for networks of timm. It
        rises linearly from 0 in the first block to this in the last.
    patch_drop: share of the patches, at least 0 and below 1, that a vision transformer leaves out
        in training (PatchDropout: Liu et al., WACV 2023). For each image it draws others. The
        blocks compute with a sequence that is so much shorter.

    Raise UserError for an unknown name, with close ones, for a network without pooled features, and
    for what a network does not have.
    """
    if drop_path and name in ("resnet-small", *RESNETS):
        raise UserError(
            f"model.drop_path: {name} has no stochastic depth; leave it 0, or take a vision "
            "transformer"
        )
    if stem != "imagenet" and name not in RESNETS:
        raise UserError(f"model.stem: {name} has no {stem} stem; {', '.join(RESNETS)} have one")
    backbone: Backbone
    if name in RESNETS:
        backbone = _torchvision_resnet(name, zero_init_residual, stem)
    elif name == "resnet-small":
        backbone = SmallResNet()
    else:
        backbone = _timm_model(name, drop_path)
    if patch_drop:
        _drop_patches(name, backbone, patch_drop)
    return backbone


def _drop_patches(name: str, backbone: Backbone, share: float) -> None:
    if not isinstance(backbone, ResizableViT):
        raise UserError(
            f"model.patch_drop: {name} can't drop patches; leave it 0, or take a vision transformer"
        )
    from timm.layers import PatchDropout

    # timm's own argument would drop a second prefix token, which some networks add later.
    network = backbone.network
    network.patch_drop = PatchDropout(share, num_prefix_tokens=network.num_prefix_tokens)


def _torchvision_resnet(name: str, zero_init_residual: bool, stem: str) -> Backbone:
    network = torchvision.models.get_model(
        name, weights=None, zero_init_residual=zero_init_residual
    )
    network.features = network.fc.in_features
    network.fc = nn.Identity()
    if stem == "cifar":
        network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    return network


def _timm_model(name: str, drop_path: float) -> Backbone:
    import timm  # takes seconds, and ResNets do without
    from timm.models.vision_transformer import VisionTransformer

    known = timm.list_models()
    if name not in known:
        nearest = did_you_mean(name, {*BACKBONES, *known}, most=3)
        raise UserError(
            f"model.backbone: unknown backbone {name!r}; known are {', '.join(BACKBONES)}, "
            f"and the models of timm{nearest}"
        )
    # Left out if 0, since not all networks have it.
    more: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    try:
        network = timm.create_model(name, pretrained=False, num_classes=0, **more)
    except TypeError as error:
        if not drop_path:
            raise
        raise UserError(f"model.drop_path: {name} has no stochastic depth; leave it 0") from error
    return ResizableViT(network) if isinstance(network, VisionTransformer) else TimmModel(network)


def check_resolutions(name: str, backbone: Backbone, resolutions: Mapping[int, str]) -> None:
    """Raise UserError if `backbone` cannot pool images of one of these resolutions.

    The message names the option the resolution came from.

    name: name of the backbone.
    resolutions: maps sides in pixels to the option of each.

    Nothing is computed: only shapes pass through the network.
    """
    probe = copy.deepcopy(backbone).to("meta")
    for side, option in sorted(resolutions.items()):
        try:
            features = probe(torch.empty(2, 3, side, side, device="meta"))
        except Exception as error:  # timm's models refuse a size by whatever their layers raise
            raise UserError(
                f"{option}: {name} can't take views of {side} px: {' '.join(str(error).split())}"
            ) from error
        if getattr(features, "shape", None) != (2, backbone.features):
            raise UserError(
                f"model.backbone: {name} has no pooled features; choose one of "
                f"{', '.join(BACKBONES)}, or another of timm"
            )
