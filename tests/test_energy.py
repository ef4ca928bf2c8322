import sys
from types import SimpleNamespace

import pytest
import torch

from ffssl.config import read_options
from ffssl.energy import energy_counter
from ffssl.run_log import read_log
from ffssl.step import Run
from ffssl.train import train

CUDA = torch.device("cuda", 1)


class NoCounter(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch):
    """A stand-in for NVML's binding, and for a GPU with a UUID."""

    def total(board):
        assert board == "board of GPU-1234"
        if not binding.counts:
            raise NoCounter
        binding.millijoules += 2500
        return binding.millijoules

    binding = SimpleNamespace(
        counts=True, millijoules=0, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: f"board of {uuid}",
        nvmlDeviceGetTotalEnergyConsumption=total,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", binding)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234" if device == CUDA else None))
    return binding


def test_joules_are_the_boards(nvml):
    joules = energy_counter(CUDA)
    assert joules() - joules() == -2.5


def test_without_a_counter_there_are_none(nvml, monkeypatch):
    nvml.counts = False
    assert energy_counter(CUDA)() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it were not installed
    assert energy_counter(CUDA)() is None
    assert energy_counter(torch.device("cpu"))() is None


def test_a_gpu_whose_energy_nothing_counts_is_told(nvml):
    def note(device):
        return Run(None, None, device, None, None, None, None, None, energy_counter(device)).energy_note

    assert note(CUDA) == note(torch.device("cpu")) == ""
    nvml.counts = False
    assert note(CUDA) == "; no energy counter: kWh left out" and note(torch.device("cpu")) == ""


def test_a_run_logs_the_energy_of_its_epochs(betons, tmp_path, monkeypatch):
    reads = iter(range(0, 10**9, 3_600_000))
    monkeypatch.setattr("ffssl.step.energy_counter", lambda device: lambda: next(reads))
    words = ["--model.backbone=resnet-small", "--method.name=simclr", "--method.hidden=8", "--method.projection=8", "--resolution.max=16", "--resolution.step=16"]
    options = read_options([*words, f"--data.train={betons['train']}", f"--run.folder={tmp_path}", "--training.epochs=2", "--training.batch_size=64", "--run.tensorboard=false"])
    train(options)
    assert [row["kwh"] for row in read_log(tmp_path)] == [2.0, 4.0]  # one between two readings, at the start of an epoch and at its two steps
