"""What a self-supervised method is to the training loop."""

from torch import Tensor, nn


class Method(nn.Module):
    """A backbone with the heads and the loss of one method.

    A subclass sets `policy` (the name of its authors' view policy, in `ffssl.data.policy.POLICIES`), gives `project` and `loss`,
    and declares its heads' options as keyword arguments with defaults.
    """

    policy = "simsiam"
    decay_all = True  # weight decay on biases and normalisation parameters too

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def project(self, images: Tensor) -> Tensor:
        """Projections (N, d) of images (N, 3, R, R); Hard Augment compares views by them."""
        raise NotImplementedError

    def loss(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The scalar loss of a batch of positive pairs, each (N, 3, R, R), and the first views' projections (N, d)."""
        raise NotImplementedError

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss(first, second)

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Groups for the optimiser. A group with `constant_lr` keeps the peak learning rate throughout."""
        parameters = list(self.parameters())
        decayed = [p for p in parameters if self.decay_all or p.ndim > 1]
        rest = [p for p in parameters if not self.decay_all and p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": weight_decay}]
        return groups + ([{"params": rest, "weight_decay": 0.0}] if rest else [])


def mlp(widths: list[int], *, last_norm: bool | None, bias: bool = False) -> nn.Sequential:
    """Linear layers of the given widths with BatchNorm and ReLU between them.

    last_norm: BatchNorm after the last layer with affine parameters (True), without (False), or none (None: plain layer with bias).
    bias: whether layers followed by BatchNorm have one.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths[:-2], widths[1:-1]):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=last_norm is None or bias))
    if last_norm is not None:
        layers.append(nn.BatchNorm1d(widths[-1], affine=last_norm))
    return nn.Sequential(*layers)
