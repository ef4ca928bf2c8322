import contextlib
import copy
import resource
import sys

import numpy as np
import pytest
import torch
from support.options import HARD, NO_FILES, SMALL, of_method
from torchvision.transforms import functional as V

from ffssl import hard_augment
from ffssl.backbones import SmallResNet
from ffssl.config import read_options
from ffssl.data.convert.conversion import ConvertOptions, convert
from ffssl.data.convert.sources.embedded import Embedded
from ffssl.data.loader import ViewLoader
from ffssl.data.normalise import MEAN, STD, to_input
from ffssl.errors import UserError
from ffssl.methods import METHODS
from ffssl.methods.base import Method, Progress
from ffssl.parallel.device import (
    describe_precision,
    is_out_of_memory,
    mixed_precision,
    precision,
    until_out_of_memory,
)
from ffssl.training.build import build
from ffssl.training.compile import COMPILED_METHODS, compile_methods
from ffssl.training.gauges import hardness
from ffssl.training.memory import memory_advice
from ffssl.training.run import start_run
from ffssl.training.run_schedule import RunSchedule
from ffssl.training.step import draws_seed, train_step
from ffssl.training.transfer import to_device

CPU = torch.device("cpu")


def options_of(name, *more):
    return read_options(
        [
            *NO_FILES,
            *SMALL,
            *of_method(name),
            "--training.epochs=4",
            "--training.learning_rate=0.05",
            *more,
        ]
    )


@pytest.fixture(autouse=True)
def tiny_backbone(monkeypatch):
    monkeypatch.setattr(
        "ffssl.training.build.build_backbone", lambda *_, **__: SmallResNet((8, 16))
    )


def start(options, seed=0, device=CPU):
    torch.manual_seed(seed)
    return start_run(
        options,
        build(options, device),
        RunSchedule(options, steps_per_epoch=5),
        CPU if device.type == "meta" else device,
    )


