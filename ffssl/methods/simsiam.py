from torch import Tensor, nn
from torch.nn import functional as F

from ffssl.methods.base import Method, mlp


class SimSiam(Method):
    """Chen & He 2021, after the official code. Negative cosine similarity between a prediction and a stopped projection.

    hidden, projection: widths of the projector (2048 and 2048). predictor: width of the predictor's bottleneck (512).
    constant_predictor_lr: keep the predictor's learning rate at its peak, as the official code does (`--fix-pred-lr`).
    """

    def __init__(
        self, backbone: nn.Module, *, hidden: int = 2048, projection: int = 2048, predictor: int = 512, constant_predictor_lr: bool = False
    ):
        super().__init__(backbone)
        self.projector = mlp([backbone.features, hidden, hidden, projection], last_norm=False)
        self.predictor = mlp([projection, predictor, projection], last_norm=None)
        self.constant_predictor_lr = constant_predictor_lr

    def project(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))

    def loss(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        z1, z2 = self.project(first), self.project(second)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        return (negative_cosine(p1, z2.detach()) + negative_cosine(p2, z1.detach())) / 2, z1

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        predictor = set(self.predictor.parameters())
        rest = [p for p in self.parameters() if p not in predictor]
        return [
            {"params": rest, "weight_decay": weight_decay},
            {"params": list(self.predictor.parameters()), "weight_decay": weight_decay, "constant_lr": self.constant_predictor_lr},
        ]


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """-cos(prediction, target), averaged over the batch (SimSiam, eq. 1). Both (N, d)."""
    return -F.cosine_similarity(prediction.float(), target.float(), dim=1).mean()
