"""The trial of bf16, and what a run says of it."""

import pytest
import torch
from support.options import NO_FILES, SMALL
from torch import nn

from ffssl.backbones import build_backbone
from ffssl.config import read_options
from ffssl.errors import UserError
from ffssl.prepare import prepared
from ffssl.training.precision import advise_bf16, bf16_speed_up

CPU = torch.device("cpu")
LINE = (
    "bf16 was 1.6x faster than float32 in a short trial of the backbone; "
    "--training.amp=bf16, in a new run, takes it\n"
)


class Timed(nn.Module):
    """A backbone that moves a stand-in clock by given seconds in each precision, pass by pass."""

    def __init__(self, full, half):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen = {False: [], True: []}
        self.lasts = {False: iter(full), True: iter(half)}
        self.now = 0.0

    def __deepcopy__(self, memo):
        return self

    def forward(self, images):
        half = torch.is_autocast_enabled("cpu")
        assert not half or torch.get_autocast_dtype("cpu") == torch.bfloat16
        self.seen[half].append(images.shape)
        self.now += next(self.lasts[half])
        return self.weight * images.mean((2, 3))

    def speed_up(self, side):
        return bf16_speed_up(self, side, clock=lambda: self.now)


def test_the_median_counts_and_neither_the_first_round_nor_a_pause_does():
    full = [5.0, 0.03, 0.03, 0.03, 9.0, 0.03, 0.03, 0.03, 0.03, 0.03]
    half = [0.01, 0.02, 8.0, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02]
    backbone = Timed([t / 1000 for t in full], [t / 1000 for t in half])
    assert backbone.speed_up(48) == pytest.approx(1.5)
    assert len(backbone.seen[True]) == len(backbone.seen[False]) == 10


@pytest.mark.parametrize("seconds, passes", [(3.0, 2), (0.04, 7)])
def test_a_trial_of_slow_passes_ends_early(seconds, passes):
    backbone = Timed([seconds] * 10, [seconds * 0.8] * 10)
    assert backbone.speed_up(48) == pytest.approx(1.25)
    assert len(backbone.seen[True]) == len(backbone.seen[False]) == passes


@pytest.mark.parametrize("side, images", [(16, 16), (48, 16), (96, 4), (224, 2), (512, 2)])
def test_the_larger_the_side_the_fewer_images_are_tried(side, images):
    backbone = Timed([1.0] * 2, [1.0] * 2)
    backbone.speed_up(side)
    assert set(backbone.seen[True] + backbone.seen[False]) == {(images, 3, side, side)}


def test_a_trial_leaves_no_trace():
    backbone = nn.Sequential(build_backbone("resnet-small"), nn.Dropout(0.5)).eval()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    random_state = torch.get_rng_state()
    assert 0 < bf16_speed_up(backbone, 16) < float("inf")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert all(p.grad is None for p in backbone.parameters()) and not backbone.training


@pytest.fixture
def cpu(monkeypatch):
    """Give the CPU bf16, with a trial of that speed-up, or none."""

    def is_made(speed_up):
        monkeypatch.setattr("ffssl.training.precision.has_bf16", lambda _: speed_up is not None)
        monkeypatch.setattr("ffssl.training.precision.bf16_speed_up", lambda *_: speed_up)

    return is_made


def test_advice_is_given_where_bf16_pays_and_nothing_is_chosen_yet(cpu):
    for speed_up in (None, 0.4, 1.19):
        cpu(speed_up)
        assert advise_bf16("auto", CPU, nn.Identity(), 32) == ""
    cpu(1.63)
    assert f"{advise_bf16('auto', CPU, nn.Identity(), 32)}\n" == LINE
    for amp, device in (("off", CPU), ("bf16", CPU), ("auto", torch.device("cuda"))):
        assert advise_bf16(amp, device, nn.Identity(), 32) == ""


def test_a_new_run_says_that_bf16_is_faster_and_trains_in_float32(cpu, betons, tmp_path, capsys):
    cpu(1.63)
    folder = [f"--data.train={betons['train']}", f"--run.folder={tmp_path}"]
    options = read_options([*SMALL, *folder, "--training.amp=auto"])
    for begun in (False, True):
        with prepared(options) as prep:
            prep.record.save(prep.run)
            assert not prep.run.amp._enabled
        said = capsys.readouterr().out
        assert "mixed precision off" in said and (LINE in said) == (not begun)


def test_bf16_is_refused_before_any_file_is_read_where_the_cpu_has_none(cpu):
    cpu(None)
    options = read_options([*SMALL, *NO_FILES, "--training.amp=bf16"])
    with (
        pytest.raises(UserError, match="^--training.amp: this CPU has no bf16; use off$"),
        prepared(options),
    ):
        pass
