from torch import Tensor

from ffssl.backbones import Backbone
from ffssl.config.checks import Size
from ffssl.methods.base import cosines, mlp
from ffssl.methods.prediction import PredictionMethod


class SimSiam(PredictionMethod):
    """Chen & He 2021, after the official code.

    Negative cosine similarity between a prediction and a stopped projection.

    hidden: width of the projector's hidden layers.
    projection: length of the projections.
    predictor: width of the predictor's hidden layer.
    constant_predictor_lr: keep the predictor's learning rate at its peak, as in the official code.
    """

    name = "simsiam"
    # With the hardest pairs alone from the start its embeddings lose rank on photographs, where
    # nothing else, neither negatives nor a teacher, holds images apart (docs/methods.md).
    first_hard_share = 0.0

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden: Size = 2048,
        projection: Size = 2048,
        predictor: Size = 512,
        constant_predictor_lr: bool = False,
    ):
        super().__init__(backbone)
        self.projector = mlp([backbone.features, hidden, hidden, projection], last_norm=False)
        self.predictor = mlp([projection, predictor, projection], last_norm=None)
        self.constant_predictor_lr = constant_predictor_lr

    def predict(self, projections: Tensor) -> Tensor:
        return self.predictor(projections)

    def distances(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return -cosines(predictions, targets)

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        predictor = set(self.predictor.parameters())
        rest = [p for p in self.parameters() if p not in predictor]
        return [
            {"params": rest, "weight_decay": weight_decay},
            {
                "params": list(self.predictor.parameters()),
                "weight_decay": weight_decay,
                "constant_lr": self.constant_predictor_lr,
            },
        ]
