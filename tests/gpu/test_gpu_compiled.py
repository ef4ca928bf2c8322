"""What torch.compile makes for a GPU: how much, how often, and whether it waits. No numbers."""

import pytest
import torch
from support.gpu_runs import GPU, no_waits, start, views
from torch._dynamo.utils import counters

from ffssl.parallel.device import is_out_of_memory, until_out_of_memory
from ffssl.training.compile import COMPILED_METHODS, GRAPHS, StageCompiler, compile_methods
from ffssl.training.memory import memory_advice
from ffssl.training.run_schedule import StepShape
from ffssl.training.step import train_step

METHODS = ["simsiam", "byol", "simclr", "mocov2plus", "dino"]
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def compiled(name, mode, *more):
    run = start(name, *more)
    compile_methods(run.method, COMPILED_METHODS, mode)
    return run


def steps(run, number=3, side=48, epoch=0):
    run.epoch = epoch
    run.method.train()
    for step in range(number):
        train_step(run, views(side), 1000 * epoch + step)


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_have_a_graph_of_loss_and_of_selection_and_never_wait(two_ranks, name):
    run = compiled(name, "default")
    steps(run, 2)
    with no_waits():
        train_step(run, views(), 2)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"], counters


@pytest.mark.parametrize("name", ["simsiam", "dino"])
def test_code_is_made_once_for_each_resolution(name):
    run, made = compiled(name, "default"), []
    for epoch, side in enumerate((48, 32, 48, 32)):
        steps(run, side=side, epoch=epoch)
        made.append(counters["stats"]["unique_graphs"])
    assert made == [2, 3, 3, 3] and not counters["graph_break"]


@pytest.mark.parametrize("name", ["simsiam", "byol", "mocov2plus", "dino"])
def test_cuda_graphs_are_recorded_without_a_skip(made_up, name):
    run = compiled(name, GRAPHS)
    steps(run, 4)
    made_up.reset()
    with no_waits():
        train_step(run, views(), 4)
    assert not counters["inductor"]["cudagraph_skips"], counters["inductor"]
    # Selection, loss, its backward pass.
    assert made_up.counts()["graph launched"] >= 3, made_up.counts()


def test_a_stages_graphs_are_freed_when_it_ends():
    run, (small, large) = start("simsiam"), (StepShape(32, 4), StepShape(48, 4))
    compiler = StageCompiler(run.method, {small: GRAPHS, large: "default"})
    compiler.begin(small)
    steps(run, 3, side=32)
    assert memory_of_graphs() > 0
    compiler.begin(large)
    steps(run, 2, side=48)
    torch.cuda.empty_cache()
    assert memory_of_graphs() == 0


def memory_of_graphs() -> int:
    """In bytes: what lies outside the pool of ordinary tensors."""
    blocks = torch.cuda.memory_snapshot()
    return sum(block["total_size"] for block in blocks if block["segment_pool_id"] != (0, 0))


def test_a_memory_that_does_not_suffice_is_known_and_advice_makes_no_code(made_up):
    run = compiled("simsiam", "default")
    batch = (256, 4, 3, 96, 96)
    images = torch.zeros(batch, dtype=torch.uint8, device=GPU)
    made_up.memory(torch.cuda.memory_reserved() + (64 << 20))
    with pytest.raises(Exception) as raised:
        train_step(run, images, 0)
    assert is_out_of_memory(raised.value)
    with until_out_of_memory():
        raise raised.value
    del raised, images
    graphs = counters["stats"]["unique_graphs"]
    assert "images fit: take --training.batch_size=" in memory_advice(run, [batch])
    assert counters["stats"]["unique_graphs"] == graphs