def batch(seed=0, images=16, views=2, side=32):
    return torch.randint(
        0,
        256,
        (images, views, 3, side, side),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_input_is_normalised_as_by_torchvision_and_channels_last(dtype):
    views = batch()[:, 0]
    images = to_input(views, dtype)
    assert images.dtype == dtype and images.is_contiguous(memory_format=torch.channels_last)
    exact = V.normalize(views.double() / 255, MEAN, STD)
    torch.testing.assert_close(
        images.double(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_step_reads_no_value_of_a_tensor(name):
    """A tensor on the meta device has none: whatever would wait for the GPU fails there."""
    run = start(options_of(name, *HARD, "--training.accumulate=2"), device=torch.device("meta"))
    views = batch(views=3).to("meta")
    for step in range(2):
        run.epoch, result = step, train_step(run, views, step)
    assert result.loss.shape == result.embedding_std.shape == ()


@pytest.mark.parametrize("name", METHODS)
def test_a_step_measures_hardness_before_its_loss_changes_the_method(name):
    """MoCo's loss puts the keys of the chosen views into the queue."""
    run, step = start(options_of(name, *HARD)), 3 * 5 + 2
    run.epoch = 3
    method, views = copy.deepcopy(run.method), batch(views=3)
    method.before_step(Progress(step, run.schedule.total_steps, run.epoch))
    selection = run.schedule.selection(3)
    seed = draws_seed(run.options.run.seed, "pairs", step, 0)
    first, second = hard_augment.choose_views(method, views, selection, seed=seed)
    expected = hardness(method, views, (first, second), selection, seed=seed)
    result = train_step(run, views, step)
    torch.testing.assert_close(result.gauges[:2], torch.stack(expected))


LOCAL = ["--augment.local_views=3", "--augment.local_share=0.5"]


def two_sizes(views=2, images=16):
    return batch(images=images, views=views), batch(seed=1, images=images, views=3, side=16)


@pytest.mark.parametrize("name", ["simclr", "dino"])
def test_a_step_with_local_views_is_the_methods_loss_of_both_sizes(name):
    run = start(options_of(name, *LOCAL, *HARD))
    run.epoch = 3
    method, (views, local) = copy.deepcopy(run.method), two_sizes(views=3)
    method.before_step(Progress(0, run.schedule.total_steps, run.epoch))
    chosen = hard_augment.choose_views(method, views, run.schedule.selection(3), seed=0)
    images = to_input(local.flatten(0, 1)).unflatten(0, (16, 3))
    expected, _ = method.loss(*chosen, local=images)
    torch.testing.assert_close(train_step(run, (views, local), 0).loss, expected.detach())


def test_parts_of_a_batch_have_their_local_views():
    run = start(options_of("simclr", *LOCAL, "--training.accumulate=2"))
    method, views = copy.deepcopy(run.method), two_sizes()
    losses = []
    for half in (slice(8), slice(8, 16)):
        (first, second), local = views[0][half].unbind(1), views[1][half]
        images = to_input(local.flatten(0, 1)).unflatten(0, (8, 3))
        losses.append(method.loss(to_input(first), to_input(second), local=images)[0])
    torch.testing.assert_close(train_step(run, views, 0).loss, sum(losses).detach() / 2)


def test_a_step_with_all_that_dino_has_reads_no_value_of_a_tensor():
    more = ["--training.clip_gradient=3", "--training.weight_decay_end=0.4"]
    meta = torch.device("meta")
    run = start(options_of("dino", *LOCAL, *HARD, *more), device=meta)
    views = tuple(part.to("meta") for part in two_sizes(views=3))
    for step in range(2):
        run.epoch, result = step, train_step(run, views, step)
    assert result.loss.shape == ()


def test_weight_decay_and_clipped_gradients_reach_the_optimiser():
    more = ["--training.weight_decay=0.04", "--training.weight_decay_end=0.4"]
    run = start(options_of("dino", *more, "--training.clip_gradient=0.001"))
    decays = []
    for step in range(20):
        train_step(run, batch(), step)
        decays.append([group["weight_decay"] for group in run.optimizer.param_groups])
        norms = [p.grad.norm() for p in run.method.parameters() if p.grad is not None]
        assert max(norms) < 0.001001 and sum(norm > 0.00099 for norm in norms) > 5
    expected = [0.4 + (0.04 - 0.4) * (1 + np.cos(np.pi * step / 20)) / 2 for step in range(20)]
    np.testing.assert_allclose([decay for decay, _ in decays], expected)
    assert {of_vectors for _, of_vectors in decays} == {0}  # biases and BatchNorm


@pytest.mark.gpu
def test_batches_copied_ahead_arrive_whole():
    batches = [batch(seed=i).pin_memory() for i in range(10)]
    on_device = to_device((one for one in batches), torch.device("cuda"))
    for i, views in enumerate(on_device):
        torch.cuda._sleep(10_000_000)  # the copy of the next batch must not overtake this one's use
        assert torch.equal(views.clone().cpu(), batch(seed=i))


@pytest.mark.parametrize("name", METHODS)
def test_views_pass_one_after_the_other_or_jointly(name):
    """What BatchNorm makes of it: in a joint batch the running mean moves once, to the mean of both
    views; else twice.
    """
    means = {}
    for joint in (False, True):
        run = start(options_of(name, f"--training.joint_views={joint}".lower()))
        norm = run.method.backbone.stem[1]
        images = [
            view.contiguous()
            for view in to_input(batch().flatten(0, 1)).unflatten(0, (16, 2)).unbind(1)
        ]
        with torch.no_grad():
            each = [run.method.backbone.stem[0](view).mean((0, 2, 3)) for view in images]
        run.method(*images)
        means[joint] = norm.running_mean
        expected = 0.1 * (each[0] + each[1]) / 2 if joint else 0.9 * 0.1 * each[0] + 0.1 * each[1]
        torch.testing.assert_close(norm.running_mean, expected, rtol=1e-4, atol=1e-6)
    # As their authors have it.
    assert build(options_of(name), CPU).joint_views == (name in ("simclr", "dino"))


def test_gradients_of_parts_add_up_to_those_of_their_mean():
    options = options_of("vicreg", "--training.accumulate=2")
    run, views = start(options), batch()
    method = copy.deepcopy(run.method)
    losses = [
        method(*hard_augment.choose_views(method, part))[0] for part in (views[:8], views[8:])
    ]
    (sum(losses) / 2).backward()
    loss = train_step(run, views, 0).loss
    assert loss.item() == pytest.approx((sum(losses) / 2).item(), rel=1e-6)
    for ours, theirs in zip(run.method.parameters(), method.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_each_part_of_each_step_of_each_run_draws_pairs_of_its_own(monkeypatch):
    seeds, choose_views = [], hard_augment.choose_views
    monkeypatch.setattr(
        hard_augment, "choose_views", lambda *args: seeds.append(args[-1]) or choose_views(*args)
    )
    for seed in (7, 8, 7):
        run = start(
            options_of(
                "vicreg",
                "--augment.views=3",
                "--hard_augment.select=random",
                "--training.accumulate=4",
                f"--run.seed={seed}",
            )
        )
        for step in range(3):
            train_step(run, batch(views=3), step)
    assert len({*seeds[:24]}) == 24 and seeds[24:] == seeds[:12]


@pytest.mark.parametrize("parts", [3, 16])
def test_parts_that_a_batch_does_not_have_are_refused(parts):
    with pytest.raises(
        UserError,
        match=f"--training.accumulate: {parts} equal parts of 2 images or more can't be made",
    ):
        options_of("simsiam", f"--training.accumulate={parts}")


def test_what_is_timed_are_the_parts_of_the_step_in_their_order():
    marks = []
    train_step(
        start(options_of("byol", *HARD, "--training.accumulate=2")),
        batch(views=3),
        0,
        mark=marks.append,
    )
    assert marks == ["selection", "forward", "backward"] * 2 + ["optimiser", "teacher"]


# Memory


@pytest.fixture
def memory_for(monkeypatch):
    """Lets a method run out of memory with batches of more than so many images."""

    def limit(images):
        real = Method.forward

        def forward(self, first, *rest):
            if len(first) > images:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(self, first, *rest)

        monkeypatch.setattr(Method, "forward", forward)

    return limit


@pytest.mark.parametrize(
    "images, advice",
    [
        (8, "8 images fit: take --training.batch_size=8, or --training.accumulate=2"),
        (5, "4 images fit: take --training.batch_size=4, or --training.accumulate=4"),
        (1, "not even two images fit"),
    ],
)
def test_what_fits_is_found_by_trying(memory_for, images, advice):
    memory_for(images)
    assert memory_advice(start(options_of("simsiam")), [(16, 2, 3, 32, 32)]).startswith(advice)


def failing(error):
    def backend(graph, inputs):
        raise error

    return torch.compile(lambda x: x + 1, backend=backend)


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 54.00 MiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_a_memory_that_does_not_suffice_is_known_wherever_it_is_noticed(error, expected):
    assert is_out_of_memory(error) == expected
    with pytest.raises(Exception) as raised:
        failing(error)(torch.ones(1))
    assert type(raised.value) is not type(error) and is_out_of_memory(raised.value) == expected
    with (
        contextlib.nullcontext() if expected else pytest.raises(type(raised.value)),
        until_out_of_memory(),
    ):
        raise raised.value


def test_trying_what_fits_compiles_nothing(memory_for):
    memory_for(8)
    run, compiled = start(options_of("simsiam", *HARD)), []
    compile_methods(
        run.method,
        COMPILED_METHODS,
        "default",
        backend=lambda graph, inputs: compiled.append(graph) or graph,
    )
    assert memory_advice(run, [(16, 3, 3, 32, 32)]).startswith("8 images fit") and compiled == []
    train_step(run, batch(views=3)[:8], 0)
    assert len(compiled) == 2
    torch.compiler.reset()


# Mixed precision


def test_convolutions_are_told_to_try_cudnns_algorithms(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    run = start(options_of("simsiam"))
    # torch tells every convolution, on a CPU too: its tenth argument.
    with torch.profiler.profile(record_shapes=True) as profiler:
        train_step(run, batch(), 0)
    told = [e.concrete_inputs[9] for e in profiler.events() if e.name == "aten::_convolution"]
    assert len(told) > 4 and all(told)


@pytest.fixture
def gpus(monkeypatch):
    """An older GPU, which emulates bf16 and is the current one, and one that has it."""
    old, new = torch.device("cuda:0"), torch.device("cuda:1")
    current = [old]

    @contextlib.contextmanager
    def made_current(gpu):
        current.append(gpu)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", made_current)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or current[-1] == new,
    )
    return old, new


def test_precision_falls_back_where_a_gpu_has_no_bf16(gpus):
    for gpu, expected in zip(gpus, ("fp16", "bf16")):
        assert precision("auto", gpu) == expected
        assert describe_precision("auto", gpu).endswith("since this GPU has no bf16") == (
            expected == "fp16"
        )
    assert precision("auto", CPU) == "off" and precision("bf16", CPU) == "bf16"


def test_a_precision_that_a_device_does_not_have_is_refused(gpus):
    for amp, device, message in (
        ("bf16", gpus[0], "--amp: cuda:0 has no bf16; use fp16 or off"),
        ("fp16", CPU, "--amp: fp16 needs a GPU"),
    ):
        with pytest.raises(UserError, match=message):
            mixed_precision(amp, device, "--amp")


def test_the_scale_of_fp16_is_checkpointed():
    run = start(options_of("simsiam"))
    run.scaler = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=2)
    for step in range(3):
        train_step(run, batch(), step)
    assert run.scaler.get_scale() == 256.0
    other = start(options_of("simsiam"))
    other.scaler = torch.amp.GradScaler("cpu")
    other.restore(copy.deepcopy(run.state()))
    assert other.scaler.state_dict() == run.scaler.state_dict()


def test_a_state_goes_on_where_the_precision_or_the_optimiser_is_anothers():
    run, other = start(options_of("simsiam")), start(options_of("simsiam"))
    other.scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    train_step(run, batch(), 0)
    state = copy.deepcopy(run.state())
    state["optimizer"]["param_groups"][0]["fused"] = False
    other.restore(state)
    assert other.scaler.get_scale() == 128.0
    assert all(group["fused"] for group in other.optimizer.param_groups)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc alone is asked for it")
def test_the_next_step_takes_freed_memory_without_the_system_clearing_it():
    start(options_of("simsiam"))
    for _ in range(6):  # the first of which find no place for it
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        taken = [torch.ones(1 << 24) for _ in range(2)]  # 64 MB each
        del taken
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000  # of 32768 pages


@pytest.mark.parametrize("name", METHODS)
def test_after_a_selection_pass_in_mixed_precision_every_weight_has_a_gradient(name):
    run = start(options_of(name, *HARD, "--training.amp=bf16"))
    run.epoch = 2  # in which DINO's last layer is trained
    train_step(run, batch(views=3), 10)
    assert [
        key for key, p in run.method.named_parameters() if p.requires_grad and p.grad is None
    ] == []


def losses(run, batches):
    return np.array([train_step(run, views, step)[0].item() for step, views in enumerate(batches)])


@pytest.fixture(scope="module")
def drawn_batches(tmp_path_factory):
    """Batches of two views of drawn images."""
    path = tmp_path_factory.mktemp("drawn") / "train.beton"
    convert(Embedded("train", 160), path, ConvertOptions(progress=False))
    with ViewLoader(path, batch_size=32, views=2, resolution=32) as loader:
        batches = []
        for epoch in range(5):
            loader.set_epoch(epoch)
            batches += [views.clone() for views, _, _ in loader]
    return batches


@pytest.mark.parametrize("name", ["simsiam", "simclr"])
def test_mixed_precision_learns_as_float32_does(name, drawn_batches):
    """Its curve differs by less from float32's than float32's does with other initial weights."""
    options = {
        amp: options_of(
            name,
            "--training.batch_size=32",
            "--training.learning_rate=0.01",
            f"--training.amp={amp}",
        )
        for amp in ("off", "bf16")
    }
    full, other, half = (
        losses(start(options[amp], seed), drawn_batches)
        for amp, seed in (("off", 0), ("off", 1), ("bf16", 0))
    )
    assert full[:5].mean() - full[-5:].mean() > 0.01
    assert 0 < np.abs(half - full).mean() < np.abs(other - full).mean()


# torch.compile


@pytest.mark.parametrize("name", METHODS)
def test_code_is_compiled_once_for_each_resolution(name):
    """Also with a teacher's temperature, a queue, a centre and a frozen layer that change as
    training goes on.
    """
    more = (
        [
            "--method.teacher_temperature=0.07",
            "--method.teacher_temperature_epochs=3",
            "--method.frozen_epochs=0",
        ]
        if name == "dino"
        else []
    )
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    torch.compiler.reset()
    run = start(options_of(name, *HARD, *more))
    compile_methods(run.method, COMPILED_METHODS, "default", backend=backend)
    counts = []
    for epoch in range(4):
        run.epoch = epoch
        run.method.train()
        for i, side in enumerate((32, 16, 48)):
            train_step(run, batch(views=3, side=side), 5 * epoch + i)
        counts.append(len(compiled))
    assert counts == [1 + 3] * 4  # the selection at one resolution, the loss at three
    torch.compiler.reset()


@pytest.mark.parametrize(
    "name",
    [
        "simclr",
        *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "simclr"),
    ],
)
def test_compiled_equals_eager(name, drawn_batches):
    curves = []
    for mode in ("off", "default"):
        # At larger learning rates rounding errors grow a hundredfold in ten steps.
        run = start(options_of(name, "--training.batch_size=32", "--training.learning_rate=0.0001"))
        compile_methods(run.method, COMPILED_METHODS, mode)
        curves.append(losses(run, drawn_batches[:10]))
    np.testing.assert_allclose(*curves, rtol=1e-3)
    assert np.ptp(curves[0]) > 0.01
    torch.compiler.reset()
