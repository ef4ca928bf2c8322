"""When an epoch's steps are looked at, on a clock and a device that are stand-ins."""

from types import SimpleNamespace

import pytest
import torch

from ffssl.training import epoch as epochs
from ffssl.training.epoch import STEPS_BETWEEN_CHECKS, Epoch
from ffssl.training.totals import EpochTotals, StepResult

RESULT = StepResult(torch.tensor(1.0), torch.tensor(0.5), torch.ones(2, 3), None)
COMPILE_SECONDS = 400.0


class Loader:
    replaced = 0

    def __init__(self, steps):
        self.steps = steps

    def __len__(self):
        return self.steps

    def set_epoch(self, *_, **__):
        pass


def checked_steps(monkeypatch, *, steps, pace, compiling=(), device="cuda") -> list[int]:
    """The steps of an epoch after which a check is due.

    pace: seconds of a step. compiling: steps, counted from 1, which torch.compile takes part in.
    """
    totals = EpochTotals()

    class Meter:
        """Charges a step that compiled to compilation at its end, as the real one does."""

        time = 0.0

        def __init__(self, *_):
            pass

        def elapsed(self):
            return self.time

        def charge(self):
            totals.seconds += self.time
            self.time = 0.0

        def end_step(self):
            if totals.steps + 1 in compiling:
                totals.compile_seconds += COMPILE_SECONDS
                totals.compile_steps += 1
                self.time = 1e-6  # what passes until somebody asks
            else:
                self.time += pace

    monkeypatch.setattr(epochs, "Meter", Meter)
    monkeypatch.setattr(epochs, "RunAheadLimit", lambda _: lambda: None)
    shape = SimpleNamespace(resolution=32, for_loader={})
    schedule = SimpleNamespace(
        shape=lambda _: shape,
        magnitude=lambda _: 5.0,
        steps_per_epoch=steps,
        learning_rate_and_momentum=lambda _: (0.1, 0.9),
    )
    run = SimpleNamespace(
        schedule=schedule,
        epoch=0,
        totals=totals,
        device=SimpleNamespace(type=device),
        joules=lambda: None,
    )
    epoch = Epoch(run, Loader(steps))
    epoch._bar = SimpleNamespace(set_postfix=lambda **_: None)
    checked = []
    for step in range(1, steps + 1):
        epoch.add(RESULT)
        if epoch.check_is_due(saving=False):
            checked.append(step)
            assert epoch.check(saving=False) == (1.0, False)
    return checked


def test_on_a_cpu_each_step_is_looked_at(monkeypatch):
    assert checked_steps(monkeypatch, steps=4, pace=0.01, device="cpu") == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "pace, expected", [(0.001, [1, 51, 101, 120]), (0.5, [*range(1, 121, 10), 120]), (7, None)]
)
def test_on_a_gpu_after_fifty_steps_or_five_seconds_and_at_the_end(monkeypatch, pace, expected):
    got = checked_steps(monkeypatch, steps=120, pace=pace)
    assert got == sorted(set(expected or range(1, 121)))


def test_after_a_step_that_compiled_the_next_is_looked_at(monkeypatch):
    """A step of known length then says how many there may be."""
    first, far = STEPS_BETWEEN_CHECKS, 2 * STEPS_BETWEEN_CHECKS + 3
    assert checked_steps(monkeypatch, steps=far, pace=0.001, compiling=[1]) == [
        1,
        2,
        2 + first,
        2 + 2 * first,
        far,
    ]
    # A few graphs more, in the midst: their seconds are not taken for the pace of steps.
    assert checked_steps(monkeypatch, steps=far, pace=0.001, compiling=[30]) == [
        1,
        1 + first,
        2 + first,
        2 + 2 * first,
        far,
    ]
