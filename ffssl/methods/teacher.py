"""Teachers: networks whose weights are an exponential moving average (EMA) of the student's."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ffssl.backbones import Backbone
from ffssl.methods.base import Progress
from ffssl.methods.prediction import PredictionMethod
from ffssl.schedules import half_cosine


class Teacher(nn.Module):
    """A copy of the student's modules, in sequence, without gradients.

    Its BatchNorm layers are in training mode when the method is. They normalise by the batch and
    keep their own running statistics, which are not averaged with the student's, as in the official
    code of BYOL, MoCo and DINO. Dropout and stochastic depth are always off, as in DINO: a target
    need not be noisy.
    """

    def __init__(self, *student: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*copy.deepcopy(student)).requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)

    def train(self, mode: bool = True) -> "Teacher":
        super().train(False)
        self.training = mode
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.train(mode)
        return self

    @torch.no_grad()
    def follow(self, student: Iterable[nn.Module], momentum: float) -> None:
        """Teacher <- momentum * teacher + (1 - momentum) * student, for all parameters."""
        parameters: list[Tensor] = [p for module in student for p in module.parameters()]
        torch._foreach_lerp_(list(self.parameters()), parameters, 1 - momentum)


class TeacherMethod(PredictionMethod):
    """A method whose targets come from a teacher.

    The teacher follows the student after each optimiser step. A subclass sets `self.teacher =
    Teacher(*self.student())` after it has made its heads.
    """

    compares_pairs_by = "student"

    projector: nn.Module
    teacher: Teacher

    def __init__(self, backbone: Backbone, *, teacher_momentum: float, teacher_momentum_end: float):
        super().__init__(backbone)
        self.teacher_momentum, self.teacher_momentum_end = teacher_momentum, teacher_momentum_end

    def student(self) -> tuple[nn.Module, ...]:
        """Return the modules that the teacher follows, in the order in which images pass them."""
        return self.backbone, self.projector

    def targets(self, images: Tensor, projections: Tensor | None = None) -> Tensor:
        return self.teacher(images)

    def student_pair_losses(self, projections: Tensor) -> Tensor:
        """Return the losses of all pairs with the student in its teacher's place.

        They rank pairs nearly as `pair_losses` does, without the teacher's pass over all views.

        projections: (N, m, d). The losses are (N, m, m), symmetric.
        """
        predictions = self.predictions(projections)
        return self.both_ways(predictions, self.student_targets(projections, predictions))

    def student_targets(self, projections: Tensor, predictions: Tensor) -> Tensor:
        """Return what the student has where its teacher has targets: (N, m, d').

        projections: (N, m, d).
        predictions: (N, m, d').
        """
        return projections

    def momentum(self, progress: Progress) -> float:
        """Return the EMA's momentum at a step (BYOL, section 3.3).

        It goes from its first value to its last along a half cosine.
        """
        return half_cosine(
            progress.step,
            total=progress.total_steps,
            first=self.teacher_momentum,
            last=self.teacher_momentum_end,
        )

    def after_step(self, progress: Progress) -> None:
        self.teacher.follow(self.student(), self.momentum(progress))
