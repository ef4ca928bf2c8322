"""Backbones: networks from images (N, 3, R, R) to pooled features (N, features)."""

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from ffssl.errors import UserError


class SmallResNet(nn.Module):
    """A residual network for CPUs and images of 32 to 64 pixels: a 3x3 stem of stride 2, and a basic block at each of the widths.

    With the default widths it has 1.2 M parameters and a stride of 16.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256)):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
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
    shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, stride=2, downsample=shortcut)


def _torchvision_resnet(name: str, zero_init_residual: bool) -> nn.Module:
    network = torchvision.models.get_model(name, weights=None, zero_init_residual=zero_init_residual)
    network.features = network.fc.in_features
    network.fc = nn.Identity()
    return network


BACKBONES = ("resnet-small", "resnet18", "resnet50")


def build_backbone(name: str, *, zero_init_residual: bool = False) -> nn.Module:
    """A randomly initialised backbone; its attribute `features` is the length of its output.

    zero_init_residual: start every residual block as the identity (SimSiam's official code does).
    """
    if name not in BACKBONES:
        raise UserError(f"model.backbone: unknown backbone {name!r}; known are {', '.join(BACKBONES)}")
    if name == "resnet-small":
        return SmallResNet()
    return _torchvision_resnet(name, zero_init_residual)
