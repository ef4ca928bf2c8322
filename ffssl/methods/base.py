"""The interface of a self-supervised method, as the training loop uses it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffssl.backbones import Backbone
from ffssl.parallel.device import full_precision


@dataclass(frozen=True)
class Progress:
    """Where in a run a step is. What a method schedules is a function of it."""

    step: int
    total_steps: int
    epoch: int


class Method(nn.Module):
    """A backbone with the heads and the loss of one method.

    A subclass sets `name` (the value of the option `method.name`) and `policy` (the name of its
    authors' view policy, in `ffssl.data.policy.POLICIES`). It makes a `projector`, or defines
    `project`, and defines `loss`. It declares its options as keyword arguments with defaults. Its
    `loss` must pass the views through its networks as `batches` gives them, which `project_pair`
    does.
    """

    name: ClassVar[str]
    projector: nn.Module
    policy = "simsiam"
    # Pass both views through a network as one batch, which BatchNorm normalises together. If not,
    # pass one after the other.
    joint_views = False
    # Share of the run that passes before Hard Augment begins, if that is later than the warm-up.
    share_before_hard_augment = 0.0
    # Share of the images that get their hardest pair when Hard Augment begins; it rises from there.
    first_hard_share = 1.0
    takes_local_views = False  # whether `loss` takes the small views of multi-crop, as `local`
    decay_norm_and_bias = True  # weight decay on biases and normalisation parameters too

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def project(self, images: Tensor) -> Tensor:
        """Return projections (N, d) of images (N, 3, R, R). Hard Augment compares views by them."""
        return self.projector(self.backbone(images))

    def loss(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch of positive pairs, a scalar, and the first views' projections.

        first, second: normalised views, each (N, 3, R, R).

        The projections are (N, d).
        """
        raise NotImplementedError

    def batches(self, first: Tensor, second: Tensor) -> list[Tensor]:
        """Return the batches that go through a network: one of (2N, ...), or two of (N, ...)."""
        return [torch.cat([first, second])] if self.joint_views else [first, second]

    def project_pair(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Return the projections (N, d) of both views of a pair."""
        projections = [self.project(images) for images in self.batches(first, second)]
        of_first, of_second = torch.cat(projections).chunk(2)
        return of_first, of_second

    def forward(self, *views: Tensor, **more: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss(*views, **more)

    def targets(self, images: Tensor, projections: Tensor | None = None) -> Tensor:
        """Return targets (N, d') of images (N, 3, R, R), without gradient.

        The loss compares other views of the images with them. Here they are the projections, which
        are computed unless they are given. A method with a teacher returns the teacher's.
        """
        return (self.project(images) if projections is None else projections).detach()

    def pair_losses(self, projections: Tensor, targets: Tensor) -> Tensor:
        """Return the method's own loss of each pair of an image's views: (B, m, m), symmetric.

        projections: (B, m, d).
        targets: (B, m, d').

        Hard Augment compares pairs by it. A method without a loss of single images does not
        override this.
        """
        raise NotImplementedError

    def compare(self, images: Tensor, batch: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses of all pairs of views, the projections and the targets.

        images: all views, (B m, 3, R, R).
        batch: B and m.

        Their shapes are (B, m, m), (B, m, d) and (B, m, d').
        """
        projections = self.project(images)
        targets = self.targets(images, projections).unflatten(0, batch)
        projections = projections.unflatten(0, batch)
        return self.pair_losses(projections, targets), projections, targets

    @property
    def compares_pairs_by(self) -> str:
        """How Hard Augment compares pairs by default: "method", "student" or "cosine".

        By default it is the method's own loss, if the method has a loss of single images, else
        "cosine". A subclass may set another. Methods with a teacher take "student", which costs
        less. DINO keeps "method", since its student ranks pairs badly.
        """
        return "method" if self.has_pair_losses else "cosine"

    @property
    def has_pair_losses(self) -> bool:
        return type(self).pair_losses is not Method.pair_losses

    def check(self, batch_size: int) -> None:
        """Raise UserError if the method can't work with optimiser steps of `batch_size` images."""

    def before_step(self, progress: Progress) -> None:
        """Set what is scheduled. Called before a step's forward pass."""

    def after_backward(self, progress: Progress) -> None:
        """Drop gradients (set them to None) that the optimiser is not to follow.

        Called after a step's backward pass, before the optimiser's step.
        """

    def after_step(self, progress: Progress) -> None:
        """Update the teacher. Called after the optimiser's step."""

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Return groups of the trained parameters for the optimiser.

        A group with `constant_lr` keeps the peak learning rate throughout.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        decayed = [p for p in parameters if self.decay_norm_and_bias or p.ndim > 1]
        rest = [p for p in parameters if not self.decay_norm_and_bias and p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": weight_decay}]
        return groups + ([{"params": rest, "weight_decay": 0.0}] if rest else [])


def mlp(
    widths: list[int], *, last_norm: bool | None, bias: bool = False, last_bias: bool | None = None
) -> nn.Sequential:
    """Return linear layers of the given widths with BatchNorm and ReLU between them.

    last_norm: BatchNorm after the last layer: with affine parameters (True), without (False), or
        none (None).
    bias: whether layers followed by BatchNorm have a bias.
    last_bias: whether the last layer has a bias; by default it does if no BatchNorm follows.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths[:-2], widths[1:-1]):
        layers += [
            nn.Linear(inputs, outputs, bias=bias),
            nn.BatchNorm1d(outputs),
            nn.ReLU(inplace=True),
        ]
    if last_bias is None:
        last_bias = last_norm is None or bias
    layers.append(nn.Linear(widths[-2], widths[-1], bias=last_bias))
    if last_norm is not None:
        layers.append(nn.BatchNorm1d(widths[-1], affine=last_norm))
    return nn.Sequential(*layers)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine similarities of rows of a and b, in float32.

    a: (..., m, d).
    b: (..., n, d).

    The result is (..., m, n).
    """
    with full_precision(a):
        return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).mT


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return the float32 product of a (m, k) and b (k, n), computed in TF32 on a GPU.

    The backward pass uses TF32 too. For the correlations of thousands of dimensions, which take
    many times as long in full precision. TF32 is not used if convolutions may not use it
    (`torch.backends.cudnn.allow_tf32`).
    """
    return _product_in_tf32(a, b) if a.is_cuda and torch.backends.cudnn.allow_tf32 else a @ b


# A custom operation, since torch.compile can't trace the switch.
@torch.library.custom_op("ffssl::product_in_tf32", mutates_args=())
def _product_in_tf32(a: Tensor, b: Tensor) -> Tensor:
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        return a @ b
    finally:
        matmul.allow_tf32 = before


@_product_in_tf32.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors
    return _product_in_tf32(gradient, b.T), _product_in_tf32(a.T, gradient)


_product_in_tf32.register_autograd(_backward, setup_context=_keep)
