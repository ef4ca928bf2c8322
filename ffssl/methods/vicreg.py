import torch
from torch import Tensor
from torch.nn import functional as F

from ffssl.backbones import Backbone
from ffssl.config.checks import Size, Weight
from ffssl.methods.base import Method, mlp, wide_product
from ffssl.parallel.device import full_precision
from ffssl.parallel.ranks import gather_with_gradient


class VICReg(Method):
    """Bardes et al. 2022, after the official code.

    The loss makes views agree (invariance). Over the batch it keeps the standard deviation of each
    dimension (variance) and makes dimensions uncorrelated (covariance).

    hidden: width of the projector's hidden layers.
    projection: length of the projections.
    invariance: weight of the invariance term.
    variance: weight of the variance term.
    covariance: weight of the covariance term.
    """

    name = "vicreg"
    policy = "byol"
    # The authors exclude biases and BatchNorm parameters from weight decay.
    decay_norm_and_bias = False

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden: Size = 8192,
        projection: Size = 8192,
        invariance: Weight = 25.0,
        variance: Weight = 25.0,
        covariance: Weight = 1.0,
    ):
        super().__init__(backbone)
        self.projector = mlp(
            [backbone.features, hidden, hidden, projection],
            last_norm=None,
            bias=True,
            last_bias=False,
        )
        self.weights = invariance, variance, covariance

    def loss(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        z1, z2 = self.project_pair(first, second)
        return vicreg(z1, z2, *self.weights), z1

    def pair_losses(self, projections: Tensor, targets: Tensor) -> Tensor:
        """The invariance term, the only one that depends on which views of an image form a pair."""
        with full_precision(projections):
            distances = torch.cdist(projections.float(), targets.float())
        return self.weights[0] * distances.square() / projections.shape[2]


def vicreg(z1: Tensor, z2: Tensor, invariance: float, variance: float, covariance: float) -> Tensor:
    """VICReg, eq. 6, in the scale of the official code: each term is a mean over dimensions.

    z1, z2: projections (N, d).
    """
    with full_precision(z1):
        z1, z2 = z1.float(), z2.float()
        agreement = F.mse_loss(z1, z2)
        z1, z2 = gather_with_gradient(z1), gather_with_gradient(z2)
        spread = (_missing_spread(z1) + _missing_spread(z2)) / 2
        return (
            invariance * agreement
            + variance * spread
            + covariance * (_covariance(z1) + _covariance(z2))
        )


def _missing_spread(z: Tensor) -> Tensor:
    return F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()


def _covariance(z: Tensor) -> Tensor:
    """Sum of the squared covariances of different dimensions, over the number of dimensions."""
    z = z - z.mean(0)
    matrix = wide_product(z.T, z) / (len(z) - 1)
    return (matrix.square().sum() - matrix.diagonal().square().sum()) / z.shape[1]
