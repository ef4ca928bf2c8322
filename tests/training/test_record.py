"""What is printed of a run."""

from types import SimpleNamespace

import pytest
from support.options import NETWORK, NO_FILES, SMALL, of_method

from ffssl.config import read_options
from ffssl.training.build import build
from ffssl.training.record import upside_down

ROW = {"epoch": 3, "hardness": -0.25}


@pytest.mark.parametrize(
    "name, option, advice",
    [
        ("simclr", [], "--hard_augment.loss=method"),  # whose default is the cosine
        ("mocov2plus", [], "--hard_augment.loss=method"),
        ("simsiam", ["--hard_augment.loss=cosine"], "--hard_augment.loss=method"),
        ("simsiam", [], "--hard_augment.share_max below 1"),
        ("barlow_twins", [], "--hard_augment.share_max below 1"),  # it has no loss of an image
    ],
)
def test_the_warning_of_easy_pairs_advises_what_the_method_can_do(name, option, advice):
    hard = ["--augment.views=3", "--hard_augment.select=hard", *option]
    options = read_options([*NO_FILES, *SMALL, *NETWORK, *of_method(name), *hard])
    run = SimpleNamespace(options=options, method=build(options, "cpu"))
    line = upside_down(ROW, run)
    assert advice in line and "0.25 below that of random pairs" in line
