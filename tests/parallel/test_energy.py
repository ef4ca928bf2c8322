import sys
from types import SimpleNamespace

import pytest
import torch
from support.options import SMALL

from ffssl.config import read_options
from ffssl.parallel.energy import energy_counter
from ffssl.run_folder.log import read_log
from ffssl.train import train
from ffssl.training.run import Run
from ffssl.training.totals import EpochTotals, Meter

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
        counts=True,
        millijoules=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: f"board of {uuid}",
        nvmlDeviceGetTotalEnergyConsumption=total,
    )
    monkeypatch.setitem(sys.modules, "pynvml", binding)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(uuid="1234" if device == CUDA else None),
    )
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
        return Run(
            None, None, device, None, None, None, None, None, energy_counter(device)
        ).energy_note

    assert note(CUDA) == note(torch.device("cpu")) == ""
    nvml.counts = False
    assert note(CUDA) == "; no energy counter: kWh left out" and note(torch.device("cpu")) == ""


def train_with_counter(betons, folder, monkeypatch, joules):
    """Two epochs of two steps each. joules: called for each reading."""
    monkeypatch.setattr("ffssl.training.run.energy_counter", lambda device: joules)
    options = read_options(
        [
            *SMALL,
            "--resolution.max=16",
            f"--data.train={betons['train']}",
            f"--run.folder={folder}",
            "--training.epochs=2",
            "--training.batch_size=64",
        ]
    )
    train(options)


def test_a_run_logs_the_energy_of_its_epochs(betons, tmp_path, monkeypatch):
    reads = iter(range(0, 10**9, 3_600_000))
    train_with_counter(betons, tmp_path, monkeypatch, lambda: next(reads))
    # One between two readings, at the start of an epoch and at its two steps.
    assert [row["kwh"] for row in read_log(tmp_path)] == [2.0, 4.0]


@pytest.mark.parametrize(
    "counted, logged", [("111000", [2.0, None]), ("000111", [None, None]), ("110111", [None, None])]
)
def test_the_energy_of_some_epochs_does_not_pass_for_that_of_the_run(
    betons, tmp_path, monkeypatch, counted, logged
):
    # Three an epoch.
    reads = iter(
        [3_600_000 * i if is_counted == "1" else None for i, is_counted in enumerate(counted)]
    )
    train_with_counter(betons, tmp_path, monkeypatch, lambda: next(reads))
    assert [row.get("kwh") for row in read_log(tmp_path)] == logged


def test_nor_does_that_of_the_rest_of_an_epoch():
    totals = EpochTotals()
    # As the epoch is continued.
    for counter, kwh in (
        (iter([0, 3_600_000]), 1.0),
        (iter([None, None]), None),
        (iter([0, 3_600_000]), None),
    ):
        Meter(totals, lambda: next(counter)).charge()
        assert totals.kwh == kwh
