"""The schedules against the paper's equations, written out as they are printed there."""

from math import cos, pi

import pytest

from ffssl import schedules
from ffssl.schedules import LEARNING_RATE_SCHEDULES

TOTAL, WARMUP, PEAK, LOW, HIGH = 1000, 130, 0.3, 0.85, 0.95
STEPS = range(0, TOTAL + 1)


def one_cycle(t, L, tw):
    """Equations 7 (with tw = rho L) and 8: learning rate and momentum."""
    if t < tw:
        return PEAK - PEAK / 2 * (cos(pi * t / tw) + 1), LOW + (HIGH - LOW) / 2 * (
            cos(pi * t / tw) + 1
        )
    return PEAK / 2 * (cos(pi * (t - tw) / (L - tw)) + 1), HIGH - (HIGH - LOW) / 2 * (
        cos(pi * (t - tw) / (L - tw)) + 1
    )


def cosine(t, L, tw):
    return PEAK / 2 * (cos(pi * t / L) + 1), 0.9


def cosine_with_warmup(t, L, tw):
    return (PEAK * t / tw if t < tw else PEAK / 2 * (cos(pi * (t - tw) / (L - tw)) + 1)), 0.9


EQUATIONS = {
    "f1-clr": one_cycle,
    "1-clr": one_cycle,
    "cosine": cosine,
    "cosine-warmup": cosine_with_warmup,
}


def pair(step, schedule, warmup=WARMUP):
    return schedules.learning_rate_and_momentum(
        step,
        schedule=schedule,
        total=TOTAL,
        warmup=warmup,
        peak=PEAK,
        momentum=0.9,
        momentum_low=LOW,
        momentum_high=HIGH,
    )


@pytest.mark.parametrize("schedule", LEARNING_RATE_SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, WARMUP, TOTAL - 1])
def test_learning_rate_and_momentum_follow_the_equations(schedule, warmup):
    for step in STEPS:
        assert pair(step, schedule, warmup) == pytest.approx(
            EQUATIONS[schedule](step, TOTAL, warmup), abs=1e-12
        )


@pytest.mark.parametrize("schedule", LEARNING_RATE_SCHEDULES)
def test_learning_rate_and_momentum_are_continuous(schedule):
    pairs = [pair(step, schedule) for step in STEPS]
    for before, after in zip(pairs, pairs[1:]):
        assert abs(after[0] - before[0]) <= PEAK / 2 * pi / WARMUP
        assert abs(after[1] - before[1]) <= (HIGH - LOW) / 2 * pi / WARMUP


def test_the_one_cycle_is_at_its_limits_at_both_ends_and_after_the_warmup():
    assert pair(0, "f1-clr") == pytest.approx((0, HIGH))
    assert pair(WARMUP, "f1-clr") == pytest.approx((PEAK, LOW))
    assert pair(TOTAL, "f1-clr") == pytest.approx((0, HIGH))


def test_the_range_test_rises_exponentially_between_its_limits():
    rates = [schedules.exponential(step, total=200, low=1e-3, high=1.0) for step in range(200)]
    assert (rates[0], rates[-1]) == pytest.approx((1e-3, 1))
    assert [b / a for a, b in zip(rates, rates[1:])] == pytest.approx([1000 ** (1 / 199)] * 199)


def test_noise_scale():
    assert schedules.noise_scale(
        learning_rate=0.1, momentum=0.9, samples=9469, batch_size=128
    ) == pytest.approx(0.1 * 9469 / (128 * 0.1))


def resolutions(epochs, *, schedule="spl", warmup=80, low=96, high=224, step=32):
    return [
        schedules.resolution(
            e, schedule=schedule, epochs=epochs, warmup=warmup, low=low, high=high, step=step
        )
        for e in range(epochs)
    ]


def test_spl_is_at_the_largest_side_in_the_warmup_then_climbs_in_equal_stages():
    assert resolutions(480) == [224] * 80 + [
        side for side in (96, 128, 160, 192, 224) for _ in range(80)
    ]


def test_progressive_learning_has_no_warmup_at_the_largest_side():
    assert resolutions(500, schedule="progressive") == [
        side for side in (96, 128, 160, 192, 224) for _ in range(100)
    ]


