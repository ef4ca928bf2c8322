import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from ffssl.backbones import Backbone
from ffssl.config.checks import Count, Fraction, Size, Temperature
from ffssl.methods.base import Progress
from ffssl.methods.teacher import Teacher, TeacherMethod
from ffssl.parallel.device import full_precision
from ffssl.parallel.ranks import mean_over_ranks

FIRST_TEACHER_TEMPERATURE = 0.04
CENTRE_MOMENTUM = 0.9


class DINO(TeacherMethod):
    """Caron et al. 2021, after the official code.

    The student predicts how the teacher assigns the other views to prototypes. Centring and
    sharpening of the teacher's assignments prevent a collapse. BatchNorm in the head, an option of
    theirs, helps convolutional networks to begin. What else the authors do is in options of other
    sections: local views, clipped gradients, a weight decay that rises, stochastic depth.

    hidden: width of the projector's hidden layers.
    projection: length of the projections.
    prototypes: outputs of the last, weight-normed layer.
    head_norm: BatchNorm in the projector's hidden layers.
    norm_last_layer: keep the prototypes at length 1.
    frozen_epochs: first epochs, in which the last layer is not trained.
    temperature: temperature of the softmax.
    teacher_temperature: temperature of the teacher's softmax.
    teacher_temperature_epochs: epochs over which the teacher's temperature goes there from 0.04.
    teacher_momentum: momentum of the teacher's average, in the first step.
    teacher_momentum_end: momentum of the teacher's average, in the last step.
    """

    name = "dino"
    # With the student in the teacher's place the pairs are only 79 % as hard (docs/methods.md).
    compares_pairs_by = "method"
    policy = "byol"
    # From the warm-up on the hardest pairs gain no more on photographs, and cost 5 % more FLOPs
    # (docs/methods.md).
    share_before_hard_augment = 0.5
    joint_views = True  # the authors pass views of one size at once
    # The authors exclude biases and normalisation parameters from weight decay.
    decay_norm_and_bias = False

    teacher_temperature: Tensor
    centre: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden: Size = 2048,
        projection: Size = 256,
        prototypes: Size = 65536,
        head_norm: bool = False,
        norm_last_layer: bool = True,
        frozen_epochs: Count = 1,
        temperature: Temperature = 0.1,
        teacher_temperature: Temperature = FIRST_TEACHER_TEMPERATURE,
        teacher_temperature_epochs: Count = 0,
        teacher_momentum: Fraction = 0.996,
        teacher_momentum_end: Fraction = 1.0,
    ):
        super().__init__(
            backbone, teacher_momentum=teacher_momentum, teacher_momentum_end=teacher_momentum_end
        )
        hidden_layers = []
        for inputs in (backbone.features, hidden):
            hidden_layers += [
                nn.Linear(inputs, hidden),
                *([nn.BatchNorm1d(hidden)] if head_norm else []),
                nn.GELU(),
            ]
        self.projector = nn.Sequential(*hidden_layers, nn.Linear(hidden, projection), Normalise())
        for layer in self.projector:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = weight_norm(nn.Linear(projection, prototypes, bias=False))
        nn.init.ones_(self.last_layer.parametrizations.weight.original0)
        # original0 holds the prototypes' lengths.
        self.last_layer.parametrizations.weight.original0.requires_grad_(not norm_last_layer)
        self.frozen_epochs = frozen_epochs
        self.temperature = temperature
        self.last_teacher_temperature = teacher_temperature
        self.teacher_temperature_epochs = teacher_temperature_epochs
        # A tensor, since torch.compile would compile again for each new number.
        self.register_buffer(
            "teacher_temperature", torch.tensor(self.teacher_temperature_in(0)), persistent=False
        )
        self.teacher = Teacher(*self.student())
        self.register_buffer("centre", torch.zeros(prototypes))

    def student(self) -> tuple[nn.Module, ...]:
        return self.backbone, self.projector, self.last_layer

    def predict(self, projections: Tensor) -> Tensor:
        return self.last_layer(projections)

    def student_targets(self, projections: Tensor, predictions: Tensor) -> Tensor:
        return predictions

    def distances(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy between the teacher's assignment and the student's (eq. 1).

        The teacher's assignment is centred and sharpened (section 3.1).
        """
        with full_precision(predictions):
            assignments = ((targets.float() - self.centre) / self.teacher_temperature).softmax(-1)
            return -(predictions.float() / self.temperature).log_softmax(-1) @ assignments.mT

    @torch.no_grad()
    def remember(self, targets: Tensor) -> None:
        self.centre.lerp_(mean_over_ranks(targets.float().mean((0, 1))), 1 - CENTRE_MOMENTUM)

    def teacher_temperature_in(self, epoch: int) -> float:
        if epoch >= self.teacher_temperature_epochs:
            return self.last_teacher_temperature
        share = epoch / max(self.teacher_temperature_epochs - 1, 1)
        return FIRST_TEACHER_TEMPERATURE + share * (
            self.last_teacher_temperature - FIRST_TEACHER_TEMPERATURE
        )

    def before_step(self, progress: Progress) -> None:
        self.teacher_temperature.fill_(self.teacher_temperature_in(progress.epoch))

    def after_backward(self, progress: Progress) -> None:
        """Drop the last layer's gradient in the first `frozen_epochs` epochs.

        Without a gradient the optimiser leaves the layer alone, weight decay and momentum included.
        The gradient is computed all the same, as in the authors' code: DistributedDataParallel
        expects the same gradients in every step.
        """
        if progress.epoch < self.frozen_epochs:
            self.last_layer.zero_grad(set_to_none=True)


class Normalise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)
