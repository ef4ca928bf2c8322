"""Optimisers by name: what is decayed and adapted, and the learning rate and momentum that the
schedules set.
"""

import itertools

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

OPTIMIZERS = ("sgd", "lars", "adamw")  # those of training.optimizer
TRUST = 0.001  # of LARS: the share of a weight's norm that a step of rate 1 moves it by


def build_optimizer(
    name: str,
    groups: list[dict],
    *,
    weight_decay: float,
    decay_norm_and_bias: bool | None,
    momentum: float,
) -> Optimizer:
    """One of OPTIMIZERS, at a learning rate of 0, over a method's parameter groups
    (`Method.parameter_groups`).

    decay_norm_and_bias: whether `weight_decay` is for the parameters of normalisation and the
    biases too; None: as the groups have it. momentum: AdamW's beta1, whose beta2 is 0.999. What
    LARS does not decay it does not adapt either, as in SimCLR and BYOL.
    """
    import torch._dynamo  # the first step would import it, for seconds, in the time of training

    if name == "lars" or decay_norm_and_bias is not None:
        groups = [
            part for group in groups for part in _by_kind(group, weight_decay, decay_norm_and_bias)
        ]
    # On a CPU too it takes a third of the time.
    fused = all(p.device.type in ("cuda", "cpu") for group in groups for p in group["params"])
    if name in ("sgd", "lars"):
        optimizer = {"sgd": SGD, "lars": Lars}[name](groups, lr=0.0, momentum=momentum, fused=fused)
        # From the beginning, to the same effect: the fused step fails where only some parameters
        # have had a gradient yet, and leaves a buffer without values where the scaler of fp16 skips
        # the first step.
        for p in itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups):
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return optimizer
    return AdamW(groups, lr=0.0, betas=(momentum, 0.999), fused=fused)


class Lars(SGD):
    """Layer-wise adaptive rates (You et al. 2017, algorithm 1): a weight's gradient, with its
    decay, is scaled so that its norm is 0.001 of the weight's; then SGD. Not where a norm is 0,
    nor in groups without decay, unless they have `always_adapt`.

    The last step is SGD's fused one, which passes over what the scaler of fp16 has found to be
    infinite, without the host's knowing.
    """

    @torch.no_grad()
    def step(self) -> None:
        decays = [group["weight_decay"] for group in self.param_groups]
        # Of fp16, as the scaler hands it over.
        scale, self.grad_scale = getattr(self, "grad_scale", None), None
        try:
            for group, decay in zip(self.param_groups, decays):
                _adapt(
                    [p for p in group["params"] if p.grad is not None],
                    decay,
                    scale,
                    decay != 0 or group.get("always_adapt", False),
                )
                group["weight_decay"] = 0.0  # it is in the gradient now
            super().step()
        finally:
            for group, decay in zip(self.param_groups, decays):
                group["weight_decay"] = decay


def _adapt(params: list[Tensor], decay: float, scale: Tensor | None, adapt: bool) -> None:
    """Turns the gradients, which are `scale` times too large, into those that SGD is to follow."""
    if not params:
        return
    gradients = [p.grad for p in params]
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
    """A group's weights, and its vectors (the parameters of normalisation, biases), with what the
    optimiser does to each.
    """
    weights = [p for p in group["params"] if p.ndim > 1]
    vectors = [p for p in group["params"] if p.ndim <= 1]
    decay = (
        group["weight_decay"] if decay_norm_and_bias is None else weight_decay * decay_norm_and_bias
    )
    # LARS takes a decay of 0 for an exclusion; weights are adapted without decay too
    parts = [
        {**group, "params": weights, "always_adapt": True},
        {**group, "params": vectors, "weight_decay": decay},
    ]
    return [part for part in parts if part["params"]]


def set_learning_rate_and_momentum(
    optimizer: Optimizer, learning_rate: float, momentum: float, *, peak: float
) -> None:
    """Before a step.

    A group with `constant_lr` stays at the `peak` learning rate. AdamW's momentum is its beta1.
    """
    for group in optimizer.param_groups:
        group["lr"] = peak if group.get("constant_lr") else learning_rate
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum
