import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffssl.backbones import Backbone
from ffssl.config.checks import Fraction, Size, Temperature
from ffssl.errors import UserError
from ffssl.methods.base import cosines
from ffssl.methods.teacher import Teacher, TeacherMethod
from ffssl.parallel.device import full_precision
from ffssl.parallel.ranks import gather


class MoCoV2Plus(TeacherMethod):
    """Chen et al. 2020 (MoCo v2) with the symmetric loss of Chen & He 2021 (the +).

    A query must find the key of its image's other view, the teacher's, among the keys of past
    batches. The projector has no BatchNorm. Both views' keys enter the queue after the loss, as in
    the authors' symmetric code for CIFAR, so it spans half as many images. The authors shuffle the
    batch between GPUs against BatchNorm's leaks; synchronised BatchNorm replaces that. The authors'
    teacher momentum is constant.

    hidden: width of the projector's hidden layers.
    projection: length of the projections.
    temperature: temperature of the softmax.
    queue: keys of past views; at least those of one step, two an image.
    teacher_momentum: momentum of the teacher's average, in the first step.
    teacher_momentum_end: momentum of the teacher's average, in the last step.
    """

    name = "mocov2plus"
    direction_weight = 1.0  # the authors' symmetric code adds the two directions

    queue: Tensor
    oldest: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden: Size = 2048,
        projection: Size = 128,
        temperature: Temperature = 0.2,
        queue: Size = 65536,
        teacher_momentum: Fraction = 0.999,
        teacher_momentum_end: Fraction = 0.999,
    ):
        super().__init__(
            backbone, teacher_momentum=teacher_momentum, teacher_momentum_end=teacher_momentum_end
        )
        self.projector = nn.Sequential(
            nn.Linear(backbone.features, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, projection),
        )
        self.temperature = temperature
        self.teacher = Teacher(*self.student())
        self.register_buffer("queue", F.normalize(torch.randn(queue, projection), dim=1))
        # A tensor on the device, so that no step waits to read it.
        self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))

    def check(self, batch_size: int) -> None:
        length = len(self.queue)
        if length < 2 * batch_size:
            raise UserError(
                f"--method.queue: {length} must be at least twice "
                f"--training.batch_size={batch_size}"
            )

    def predict(self, projections: Tensor) -> Tensor:
        return projections

    def distances(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """InfoNCE (MoCo, eq. 1): cross-entropy of finding the target among itself and the queue."""
        positive = cosines(predictions, targets) / self.temperature
        negatives = cosines(predictions, self.queue) / self.temperature
        return torch.logaddexp(positive, negatives.logsumexp(-1, keepdim=True)) - positive

    @torch.no_grad()
    def remember(self, targets: Tensor) -> None:
        """Replace the oldest keys in the queue by the keys of all ranks.

        Those of the first views come first, then those of the second.
        """
        with full_precision(targets):
            first, second = F.normalize(targets.float(), dim=2).unbind(1)
        keys = torch.cat([gather(first), gather(second)])
        places = (self.oldest + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue.index_copy_(0, places, keys)
        self.oldest.add_(len(keys)).remainder_(len(self.queue))
