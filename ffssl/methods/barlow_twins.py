from torch import Tensor, nn

from ffssl.backbones import Backbone
from ffssl.config.checks import Size, Weight
from ffssl.methods.base import Method, mlp, wide_product
from ffssl.parallel.device import full_precision
from ffssl.parallel.ranks import mean_over_ranks


class BarlowTwins(Method):
    """Zbontar et al. 2021, after the official code.

    The loss draws the cross-correlation of two views' projections to the identity.

    hidden: width of the projector's hidden layers.
    projection: length of the projections.
    redundancy: weight of the correlations of different dimensions.
    """

    name = "barlow_twins"
    policy = "byol"
    # Before, the hardest pairs keep its embeddings at a low rank (docs/methods.md).
    share_before_hard_augment = 0.5
    # The authors exclude biases and BatchNorm parameters from weight decay.
    decay_norm_and_bias = False

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden: Size = 8192,
        projection: Size = 8192,
        redundancy: Weight = 0.0051,
    ):
        super().__init__(backbone)
        self.projector = mlp(
            [backbone.features, hidden, hidden, projection], last_norm=None, last_bias=False
        )
        self.norm = nn.BatchNorm1d(projection, affine=False)
        self.redundancy = redundancy

    def loss(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        z1, z2 = self.project_pair(first, second)
        return redundancy_reduction(self.norm(z1), self.norm(z2), self.redundancy), z1


def redundancy_reduction(z1: Tensor, z2: Tensor, weight: float) -> Tensor:
    """Barlow Twins, eq. 1.

    z1, z2: (N, d), each dimension of mean 0 and variance 1 over the batch (of all ranks).
    """
    with full_precision(z1):
        correlation = mean_over_ranks(wide_product(z1.float().T, z2.float()) / len(z1))
    diagonal = correlation.diagonal()
    off_diagonal = correlation.square().sum() - diagonal.square().sum()
    return (diagonal - 1).square().sum() + weight * off_diagonal
