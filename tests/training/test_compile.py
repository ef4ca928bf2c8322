"""In which mode a stage is compiled, and what compilation leaves in the log."""

import functools
import os
import time

import pytest
import torch
from torch import nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from ffssl.config import read_options
from ffssl.run_folder.log import read_log
from ffssl.train import train
from ffssl.training import compile as stages
from ffssl.training.compile import GRAPHS, StageCompiler, describe_modes, keep_code, stage_modes
from ffssl.training.run_schedule import StepShape
from ffssl.training.totals import EpochTotals, Meter

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SMALL, LARGE = StepShape(96, 6), StepShape(224, 6)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
    yield
    torch.compiler.reset()


@pytest.fixture
def slow_compiler(monkeypatch):
    """Compiling takes a fifth of a second and changes nothing. Yields what was compiled."""
    compiled = []

    def backend(graph, inputs):
        time.sleep(0.2)
        compiled.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return compiled


# Modes


def test_a_small_step_on_one_gpu_is_recorded_as_graphs():
    limit = 3e10 * 2  # of the weight and the bias
    flops = {SMALL: 0.9 * limit, LARGE: 1.1 * limit}
    network = nn.Linear(1, 1)
    assert stage_modes("auto", flops, network, GPU) == {SMALL: GRAPHS, LARGE: "default"}
    # Each of two parts launches as many kernels for half of the work.
    assert set(stage_modes("auto", flops, network, GPU, parts=2).values()) == {GRAPHS}


def test_several_ranks_and_cpus_record_no_graphs_unless_asked_to(monkeypatch):
    flops, network = {SMALL: 1.0}, nn.Linear(1, 1)
    assert stage_modes("auto", flops, network, CPU) == {SMALL: "off"}
    monkeypatch.setattr(stages, "world_size", lambda: 2)
    assert stage_modes("auto", flops, network, GPU) == {SMALL: "default"}
    assert stage_modes(GRAPHS, flops, network, GPU) == {SMALL: GRAPHS}
    assert stage_modes("off", flops, network, GPU) == {SMALL: "off"}


def test_modes_are_told_on_one_line():
    first, later = StepShape(224, 2), StepShape(128, 6)
    assert describe_modes({SMALL: "off", LARGE: "off"}) == "off"
    modes = {SMALL: GRAPHS, later: GRAPHS, first: "default", LARGE: "default"}
    assert describe_modes(modes) == "reduce-overhead at 96, 128 px, default at 224 px"


# Stages


class Net(nn.Module):
    def loss(self, x):
        return x.sum()

    project = targets = compare = loss


def test_a_stage_has_its_mode_and_frees_the_graphs_of_the_one_before(monkeypatch):
    done = []

    def compile(function, *, mode, dynamic):
        done.append(mode)
        return functools.partial(function)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.compiler, "reset", lambda: done.append("free"))
    network, x = Net(), torch.ones(3)
    middle = StepShape(128, 6)
    compiler = StageCompiler(network, {SMALL: GRAPHS, middle: "default", LARGE: "off"})
    compiler.begin(SMALL)
    compiler.begin(SMALL)
    assert done == [GRAPHS] * 4
    compiler.begin(middle)
    assert done[4:] == ["free", *["default"] * 4]
    compiler.begin(LARGE)
    assert done[9:] == [] and "loss" not in vars(network) and network.loss(x) == 3


def test_a_mode_that_returns_finds_what_it_had_compiled(slow_compiler):
    network = Net()
    for mode in ("default", "off", "default"):
        stages.compile_methods(network, ["loss"], mode)
        assert network.loss(torch.ones(3)) == 3
    assert len(slow_compiler) == 1


def test_code_is_kept_where_the_user_says_or_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    keep_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as torch itself does
    keep_code()
    kept = tmp_path / "ffssl" / "compiled"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(kept) and kept.is_dir()


def test_a_cache_that_cannot_be_made_leaves_torchs_own(monkeypatch, tmp_path):
    (tmp_path / "ffssl").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    keep_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == default_cache_dir()


# The log


def test_compilation_is_counted_by_itself_and_its_energy_not_at_all(slow_compiler):
    # A joule in every hundredth of a second.
    totals, started = EpochTotals(), time.perf_counter()
    meter = Meter(totals, lambda: 100 * time.perf_counter())
    work = torch.compile(lambda x: x + 1)
    with meter.noticing_compilation():
        for _ in range(2):
            work(torch.ones(3))
            meter.end_step()
            time.sleep(0.05)
        meter.charge()
    whole = time.perf_counter() - started
    assert len(slow_compiler) == 1 and totals.compile_seconds >= 0.2
    assert 0.1 <= totals.seconds <= whole - totals.compile_seconds and totals.compile_steps == 1
    assert totals.kwh * 3.6e6 == pytest.approx(100 * totals.seconds, rel=0.01)
    work(torch.ones(4))
    meter.end_step()
    assert len(slow_compiler) == 2 and totals.compile_steps == 1  # the block had ended


def test_a_run_logs_the_seconds_of_compilation_beside_those_of_training(
    betons, tmp_path, slow_compiler
):
    train(
        read_options(
            [
                "--model.backbone=resnet-small",
                "--method.name=simclr",
                "--method.hidden=8",
                "--method.projection=8",
                "--resolution.max=16",
                "--resolution.step=16",
                f"--data.train={betons['train']}",
                f"--run.folder={tmp_path}",
                "--training.epochs=2",
                "--training.batch_size=64",
                "--training.compile=default",
                "--run.tensorboard=false",
                "--run.device=cpu",
            ]
        )
    )
    first, second = read_log(tmp_path)
    assert len(slow_compiler) == 1 and first["compile_seconds"] >= 0.2
    assert second["compile_seconds"] == first["compile_seconds"]  # in all, as the seconds are
    assert 0 < first["seconds"] < second["seconds"]
    # One of an epoch's two steps was not compiled; of 64 images.
    assert first["images_per_second"] == pytest.approx(64 / first["seconds"])
