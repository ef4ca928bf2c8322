import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffssl.parallel.ranks import gather_with_gradient
from ffssl.methods.base import Method, full_precision, mlp, wide_product


class VICReg(Method):
    """Bardes et al. 2022, after the official code. Views agree (invariance), while over the batch each dimension keeps its spread
    (variance) and is uncorrelated with the others (covariance).

    hidden, projection: widths of the expander (8192 and 8192). invariance, variance, covariance: weights of the terms (25, 25, 1).
    """

    name = "vicreg"
    policy = "byol"
    decay_all = False  # the authors exclude biases and BatchNorm parameters from weight decay

    def __init__(
        self, backbone: nn.Module, *, hidden: int = 8192, projection: int = 8192,
        invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0,
    ):  # fmt: skip
        super().__init__(backbone)
        self.projector = mlp([backbone.features, hidden, hidden, projection], last_norm=None, bias=True, last_bias=False)
        self.weights = invariance, variance, covariance

    def project(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))

    def loss(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        z1, z2 = self.project_pair(first, second)
        return vicreg(z1, z2, *self.weights), z1

    def pair_losses(self, projections: Tensor, targets: Tensor) -> Tensor:
        """The invariance term, the only one that depends on which views of an image are a pair."""
        with full_precision(projections):
            distances = torch.cdist(projections.float(), targets.float())
        return self.weights[0] * distances.square() / projections.shape[2]


def vicreg(z1: Tensor, z2: Tensor, invariance: float, variance: float, covariance: float) -> Tensor:
    """VICReg, eq. 6, in the official code's scale: the mean over dimensions in each term. z1, z2: (N, d)."""
    with full_precision(z1):
        z1, z2 = z1.float(), z2.float()
        agreement = F.mse_loss(z1, z2)
        z1, z2 = gather_with_gradient(z1), gather_with_gradient(z2)
        spread = (_missing_spread(z1) + _missing_spread(z2)) / 2
        return invariance * agreement + variance * spread + covariance * (_covariance(z1) + _covariance(z2))


def _missing_spread(z: Tensor) -> Tensor:
    return F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()


def _covariance(z: Tensor) -> Tensor:
    """Sum of the squared covariances of different dimensions, over the number of dimensions."""
    z = z - z.mean(0)
    matrix = wide_product(z.T, z) / (len(z) - 1)
    return (matrix.square().sum() - matrix.diagonal().square().sum()) / z.shape[1]