@pytest.mark.parametrize(
    "epochs, low, high, step",
    [(7, 96, 224, 32), (103, 64, 224, 32), (50, 16, 48, 16), (9, 100, 190, 32), (1, 96, 224, 32)],
)
def test_stages_are_multiples_in_order_and_of_nearly_equal_length(epochs, low, high, step):
    sides = resolutions(epochs, warmup=0, low=low, high=high, step=step)
    assert sides == sorted(sides)
    stages = [low + i * step for i in range((high - low) // step + 1)]
    assert set(sides) <= set(stages)
    if epochs >= len(stages):
        lengths = [sides.count(side) for side in stages]
        assert max(lengths) - min(lengths) <= 1


def test_other_schedules_of_the_resolution():
    assert resolutions(10, schedule="constant") == [224] * 10
    assert resolutions(10, warmup=9, low=224) == [224] * 10


def test_free_stages_have_their_shares_of_the_epochs():
    stages = [(96, 0.3), (224, 0.2), (160, 0.1), (224, 0.4)]  # 0.3 + 0.2 + 0.1 is not quite 0.6
    sides = [schedules.staged_resolution(e, epochs=10, stages=stages) for e in range(10)]
    assert sides == [96] * 3 + [224] * 2 + [160] + [224] * 4


def test_half_resolution_for_three_quarters_saves_what_fastdinov2_states():
    stages = [(112, 0.75), (224, 0.25)]
    sides = [schedules.staged_resolution(e, epochs=200, stages=stages) for e in range(200)]
    assert 200 / sum((side / 224) ** 2 for side in sides) == pytest.approx(2.29, abs=5e-3)


@pytest.mark.parametrize("low, speed_up", [(128, 1.424), (96, 1.598), (64, 1.784)])
def test_spl_alone_saves_what_the_design_states(low, speed_up):
    cost = sum((side / 224) ** 2 for side in resolutions(480, low=low))
    # Six stages do not divide 400 epochs evenly.
    assert 480 / cost == pytest.approx(speed_up, rel=2e-3)


def test_f1_clr_and_spl_save_what_the_design_states():
    assert 800 / sum(
        (side / 224) ** 2 for side in resolutions(480, schedule="constant")
    ) == pytest.approx(1.667, abs=5e-4)
    assert 800 / sum((side / 224) ** 2 for side in resolutions(480)) == pytest.approx(
        2.663, abs=5e-4
    )


def test_magnitude_rises_linearly_from_the_first_epoch_to_the_last():
    values = [schedules.magnitude(epoch, epochs=5, low=4, high=6) for epoch in range(5)]
    assert values == pytest.approx([4, 4.5, 5, 5.5, 6])
    assert schedules.magnitude(0, epochs=1, low=4, high=6) == 4


def test_the_share_of_hard_pairs_rises_linearly_from_its_start_to_the_last_epoch():
    shares = [schedules.hard_share(e, epochs=9, start=3, low=0.25, high=1) for e in range(9)]
    assert shares == pytest.approx([0, 0, 0, 0.25, 0.4, 0.55, 0.7, 0.85, 1])
    constant = [schedules.hard_share(e, epochs=4, start=3, low=1, high=1) for e in range(4)]
    assert constant == [0, 0, 0, 1]


def test_a_half_cosine_goes_from_its_first_value_to_its_last():
    values = [schedules.half_cosine(step, total=8, first=0.04, last=0.4) for step in range(9)]
    assert values[0] == pytest.approx(0.04) and values[8] == 0.4
    assert values[4] == pytest.approx(0.22) and values == sorted(values)
    # DINO's cosine_scheduler.
    assert values[3] == pytest.approx(0.4 + 0.5 * (0.04 - 0.4) * (1 + cos(pi * 3 / 8)))


@pytest.mark.parametrize("step, sides", [(16, [48, 48, 64, 80, 96]), (32, [32, 64, 64, 96, 96])])
def test_the_side_of_local_views_follows_that_of_the_global_ones(step, sides):
    found = [schedules.local_side(side, share=0.43, step=step) for side in (96, 128, 160, 192, 224)]
    assert found == sides
    assert schedules.local_side(32, share=0.1, step=16) == 16  # never nothing
