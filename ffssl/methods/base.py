"""What a self-supervised method is to the training loop."""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Progress:
    """Where in a run a step is; what a method schedules is a function of it."""

    step: int
    total_steps: int
    epoch: int


class Method(nn.Module):
    """A backbone with the heads and the loss of one method.

    A subclass sets `name` (by which the option `method.name` finds it) and `policy` (the name of
    its authors' view policy, in `ffssl.data.policy.POLICIES`), gives `project` and `loss`, and
    declares its options as keyword arguments with defaults. Its `loss` passes the views through its
    networks as `batches` gives them; `project_pair` does.
    """

    policy = "simsiam"
    # Pass both views through a network as one batch, over which BatchNorm then normalises; else one
    # after the other.
    joint_views = False
    decay_all = True  # weight decay on biases and normalisation parameters too

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def project(self, images: Tensor) -> Tensor:
        """Projections (N, d) of images (N, 3, R, R); Hard Augment compares views by them."""
        raise NotImplementedError

    def loss(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The scalar loss of a batch of positive pairs, each (N, 3, R, R), and the first views'
        projections (N, d).
        """
        raise NotImplementedError

    def batches(self, first: Tensor, second: Tensor) -> list[Tensor]:
        """The views as they go through a network: (2N, ...), or twice (N, ...)."""
        return [torch.cat([first, second])] if self.joint_views else [first, second]

    def project_pair(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Projections (N, d) of each view of a pair."""
        return torch.cat([self.project(images) for images in self.batches(first, second)]).chunk(2)

    def forward(self, *views: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss(*views)

    def targets(self, images: Tensor, projections: Tensor | None = None) -> Tensor:
        """What the loss compares other views of the images (N, 3, R, R) with: (N, d'), without
        gradient.

        Here the projections, which are computed unless they are given; those of a teacher for
        methods that have one.
        """
        return (self.project(images) if projections is None else projections).detach()

    def pair_losses(self, projections: Tensor, targets: Tensor) -> Tensor:
        """The method's own loss of each pair of an image's views, for Hard Augment: (B, m, m),
        symmetric.

        projections: (B, m, d). targets: (B, m, d'). Methods whose loss is none of single images
        leave this out.
        """
        raise NotImplementedError

    def compare(self, images: Tensor, batch: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """The losses of all pairs of views, of images (B m, 3, R, R). batch: B and m.

        Returns the losses (B, m, m), the projections (B, m, d) and the targets (B, m, d').
        """
        projections = self.project(images)
        targets = self.targets(images, projections).unflatten(0, batch)
        projections = projections.unflatten(0, batch)
        return self.pair_losses(projections, targets), projections, targets

    @property
    def pair_loss(self) -> str:
        """What Hard Augment compares pairs by if it is not told: "method" or "cosine".

        It is the method's own loss, unless that is none of single images. A subclass for which the
        cosine of the projections ranks pairs alike, and costs less, may say so.
        """
        return "method" if self.has_pair_losses else "cosine"

    @property
    def has_pair_losses(self) -> bool:
        return type(self).pair_losses is not Method.pair_losses

    def check(self, batch_size: int) -> None:
        """Raise UserError if the method can't work with optimiser steps of `batch_size` images."""

    def before_step(self, progress: Progress) -> None:
        """Called before a step's forward pass: set what is scheduled."""

    def after_backward(self, progress: Progress) -> None:
        """Called when a step's gradients are there, before the optimiser's step: drop those (None)
        that it is not to follow.
        """

    def after_step(self, progress: Progress) -> None:
        """Called after the optimiser's step: update the teacher."""

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Groups of the trained parameters for the optimiser.

        A group with `constant_lr` keeps the peak learning rate throughout.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        decayed = [p for p in parameters if self.decay_all or p.ndim > 1]
        rest = [p for p in parameters if not self.decay_all and p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": weight_decay}]
        return groups + ([{"params": rest, "weight_decay": 0.0}] if rest else [])


def mlp(
    widths: list[int], *, last_norm: bool | None, bias: bool = False, last_bias: bool | None = None
) -> nn.Sequential:
    """Linear layers of the given widths with BatchNorm and ReLU between them.

    last_norm: BatchNorm after the last layer with affine parameters (True), without (False), or
    none (None). bias: whether layers followed by BatchNorm have one. last_bias: whether the last
    layer has one; if None, it does where no BatchNorm follows.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths[:-2], widths[1:-1]):
        layers += [
            nn.Linear(inputs, outputs, bias=bias),
            nn.BatchNorm1d(outputs),
            nn.ReLU(inplace=True),
        ]
    layers.append(
        nn.Linear(
            widths[-2],
            widths[-1],
            bias=(last_norm is None or bias) if last_bias is None else last_bias,
        )
    )
    if last_norm is not None:
        layers.append(nn.BatchNorm1d(widths[-1], affine=last_norm))
    return nn.Sequential(*layers)


def full_precision(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Autocast off on the tensor's device: half precision can't tell views that look alike apart,
    and temperatures magnify its errors.
    """
    return torch.autocast("cuda" if tensor.is_cuda else "cpu", enabled=False)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarities, in float32, of rows of a (..., m, d) and b (..., n, d): (..., m, n)."""
    with full_precision(a):
        return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).mT


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """A (m, k) @ b (k, n) in float32, which a GPU computes in TF32, in its backward pass too: for
    the correlations of thousands of dimensions, which take it many times as long in full
    precision. Not where convolutions may not (`torch.backends.cudnn.allow_tf32`).
    """
    return _product_in_tf32(a, b) if a.is_cuda and torch.backends.cudnn.allow_tf32 else a @ b


# Which torch.compile calls as it is: it knows no such switch.
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


def _keep(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors
    return _product_in_tf32(gradient, b.T), _product_in_tf32(a.T, gradient)


_product_in_tf32.register_autograd(_backward, setup_context=_keep)
