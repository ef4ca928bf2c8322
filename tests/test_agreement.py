"""`ffssl benchmark agreement`, on a CPU that stands for a GPU."""

import pytest
import torch
from support.printed_tables import rows_of

from ffssl.benchmark import agreement
from ffssl.errors import UserError
from ffssl.methods import METHODS
from ffssl.training.run_schedule import RunSchedule


def test_a_cpu_agrees_with_itself_in_float32_and_half_precision_is_told_beside_it(capsys):
    agreement.main(["--methods", "simclr"])
    name, loss, half_loss, pairs, half_pairs, wrong = rows_of(capsys.readouterr().out)[-1]
    assert (name, float(loss), pairs, wrong) == ("simclr", 0, "100%", "")
    assert float(half_loss) > 0 and 0 < int(half_pairs[:-1]) < 100


@pytest.mark.parametrize("loss, pair", [(0.02, 0), (0, 1)])
def test_a_device_that_computes_something_else_is_named_with_the_method(
    monkeypatch, capsys, loss, pair
):
    answers = iter(
        [
            (torch.ones(4), torch.zeros(4, 16, 2)),
            (torch.full((4,), 1 + loss), torch.full((4, 16, 2), pair)),
            (torch.ones(4), torch.zeros(4, 16, 2)),
        ]
    )
    monkeypatch.setattr(agreement, "first_steps", lambda *_: next(answers))
    with pytest.raises(UserError, match="the cpu does not compute what the CPU does, for byol"):
        agreement.main(["--methods", "byol"])
    assert "WRONG" in capsys.readouterr().out


def test_the_machine_alone_is_described_without_a_step(monkeypatch, capsys):
    monkeypatch.setattr(agreement, "first_steps", None)
    agreement.main(["--describe"])
    assert "torch" in capsys.readouterr().out


@pytest.mark.parametrize("name", METHODS)
def test_the_pairs_compared_are_chosen_from_the_first_step_on_with_every_method(name):
    schedule = RunSchedule(agreement.options_of(name, "off"), steps_per_epoch=1)
    assert schedule.selection(0).select == "hard"
