"""Optimisers against their formulas, in float64."""

import pytest
import torch
from torch import nn

from ffssl.backbones import build_backbone
from ffssl.methods import METHODS, build_method
from ffssl.training.optimizers import (
    OPTIMIZERS,
    build_optimizer,
    clip_each,
    set_learning_rate_and_momentum,
)

STEPS = [(0.5, 0.95), (1.0, 0.9), (0.25, 0.85)]  # learning rate and momentum


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).double()


def groups(net: nn.Module, weight_decay: float, decay_all: bool) -> list[dict]:
    weights, vectors = (
        [p for p in net.parameters() if (p.ndim > 1) == kind] for kind in (True, False)
    )
    return [
        {"params": weights, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": weight_decay * decay_all},
    ]


def trained(
    name: str,
    net: nn.Module,
    weight_decay: float,
    *,
    decay_all: bool = False,
    decay_norm_and_bias: bool | None = None,
) -> None:
    """Steps with gradients that are those of a fixed sum of squares."""
    optimizer = build_optimizer(
        name,
        groups(net, weight_decay, decay_all),
        weight_decay=weight_decay,
        decay_norm_and_bias=decay_norm_and_bias,
        momentum=0.9,
    )
    for step, (learning_rate, momentum) in enumerate(STEPS):
        set_learning_rate_and_momentum(optimizer, learning_rate, momentum, peak=1.0)
        for i, p in enumerate(net.parameters()):
            p.grad = gradient(p, i, step)
        optimizer.step()


def gradient(p: torch.Tensor, i: int, step: int) -> torch.Tensor:
    return torch.sin(p.detach() * (i + 1) + step)


def sgd(p, g, state, *, lr, momentum, decay, adapted):
    state["v"] = momentum * state.get("v", 0) + g + decay * p
    return p - lr * state["v"]


def lars(p, g, state, *, lr, momentum, decay, adapted):
    """You et al. 2017, algorithm 1, with the momentum of PyTorch's SGD; not adapted where a norm is
    0, as all implementations do.
    """
    rate = (
        0.001 * p.norm() / (g.norm() + decay * p.norm())
        if adapted and p.norm() * g.norm() > 0
        else 1
    )
    state["v"] = momentum * state.get("v", 0) + rate * (g + decay * p)
    return p - lr * state["v"]


def adamw(p, g, state, *, lr, momentum, decay, adapted):
    """Loshchilov & Hutter 2019, algorithm 2, with a beta1 of each step."""
    state["t"] = t = state.get("t", 0) + 1
    state["m"] = momentum * state.get("m", 0) + (1 - momentum) * g
    state["s"] = 0.999 * state.get("s", 0) + 0.001 * g * g
    m, s = state["m"] / (1 - momentum**t), state["s"] / (1 - 0.999**t)
    return p - lr * decay * p - lr * m / (s.sqrt() + 1e-8)


@pytest.mark.parametrize("name, formula", [("sgd", sgd), ("lars", lars), ("adamw", adamw)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("decay_norm_and_bias", [None, True, False])
@pytest.mark.parametrize("decay_all", [True, False])
def test_three_steps_follow_the_formula(
    name, formula, weight_decay, decay_norm_and_bias, decay_all
):
    net, expected = network(), [p.detach().clone() for p in network().parameters()]
    trained(name, net, weight_decay, decay_all=decay_all, decay_norm_and_bias=decay_norm_and_bias)
    vectors_too = decay_all if decay_norm_and_bias is None else decay_norm_and_bias
    states = [{} for _ in expected]
    for step, (learning_rate, momentum) in enumerate(STEPS):
        for i, p in enumerate(expected):
            decay = weight_decay if p.ndim > 1 or vectors_too else 0.0
            adapted = p.ndim > 1 or decay > 0
            expected[i] = formula(
                p,
                gradient(p, i, step),
                states[i],
                lr=learning_rate,
                momentum=momentum,
                decay=decay,
                adapted=adapted,
            )
    for p, q in zip(net.parameters(), expected):
        torch.testing.assert_close(p.detach(), q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rate_and_momentum_reach_every_group(name):
    parameters = [[nn.Parameter(torch.ones(2, 2))] for _ in range(2)]
    given = [
        {"params": parameters[0], "weight_decay": 0.1},
        {"params": parameters[1], "weight_decay": 0.1, "constant_lr": True},
    ]
    optimizer = build_optimizer(
        name, given, weight_decay=0.1, decay_norm_and_bias=None, momentum=0.9
    )
    set_learning_rate_and_momentum(optimizer, 0.25, 0.87, peak=2.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 2.0]
    assert [
        group["betas"] if name == "adamw" else group["momentum"] for group in optimizer.param_groups
    ] == [(0.87, 0.999) if name == "adamw" else 0.87] * 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_that_was_saved_continues_as_if_nothing_had_been(name, tmp_path):
    def step(net, optimizer, i):
        set_learning_rate_and_momentum(optimizer, *STEPS[i], peak=1.0)
        for k, p in enumerate(net.parameters()):
            p.grad = gradient(p, k, i)
        optimizer.step()

    def start():
        net = network()
        return net, build_optimizer(
            name, groups(net, 0.1, False), weight_decay=0.1, decay_norm_and_bias=None, momentum=0.9
        )

    net, optimizer = start()
    step(net, optimizer, 0)
    torch.save(
        {"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt"
    )
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other, other_optimizer = start()
    other.load_state_dict(state["net"])
    other_optimizer.load_state_dict(state["optimizer"])
    for i in (1, 2):
        step(net, optimizer, i)
        step(other, other_optimizer, i)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fused_step_takes_parameters_whose_first_gradient_comes_later(name):
    """As that of DINO's last layer does."""
    nets = network(), network()
    for net, fused in zip(nets, (True, False)):
        optimizer = build_optimizer(
            name, groups(net, 0.1, False), weight_decay=0.1, decay_norm_and_bias=None, momentum=0.9
        )
        assert all(group["fused"] for group in optimizer.param_groups)
        for group in optimizer.param_groups:
            group["fused"] = fused
        for i in range(3):
            set_learning_rate_and_momentum(optimizer, *STEPS[i], peak=1.0)
            for k, p in enumerate(net.parameters()):
                p.grad = gradient(p, k, i) if k or i else None
            optimizer.step()
    for p, q in zip(*(net.parameters() for net in nets)):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scaled_gradients_change_no_step_and_infinite_ones_take_none(name):
    """As in fp16, without a look at the gradients by the host: the scaler hands over what it
    knows.
    """
    nets = network(), network()
    for net, scale in zip(nets, (1.0, 1024.0)):
        optimizer = build_optimizer(
            name, groups(net, 0.1, False), weight_decay=0.1, decay_norm_and_bias=None, momentum=0.9
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.ones(()))  # which makes the scale's tensor
        for i in range(3):
            set_learning_rate_and_momentum(optimizer, *STEPS[i], peak=1.0)
            for k, p in enumerate(net.parameters()):
                p.grad = scaler.get_scale() * gradient(p, k, i)
            scaler.step(optimizer)
            scaler.update()
            before = [p.detach().clone() for p in net.parameters()]
            for p in net.parameters():
                p.grad = torch.full_like(p, float("nan") if p is net[0].weight else 1.0)
            scaler.step(optimizer)
            scaler.update()
            assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before))
        assert (
            optimizer._step_supports_amp_scaling
            and [group["weight_decay"] for group in optimizer.param_groups][0] == 0.1
        )
    for p, q in zip(*(net.parameters() for net in nets)):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("decay_norm_and_bias", [None, True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_of_a_method_is_in_one_group_with_the_decay_asked_for(
    method, decay_norm_and_bias, name
):
    built = build_method(method, build_backbone("resnet-small"), {})
    given = built.parameter_groups(0.01)
    default = {p: group["weight_decay"] for group in given for p in group["params"]}
    optimizer = build_optimizer(
        name, given, weight_decay=0.01, decay_norm_and_bias=decay_norm_and_bias, momentum=0.9
    )
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) and set(held) == set(default)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for p in held:
        assert decay[p] == (
            default[p] if decay_norm_and_bias is None or p.ndim > 1 else 0.01 * decay_norm_and_bias
        )


def test_gradients_are_clipped_parameter_by_parameter_as_in_dinos_code():
    net = network()
    for i, p in enumerate(net.parameters()):
        p.grad = gradient(p, i, 0)
    net[0].bias.grad, frozen = None, net[0].bias
    expected = []
    for p in net.parameters():
        if p is not frozen:
            norm = sum(float(g) ** 2 for g in p.grad.flatten()) ** 0.5
            expected.append(p.grad * min(1.5 / (norm + 1e-6), 1))
    before = [p.grad.clone() for p in net.parameters() if p is not frozen]
    clip_each(net.parameters(), 1.5)
    after = [p.grad for p in net.parameters() if p is not frozen]
    torch.testing.assert_close(after, expected)
    changed = [not torch.equal(a, b) for a, b in zip(before, after)]
    assert frozen.grad is None and any(changed) and not all(changed)
