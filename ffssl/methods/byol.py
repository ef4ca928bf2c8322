from torch import Tensor

from ffssl.backbones import Backbone
from ffssl.config.checks import Fraction, Size
from ffssl.methods.base import cosines, mlp
from ffssl.methods.teacher import Teacher, TeacherMethod


class BYOL(TeacherMethod):
    """Grill et al. 2020, after the official code.

    The student predicts the teacher's projection of the other view. The authors start from a
    teacher momentum of 0.996 for 1000 epochs, from 0.99 for 100 and 300.

    hidden: width of the projector's hidden layers.
    projection: length of the projections.
    predictor: width of the predictor's hidden layer.
    teacher_momentum: momentum of the teacher's average, in the first step.
    teacher_momentum_end: momentum of the teacher's average, in the last step.
    """

    name = "byol"
    policy = "byol"
    # The authors exclude biases and BatchNorm parameters from weight decay.
    decay_norm_and_bias = False
    direction_weight = 1.0  # the authors add the two directions

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden: Size = 4096,
        projection: Size = 256,
        predictor: Size = 4096,
        teacher_momentum: Fraction = 0.996,
        teacher_momentum_end: Fraction = 1.0,
    ):
        super().__init__(
            backbone, teacher_momentum=teacher_momentum, teacher_momentum_end=teacher_momentum_end
        )
        # Biases as in the official code: before BatchNorm, and none on the outputs.
        self.projector = mlp(
            [backbone.features, hidden, projection], last_norm=None, bias=True, last_bias=False
        )
        self.predictor = mlp(
            [projection, predictor, projection], last_norm=None, bias=True, last_bias=False
        )
        self.teacher = Teacher(*self.student())

    def predict(self, projections: Tensor) -> Tensor:
        return self.predictor(projections)

    def distances(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Squared distance of the normalised vectors (eq. 2)."""
        return 2 - 2 * cosines(predictions, targets)
