import torch
from torch import Tensor
from torch.nn import functional as F

from ffssl.backbones import Backbone
from ffssl.config.checks import Size, Temperature
from ffssl.methods.base import Method, mlp
from ffssl.parallel.device import full_precision
from ffssl.parallel.ranks import gather, gather_with_gradient, rank


class SimCLR(Method):
    """Chen et al. 2020.

    Each view must find the other view of its image among all views of the batch. The authors'
    temperature for ImageNet is 0.1.

    hidden: width of the projector's hidden layers.
    projection: length of the projections.
    temperature: temperature of the softmax.
    """

    name = "simclr"
    # The negatives of an image's views differ little: the cosine ranks its pairs as NT-Xent does.
    compares_pairs_by = "cosine"
    policy = "simclr"
    takes_local_views = True
    joint_views = True  # the authors pass both views at once
    # The authors exclude biases and BatchNorm parameters from weight decay.
    decay_norm_and_bias = False

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden: Size = 2048,
        projection: Size = 128,
        temperature: Temperature = 0.1,
    ):
        super().__init__(backbone)
        self.projector = mlp([backbone.features, hidden, projection], last_norm=True)
        self.temperature = temperature

    def loss(
        self, first: Tensor, second: Tensor, local: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the first views' projections, as in Method.

        local: normalised local views (N, n, 3, r, r). Each must find the two global views of its
            image. All pairs of a view and one to be found have the same weight.
        """
        z1, z2 = self.project_pair(first, second)
        loss = nt_xent(z1, z2, self.temperature)
        if local is not None:
            z = self.project(local.flatten(0, 1)).unflatten(0, local.shape[:2])
            of_local, n = nt_xent_of_local(z, z1, z2, self.temperature), local.shape[1]
            loss = (loss + n * of_local) / (1 + n)
        return loss, z1

    def pair_losses(self, projections: Tensor, targets: Tensor) -> Tensor:
        return nt_xent_of_pairs(projections, self.temperature)


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy (SimCLR, eq. 1), averaged over all 2N views.

    z1, z2: projections (N, d).

    With several ranks the negatives are the views of all ranks.
    """
    n = len(z1)
    with full_precision(z1):
        z1, z2 = F.normalize(z1.float(), dim=1), F.normalize(z2.float(), dim=1)
        everyone = torch.cat([gather_with_gradient(z1), gather_with_gradient(z2)])
        similarity = torch.cat([z1, z2]) @ everyone.T / temperature
    own = torch.arange(n, device=z1.device) + rank() * n
    own = torch.cat([own, own + len(everyone) // 2])
    return F.cross_entropy(similarity.scatter(1, own[:, None], float("-inf")), own.roll(n))


def nt_xent_of_local(z: Tensor, z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent of local views that must find the global views of their image, averaged over all.

    z: projections of n local views of each image, (N, n, d).
    z1, z2: projections of the global views, (N, d).

    A local view looks for one global view of its image at a time, among those of all images (of all
    ranks). The other one of its image is no negative.
    """
    with full_precision(z):
        z, z1, z2 = (F.normalize(one.float(), dim=-1) for one in (z, z1, z2))
        everyone = torch.stack([gather_with_gradient(z1), gather_with_gradient(z2)])
        similarity = torch.einsum("bnd,gcd->bngc", z, everyone) / temperature
    own = torch.arange(len(z), device=z.device) + rank() * len(z)
    own = own[:, None, None, None].expand(*similarity.shape[:3], 1)
    positive = similarity.gather(3, own).squeeze(3)
    negatives = similarity.scatter(3, own, float("-inf")).flatten(2).logsumexp(2, keepdim=True)
    return (torch.logaddexp(negatives, positive) - positive).mean()


def nt_xent_of_pairs(z: Tensor, temperature: float) -> Tensor:
    """NT-Xent of each image, for each pair (i, j) of its m views.

    z: projections (B, m, d).

    Return (B, m, m), symmetric. Entry (i, j) is the mean of the terms of view i and view j, with
    view i and view j of each image as the batch. Its mean over B is `nt_xent(z[:, i], z[:, j])`.
    """
    with full_precision(z):
        z = F.normalize(z.float(), dim=2)
        similarity = torch.einsum("bid,cjd->bijc", z, gather(z)) / temperature
    own = torch.arange(len(z), device=z.device) + rank() * len(z)
    positive = similarity.take_along_dim(own[:, None, None, None], dim=3).squeeze(3)
    other_views = similarity.logsumexp(3)
    same_view = similarity.diagonal(dim1=1, dim2=2).mT  # (B, m, all images)
    itself = own[:, None, None].expand(-1, z.shape[1], -1)
    same_view = same_view.scatter(2, itself, float("-inf")).logsumexp(2)
    terms = torch.logaddexp(same_view[:, :, None], other_views) - positive
    return (terms + terms.mT) / 2
