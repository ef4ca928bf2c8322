import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffssl.methods.base import Method, mlp


class SimCLR(Method):
    """Chen et al. 2020. Each view must find the other view of its image among all views of the batch.

    hidden, projection: widths of the projector (2048 and 128). temperature: of the softmax (0.1, the authors' for ImageNet).
    """

    policy = "simclr"
    decay_all = False  # the authors exclude biases and BatchNorm parameters from weight decay

    def __init__(self, backbone: nn.Module, *, hidden: int = 2048, projection: int = 128, temperature: float = 0.1):
        super().__init__(backbone)
        self.projector = mlp([backbone.features, hidden, projection], last_norm=True)
        self.temperature = temperature

    def project(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))

    def loss(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        z1, z2 = self.project(first), self.project(second)
        return nt_xent(z1, z2, self.temperature), z1


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy (SimCLR, eq. 1), averaged over all 2N views. z1, z2: (N, d)."""
    z = F.normalize(torch.cat([z1, z2]).float(), dim=1)
    with torch.autocast("cuda" if z.is_cuda else "cpu", enabled=False):  # the temperature magnifies half precision's errors
        similarity = z @ z.T / temperature
    similarity.fill_diagonal_(float("-inf"))
    n = len(z1)
    positive = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(similarity, positive)
