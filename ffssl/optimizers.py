"""Optimisers by name: what is decayed and adapted, and the learning rate and momentum that the schedules set."""

import itertools

import torch
from torch.optim import SGD, AdamW, Optimizer

OPTIMIZERS = ("sgd", "lars", "adamw")  # those of training.optimizer


def build_optimizer(
    name: str, groups: list[dict], *, weight_decay: float, decay_norm_and_bias: bool | None, momentum: float
) -> Optimizer:
    """One of OPTIMIZERS, at a learning rate of 0, over a method's parameter groups (`Method.parameter_groups`).

    decay_norm_and_bias: whether `weight_decay` is for the parameters of normalisation and the biases too; None: as the groups have it.
    momentum: AdamW's beta1, whose beta2 is 0.999.
    "lars" is You et al. 2017 with the trust coefficient 0.001. What is not decayed is not adapted either, as in SimCLR and BYOL.
    """
    import torch._dynamo  # the first step would import it, for seconds, in the time of training

    if name == "lars" or decay_norm_and_bias is not None:
        groups = [part for group in groups for part in _by_kind(group, weight_decay, decay_norm_and_bias)]
    fused = all(p.device.type in ("cuda", "cpu") for group in groups for p in group["params"])  # on a CPU too it takes a third of the time
    if name == "sgd":
        optimizer = SGD(groups, lr=0.0, momentum=momentum, fused=fused)
        # From the beginning, to the same effect: the fused step fails where only some parameters have had a gradient yet, and
        # leaves a buffer without values where the scaler of fp16 skips the first step.
        for p in itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups):
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return optimizer
    if name == "adamw":
        return AdamW(groups, lr=0.0, betas=(momentum, 0.999), fused=fused)
    from timm.optim import Lars  # timm takes seconds to import

    return Lars(groups, lr=0.0, momentum=momentum)


def _by_kind(group: dict, weight_decay: float, decay_norm_and_bias: bool | None) -> list[dict]:
    """A group's weights, and its vectors (the parameters of normalisation, biases), with what the optimiser does to each."""
    weights = [p for p in group["params"] if p.ndim > 1]
    vectors = [p for p in group["params"] if p.ndim <= 1]
    decay = group["weight_decay"] if decay_norm_and_bias is None else weight_decay * decay_norm_and_bias
    # timm's LARS takes a decay of 0 for an exclusion; weights are adapted without decay too
    parts = [{**group, "params": weights, "always_adapt": True}, {**group, "params": vectors, "weight_decay": decay}]
    return [part for part in parts if part["params"]]


def set_learning_rate_and_momentum(optimizer: Optimizer, learning_rate: float, momentum: float, *, peak: float) -> None:
    """Before a step. A group with `constant_lr` stays at the `peak` learning rate. AdamW's momentum is its beta1."""
    for group in optimizer.param_groups:
        group["lr"] = peak if group.get("constant_lr") else learning_rate
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum
