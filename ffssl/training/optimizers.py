"""Optimisers by name: what they decay and adapt, and how the schedules set them."""

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from ffssl.levers.one_cycle import set_momentum

OPTIMIZERS = ("sgd", "lars", "adamw")  # values of training.optimizer
TRUST = 0.001  # of LARS: norm of a step at a learning rate of 1, as a fraction of the weight's norm


def build_optimizer(
    name: str,
    groups: list[dict],
    *,
    weight_decay: float,
    decay_norm_and_bias: bool | None,
    momentum: float,
) -> Optimizer:
    """Return one of OPTIMIZERS, with a learning rate of 0, over a method's parameter groups.

    groups: see `Method.parameter_groups`.
    decay_norm_and_bias: whether `weight_decay` also applies to biases and to the parameters of
        normalisation; None keeps the decay that each group has.
    momentum: momentum of SGD and LARS; beta1 of AdamW, whose beta2 is 0.999.

    LARS does not adapt what it does not decay, as in SimCLR and BYOL.
    """
    # Else the first step would import it, for seconds that count as training.
    import torch._dynamo

    if name == "lars" or decay_norm_and_bias is not None:
        groups = [
            part for group in groups for part in _by_kind(group, weight_decay, decay_norm_and_bias)
        ]
    # The fused step takes a third of the time, on a CPU too.
    fused = all(p.device.type in ("cuda", "cpu") for group in groups for p in group["params"])
    if name in ("sgd", "lars"):
        optimizer = {"sgd": SGD, "lars": Lars}[name](groups, lr=0.0, momentum=momentum, fused=fused)
        # Create the momentum buffers now. A zero buffer is equivalent, and fused SGD fails if some
        # parameters have no gradient in the first step, or if fp16's scaler skips it.
        for p in itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups):
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return optimizer
    return AdamW(groups, lr=0.0, betas=(momentum, 0.999), fused=fused)


class Lars(SGD):
    """Layer-wise adaptive rate scaling (You et al. 2017, algorithm 1).

    The gradient of a weight, with its decay, is scaled to a norm of 0.001 times the weight's norm.
    SGD follows. A gradient is not scaled if one of the norms is 0, nor in a group without decay,
    unless the group has `always_adapt`.

    The last step is SGD's fused step. It skips gradients that the fp16 scaler has found to be
    infinite, and the host need not know.
    """

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # takes no closure
        decays = [group["weight_decay"] for group in self.param_groups]
        # The fp16 scaler hands its scale over in this attribute.
        scale, self.grad_scale = getattr(self, "grad_scale", None), None
        try:
            for group, decay in zip(self.param_groups, decays):
                params = [p for p in group["params"] if p.grad is not None]
                adapt = decay != 0 or group.get("always_adapt", False)
                _adapt(params, decay, scale, adapt)
                group["weight_decay"] = 0.0  # the gradient contains it now
            super().step()
        finally:
            for group, decay in zip(self.param_groups, decays):
                group["weight_decay"] = decay


def _adapt(params: list[Tensor], decay: float, scale: Tensor | None, adapt: bool) -> None:
    """Unscale and adapt the gradients in place. They are `scale` times too large."""
    if not params:
        return
    gradients = [p.grad for p in params if p.grad is not None]
    if scale is not None:
        torch._foreach_mul_(gradients, scale.reciprocal())
    if not adapt:
        return
    weights, slopes = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, gradients))
    rates = torch.where(
        (weights > 0) & (slopes > 0), TRUST * weights / (slopes + decay * weights), 1.0
    )
    torch._foreach_add_(gradients, params, alpha=decay)
    torch._foreach_mul_(gradients, rates.unbind())


def _by_kind(group: dict, weight_decay: float, decay_norm_and_bias: bool | None) -> list[dict]:
    """Split a group into weights and vectors, each with its decay.

    Vectors are biases and the parameters of normalisation.
    """
    weights = [p for p in group["params"] if p.ndim > 1]
    vectors = [p for p in group["params"] if p.ndim <= 1]
    decay = (
        group["weight_decay"] if decay_norm_and_bias is None else weight_decay * decay_norm_and_bias
    )
    # LARS adapts a group that has a weight decay. It is to adapt weights in any case.
    parts = [
        {**group, "params": weights, "always_adapt": True},
        {**group, "params": vectors, "weight_decay": decay},
    ]
    return [part for part in parts if part["params"]]


def restore_optimizer(optimizer: Optimizer, state: dict) -> None:
    """Continue from an optimiser's state, saved on any device."""
    for group in state["param_groups"]:
        group["fused"] = optimizer.defaults["fused"]  # depends on the device
    optimizer.load_state_dict(state)


def set_weight_decay(optimizer: Optimizer, weight_decay: float) -> None:
    """Set the weight decay of the groups that have one, before a step."""
    for group in optimizer.param_groups:
        if group["weight_decay"]:
            group["weight_decay"] = weight_decay


@torch.no_grad()
def clip_each(parameters: Iterable[Tensor], most: float) -> None:
    """Scale each parameter's gradient in place to a norm of at most about `most`.

    Each parameter is clipped alone, as in DINO's official code.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    torch._foreach_mul_(gradients, (most / (norms + 1e-6)).clamp(max=1).unbind())


def set_learning_rate_and_momentum(
    optimizer: Optimizer, learning_rate: float, momentum: float, *, peak: float
) -> None:
    """Set both in all groups, before a step.

    A group with `constant_lr` stays at the `peak` learning rate. AdamW's momentum is its beta1.
    """
    for group in optimizer.param_groups:
        group["lr"] = peak if group.get("constant_lr") else learning_rate
    set_momentum(optimizer, momentum)
