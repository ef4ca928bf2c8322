import copy
from math import cos, pi

import pytest
import torch
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, MultiplicativeLR, SequentialLR

from ffssl import FixedOneCycleLR, schedules
from ffssl.errors import UserError

TOTAL, WARMUP = 50, 13


def equation_8(step, peak, low=0.85, high=0.95):
    """As it is printed in the paper: learning rate and momentum."""
    if step < WARMUP:
        wave = cos(pi * step / WARMUP) + 1
        return peak - peak / 2 * wave, low + (high - low) / 2 * wave
    wave = cos(pi * (step - WARMUP) / (TOTAL - WARMUP)) + 1
    return peak / 2 * wave, high - (high - low) / 2 * wave


def parameters(count=1):
    return [torch.nn.Parameter(torch.ones(3)) for _ in range(count)]


def trained(optimizer, scheduler, steps):
    """What each step sees: (learning rate, momentum) of each group."""
    seen = []
    for _ in range(steps):
        groups = optimizer.param_groups
        seen.append([(g["lr"], g["betas"][0] if "betas" in g else g["momentum"]) for g in groups])
        for group in groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, 0.1)
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize(
    "kind, options",
    [
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (torch.optim.AdamW, {"betas": (0.9, 0.98)}),
        (torch.optim.RMSprop, {"momentum": 0.9}),
    ],
)
def test_every_step_has_the_equations_learning_rate_and_momentum(kind, options):
    optimizer = kind(parameters(), lr=7.0, **options)
    scheduler = FixedOneCycleLR(optimizer, TOTAL, WARMUP, 0.3)
    for step, [seen] in enumerate(trained(optimizer, scheduler, TOTAL)):
        assert seen == pytest.approx(equation_8(step, 0.3), abs=1e-12)
        assert seen[0] == schedules.f1_clr(step, total=TOTAL, warmup=WARMUP, peak=0.3)
    assert scheduler.get_last_lr() == [pytest.approx(0, abs=1e-12)]  # all steps taken
    if "betas" in options:
        assert optimizer.param_groups[0]["betas"][1] == 0.98


def test_a_weight_moves_as_by_momentum_sgd_written_out():
    [p] = parameters()
    optimizer = torch.optim.SGD([p], lr=1.0, momentum=0.5)
    trained(optimizer, FixedOneCycleLR(optimizer, TOTAL, WARMUP, 0.3), TOTAL)
    weight = velocity = 0.0
    for step in range(TOTAL):
        rate, momentum = equation_8(step, 0.3)
        velocity = momentum * velocity + 0.1
        weight -= rate * velocity
    torch.testing.assert_close(p.detach(), torch.full((3,), 1 + weight), rtol=1e-5, atol=1e-6)


def test_each_group_has_its_own_peak():
    a, b = parameters(2)
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=1.0, momentum=0.9)
    scheduler = FixedOneCycleLR(optimizer, TOTAL, WARMUP, [0.3, 0.02], momentum=(0.5, 0.9))
    for step, (first, second) in enumerate(trained(optimizer, scheduler, TOTAL)):
        assert first == pytest.approx(equation_8(step, 0.3, 0.5, 0.9), abs=1e-12)
        assert second == pytest.approx(equation_8(step, 0.02, 0.5, 0.9), abs=1e-12)


def test_without_momentum_the_optimizers_own_stays():
    optimizer = torch.optim.SGD(parameters(), lr=1.0, momentum=0.7)
    scheduler = FixedOneCycleLR(optimizer, TOTAL, WARMUP, 0.3, momentum=None)
    assert {momentum for [(_, momentum)] in trained(optimizer, scheduler, TOTAL)} == {0.7}
    FixedOneCycleLR(torch.optim.Adagrad(parameters()), TOTAL, WARMUP, 0.3, momentum=None)


def test_a_training_saved_halfway_goes_on_as_if_it_had_not_stopped():
    def start():
        optimizer = torch.optim.SGD(parameters(), lr=1.0, momentum=0.9)
        return optimizer, FixedOneCycleLR(optimizer, TOTAL, WARMUP, 0.3)

    whole = trained(*start(), TOTAL)
    optimizer, scheduler = start()
    first = trained(optimizer, scheduler, 20)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    again, its_scheduler = start()
    again.load_state_dict(saved[0])
    its_scheduler.load_state_dict(saved[1])
    assert first + trained(again, its_scheduler, TOTAL - 20) == whole
    # And from the number of steps alone, as torch's own schedulers do.
    optimizer.load_state_dict(saved[0])
    scheduler = FixedOneCycleLR(optimizer, TOTAL, WARMUP, 0.3, last_epoch=19)
    assert trained(optimizer, scheduler, TOTAL - 20) == whole[20:]


def test_it_works_among_torchs_schedulers():
    optimizer = torch.optim.SGD(parameters(), lr=0.01, momentum=0.9)
    cycle = FixedOneCycleLR(optimizer, TOTAL, WARMUP, 0.3)
    half = MultiplicativeLR(optimizer, lambda step: 0.5)
    seen = trained(optimizer, ChainedScheduler([cycle, half], optimizer), TOTAL)
    for step, [(rate, momentum)] in list(enumerate(seen))[1:]:
        expected = equation_8(step, 0.3)
        assert (2 * rate, momentum) == pytest.approx(expected, abs=1e-12)

    optimizer = torch.optim.SGD(parameters(), lr=0.01, momentum=0.9)
    flat = ConstantLR(optimizer, factor=0.1, total_iters=99)
    cycle = FixedOneCycleLR(optimizer, TOTAL, WARMUP, 0.3)
    both = SequentialLR(optimizer, [flat, cycle], milestones=[5])
    seen = trained(optimizer, both, 5 + TOTAL)
    assert [rate for [(rate, _)] in seen[:5]] == pytest.approx([0.001] * 5)
    for step, [pair] in enumerate(seen[5:]):
        assert pair == pytest.approx(equation_8(step, 0.3), abs=1e-12)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"warmup_steps": 50}, r"warmup_steps is 50, must lie in 0\.\.49, below total_steps=50"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"max_lr": [0.1, 0.2, 0.3]}, "max_lr has 3 values for 1 parameter groups"),
        ({"momentum": (0.95, 0.85)}, r"momentum is \(0.95, 0.85\).*the smaller first"),
        ({"optimizer": torch.optim.Adagrad(parameters())}, "Adagrad has neither momentum nor"),
    ],
)
def test_values_that_do_not_fit_are_refused(arguments, message):
    usual = {
        "optimizer": torch.optim.SGD(parameters(), lr=1.0, momentum=0.9),
        "total_steps": TOTAL,
        "warmup_steps": WARMUP,
        "max_lr": 0.3,
    }
    with pytest.raises(UserError, match=message) as error:
        FixedOneCycleLR(**usual | arguments)
    assert "\n" not in str(error.value)


def test_a_longer_loader_than_was_planned_for_is_refused():
    optimizer = torch.optim.SGD(parameters(), lr=1.0, momentum=0.9)
    scheduler = FixedOneCycleLR(optimizer, TOTAL, WARMUP, 0.3)
    trained(optimizer, scheduler, TOTAL)
    with pytest.raises(UserError, match="step 51 of 50; total_steps must be"):
        trained(optimizer, scheduler, 1)
