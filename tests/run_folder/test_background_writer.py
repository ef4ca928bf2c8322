import subprocess
import sys
import threading
import time
from collections import OrderedDict

import pytest
import torch

from ffssl.errors import UserError
from ffssl.run_folder import checkpoint
from ffssl.run_folder.background_writer import Saver, copy_to_host

CPU = torch.device("cpu")


def test_what_is_saved_is_the_state_at_the_call_whatever_changes_later(tmp_path, monkeypatch):
    may_write, save = threading.Event(), checkpoint.save

    def slow_save(*arguments, **settings):
        assert may_write.wait(600)
        save(*arguments, **settings)

    monkeypatch.setattr(checkpoint, "save", slow_save)
    saver, weights, spent = (
        Saver(tmp_path, CPU, keep=2, minutes=1e-9),
        torch.zeros(10),
        {"seconds": 1.0},
    )
    for step in range(2):
        may_write.clear()
        saver.save({"step": step, "weights": weights, "spent": spent})
        weights += 1
        spent["seconds"] += 1
        assert not saver.due()
        may_write.set()
        saver.wait()
        assert saver.due()
        loaded = checkpoint.load(tmp_path)
        assert (
            loaded["step"] == step
            and loaded["spent"] == {"seconds": 1.0 + step}
            and (loaded["weights"] == step).all()
        )
    saver.close()


@pytest.mark.parametrize("call", ["due", "save", "wait", "close"])
def test_an_error_in_the_thread_is_raised_by_the_next_call_and_no_file_is_lost(tmp_path, call):
    saver = Saver(tmp_path, CPU, keep=2, minutes=1)
    saver.save({"step": 1})
    saver.wait()
    (tmp_path / f".{checkpoint.NAME}.partial").symlink_to("/dev/full")
    saver.save({"step": 2})
    while call == "due" and not saver._writing.done():
        time.sleep(0.001)
    with pytest.raises(
        UserError,
        match=(
            "checkpoint.pt: the checkpoint can't be written: No space left on device; the one "
            "before is untouched"
        ),
    ):
        getattr(saver, call)(*[{"step": 3}] * (call == "save"))
    saver.close()
    assert checkpoint.load(tmp_path)["step"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, value, dtype):
    saver, weights = (
        Saver(tmp_path, CPU, keep=2, minutes=1),
        {"steps": torch.tensor(3), "projector.weight": torch.ones(3, dtype=dtype)},
    )
    saver.save({"epoch": 4, "method": weights})
    weights["projector.weight"][1] = value
    saver.save({"epoch": 5, "method": weights})
    with pytest.raises(
        FloatingPointError,
        match=(
            "projector.weight is no longer finite, 5 epochs done; the last checkpoint in "
            f"{tmp_path} is"
        ),
    ):
        saver.wait()
    saver.close()
    assert checkpoint.load(tmp_path)["epoch"] == 4


def test_a_checkpoint_is_due_when_the_last_is_old_enough(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    every, never = (Saver(tmp_path, CPU, keep=1, minutes=minutes) for minutes in (2, 0))
    for seconds, due in ((119.0, False), (120.0, True), (500.0, True)):
        now = seconds
        assert every.due() == due and not never.due()
    every.save({})
    every.wait()
    for seconds, due in ((619.0, False), (620.0, True)):
        now = seconds
        assert every.due() == due
    for saver in (every, never):
        saver.close()


def test_a_copy_has_the_same_layout_and_types_and_takes_the_place_of_one_before():
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last
    )
    state = {
        "model": module.state_dict(),
        "list": [torch.arange(3), 2, "a"],
        "pair": (torch.ones(1), None),
    }
    first = copy_to_host(state)
    assert (
        type(first["model"]) is OrderedDict
        and first["model"]._metadata == state["model"]._metadata
        and type(first["pair"]) is tuple
    )
    assert first["model"]["0.weight"].stride() == module[0].weight.stride()
    place = first["model"]["0.weight"].data_ptr()
    with torch.no_grad():
        module[0].weight += 1
    state["list"] = [torch.arange(5), 3]
    second = copy_to_host(state, first)
    assert second["model"]["0.weight"].data_ptr() == place != module[0].weight.data_ptr()
    assert all(
        torch.equal(second["model"][name], value) for name, value in module.state_dict().items()
    )
    assert second["list"][0].tolist() == [0, 1, 2, 3, 4] and second["list"][1] == 3


@pytest.mark.gpu
@pytest.mark.values
def test_a_copy_from_the_gpu_is_of_the_state_before_the_steps_that_follow(tmp_path):
    device = torch.device("cuda")
    weights = torch.zeros(1 << 26, device=device)
    saver = Saver(tmp_path, device, keep=1, minutes=0)
    for step in range(3):
        saver.save({"weights": weights})
        weights += 1
        saver.wait()
        assert (checkpoint.load(tmp_path)["weights"] == step).all()
    saver.close()


def test_the_thread_starts_no_threads_of_openmp(tmp_path):
    """With more OpenMP threads than cores those of the training no longer spin between operations,
    and its steps take longer.
    """
    program = (
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from ffssl.run_folder.background_writer import Saver\n"
        "torch.set_num_threads(2)\n"
        "weights = torch.randn(1 << 20)\n"
        "weights.isfinite().all()\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "saver = Saver(Path(sys.argv[1]), torch.device('cpu'), keep=1, minutes=1)\n"
        "saver.save({'method': {'weight': weights, 'step': torch.tensor(3)}})\n"
        "saver.wait()\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "1\n"
