"""Two processes that share a batch against one that has it whole."""

import contextlib
import copy
import socket

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn

from ffssl.errors import UserError
from ffssl.methods import build_method
from ffssl.methods.barlow_twins import redundancy_reduction
from ffssl.methods.simclr import nt_xent, nt_xent_of_pairs
from ffssl.methods.vicreg import vicreg
from ffssl.parallel import batch_norm
from ffssl.parallel.ranks import (
    gather,
    gather_with_gradient,
    local_device,
    mean_over_ranks,
    process_group,
    rank,
    ranks_here,
    world_size,
)
from ffssl.training.classifier import OnlineClassifier
from ffssl.training.epoch import EpochTotals

RANKS, IMAGES, WIDTH = 2, 6, 8


class Features(nn.Identity):
    features = WIDTH


def on_projections(name):
    """A method whose network gives back what it is given, so that BatchNorm plays no role; the
    teacher sees it times 2 plus 1.
    """
    torch.manual_seed(0)
    options = {"mocov2plus": {"queue": 24}, "dino": {"prototypes": WIDTH}}[name]
    method = build_method(name, Features(), {"projection": WIDTH, "hidden": 4, **options})
    method.projector = nn.Identity()
    method.teacher.forward = lambda z: 2 * z.detach() + 1
    method.predict = lambda z: z
    return method


def moco(z1, z2):
    method = on_projections("mocov2plus")
    # The second against the first's keys.
    losses = [method.loss(z1 + step, z2)[0] for step in range(2)]
    return losses[0] + losses[1], method.queue


def dino(z1, z2):
    method = on_projections("dino")
    # The second with the first's centre.
    losses = [method.loss(z1, z2 + step)[0] for step in range(2)]
    return losses[0] + losses[1], method.centre


def normalised(z1, z2):
    """By BatchNorm layers of every form, synchronised where there are ranks, in training and then
    by what they have tracked.
    """
    torch.manual_seed(0)
    norms = nn.Sequential(
        nn.BatchNorm1d(WIDTH),
        nn.Unflatten(1, (2, 2, 2)),
        nn.BatchNorm2d(2, affine=False),
        nn.Flatten(),
        nn.BatchNorm1d(WIDTH),
    )
    with torch.no_grad():
        for p in norms.parameters():
            p.normal_()
    if world_size() > 1:
        batch_norm.synchronise(norms)
    loss = (norms(3 + z1) * z2 + norms(z2)).sin().square().mean()
    norms.eval()
    loss = loss + norms(z1).square().mean()
    assert norms(z1.bfloat16()).dtype == torch.bfloat16
    return loss, torch.cat([buffer.flatten() for buffer in norms.buffers()])


# torch's passes over BatchNorm's input on GPUs, written out: what each gives of what.


def per_channel(value, x):
    return value.view(-1, *[1] * (x.ndim - 2))


def stats(x, eps):
    variance, mean = torch.var_mean(x.float(), [0, *range(2, x.ndim)], correction=0)
    return mean, (variance + eps).rsqrt()


def gather_stats(typed, means, inverses, running_mean, running_var, momentum, eps, counts):
    assert counts.dtype == (typed if running_mean is None else running_mean).dtype
    shares = (counts / counts.sum())[:, None]
    mean = (shares * means).sum(0)
    variance = (shares * (inverses**-2 - eps + (means - mean) ** 2)).sum(0)
    if running_mean is not None:
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * counts.sum() / (counts.sum() - 1), momentum)
    return mean, (variance + eps).rsqrt()


def elemt(x, weight, bias, mean, inverse, eps):
    y = (x.float() - per_channel(mean, x)) * per_channel(inverse, x)
    return (y if weight is None else y * per_channel(weight, x) + per_channel(bias, x)).to(x.dtype)


def backward_reduce(gradient, x, mean, inverse, weight, *wanted):
    over = [0, *range(2, x.ndim)]
    plain, product = (
        gradient.float().sum(over),
        (gradient.float() * (x.float() - per_channel(mean, x))).sum(over),
    )
    return plain, product, product * inverse, plain


def backward_elemt(gradient, x, mean, inverse, weight, plain, product, counts):
    scale = inverse if weight is None else inverse * weight
    centred = (x.float() - per_channel(mean, x)) * per_channel(
        inverse**2 * product / counts.sum(), x
    )
    return (
        (gradient.float() - per_channel(plain / counts.sum(), x) - centred) * per_channel(scale, x)
    ).to(x.dtype)


@contextlib.contextmanager
def passes_of_gpus():
    passes = {
        "batch_norm_stats": stats,
        "batch_norm_gather_stats_with_counts": gather_stats,
        "batch_norm_elemt": elemt,
        "batch_norm_backward_reduce": backward_reduce,
        "batch_norm_backward_elemt": backward_elemt,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, function in passes.items():
            patch.setattr(torch, name, function)
        patch.setattr(batch_norm._Normalise, "apply", None)
        patch.setattr(batch_norm, "taken_as_on_gpu", lambda x: True)
        yield


LOSSES = {
    "batch_norm": normalised,
    "batch_norm as on GPUs": normalised,
    "nt_xent": lambda z1, z2: (nt_xent(z1, z2, 0.5), torch.zeros(1)),
    "mocov2plus": moco,
    "dino": dino,
    "barlow_twins": lambda z1, z2: (redundancy_reduction(z1, z2, 0.1), torch.zeros(1)),
    "vicreg": lambda z1, z2: (vicreg(z1, z2, 25, 25, 1), torch.zeros(1)),
}


def projections():
    return torch.randn(2, RANKS * IMAGES, WIDTH, generator=torch.Generator().manual_seed(0))


def pair_views():
    return torch.randn(RANKS * IMAGES, 3, WIDTH, generator=torch.Generator().manual_seed(1))


def loss_and_gradients(name, first, second):
    first, second = first.clone().requires_grad_(), second.clone().requires_grad_()
    with passes_of_gpus() if name == "batch_norm as on GPUs" else contextlib.nullcontext():
        loss, state = LOSSES[name](first, second)
        loss.backward()
    return loss.detach(), state.detach(), torch.stack([first.grad, second.grad])


def classifier_of(mine):
    """The weights of a classifier after steps on some of the images, of which some have no label:
    in the first step all but one.
    """
    backbone = Features()
    classifier = OnlineClassifier(
        backbone,
        torch.arange(3),
        learning_rate=256.0,
        batch_size=RANKS * IMAGES,
        total_steps=4,
        device=torch.device("cpu"),
    )
    generator = torch.Generator().manual_seed(2)
    for step in range(3):
        features = torch.randn(RANKS * IMAGES, WIDTH, generator=generator)
        labels = torch.randint(-1, 3, (RANKS * IMAGES,), generator=generator)
        if step == 0:
            labels[1:] = -1
            labels[0] = 2
        backbone(features[mine])
        classifier.add_gradients(classifier.targets(labels[mine]))
        classifier.step(step)
    return classifier.layer.weight.detach()


def work(this_rank, port, answers):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=this_rank, world_size=RANKS
    )
    mine = slice(this_rank * IMAGES, (this_rank + 1) * IMAGES)
    answer = {name: loss_and_gradients(name, *projections()[:, mine]) for name in LOSSES}
    answer["pairs"] = nt_xent_of_pairs(pair_views()[mine], 0.5)
    answer["classifier"] = classifier_of(mine)
    x = torch.full((2, 3), this_rank + 1.0, requires_grad=True)
    answer["functions"] = (
        rank(),
        world_size(),
        gather(x),
        gather_with_gradient(x).detach(),
        mean_over_ranks(x).detach(),
        gather(x).requires_grad,
    )
    torch.save(answer, answers / f"{this_rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (port, folder), nprocs=RANKS)
    return [torch.load(folder / f"{r}.pt") for r in range(RANKS)]


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_averaged_gradients_are_those_of_the_joint_batch(answers, name):
    loss, state, gradients = loss_and_gradients(name, *projections())
    torch.testing.assert_close(torch.stack([answer[name][0] for answer in answers]).mean(), loss)
    # DistributedDataParallel divides the gradients by the number of ranks.
    torch.testing.assert_close(
        torch.cat([answer[name][2] for answer in answers], dim=1) / RANKS,
        gradients,
        atol=1e-6,
        rtol=1e-4,
    )
    assert gradients.abs().max() > 1e-3
    for answer in answers:  # queue and centre are the same on all ranks
        torch.testing.assert_close(answer[name][1], state)


def test_the_losses_of_pairs_are_those_of_the_joint_batch(answers):
    torch.testing.assert_close(
        torch.cat([answer["pairs"] for answer in answers]), nt_xent_of_pairs(pair_views(), 0.5)
    )


def test_the_linear_classifier_is_the_same_on_all_ranks_and_that_of_the_joint_batch(answers):
    first, second = (answer["classifier"] for answer in answers)
    assert torch.equal(first, second) and first.abs().max() > 1
    torch.testing.assert_close(first, classifier_of(slice(None)), rtol=1e-4, atol=1e-5)


def test_the_functions_join_the_ranks_in_order(answers):
    both = torch.tensor([1.0, 1.0, 2.0, 2.0])[:, None].expand(4, 3)
    for r, answer in enumerate(answers):
        this_rank, size, gathered, with_gradient, mean, requires_grad = answer["functions"]
        assert (this_rank, size, requires_grad) == (r, 2, False)
        assert torch.equal(gathered, both) and torch.equal(with_gradient, both)
        assert torch.equal(mean, torch.full((2, 3), 1.5))


def test_batch_norm_is_replaced_in_place_with_what_it_holds():
    network = nn.ModuleDict(
        {
            "a": nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)),
            "b": nn.BatchNorm2d(4, affine=False),
        }
    ).eval()
    network["a"][1].requires_grad_(False)
    before, state = (
        dict(network.named_parameters()),
        {name: tensor.clone() for name, tensor in network.state_dict().items()},
    )
    batch_norm.synchronise(network)
    assert [type(module) for module in (network["a"][1], network["b"])] == [
        batch_norm.SyncBatchNorm
    ] * 2
    assert not network["a"][1].training
    assert (
        all(parameter is before[name] for name, parameter in network.named_parameters())
        and len(before) == 4
    )
    assert list(network.state_dict()) == list(state) and all(
        torch.equal(network.state_dict()[name], state[name]) for name in state
    )


def test_a_batch_norm_that_does_more_is_not_replaced_by_one_that_does_less():
    class WithActivation(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    with pytest.raises(
        UserError,
        match="its WithActivation can't be synchronised between processes; use one process",
    ):
        batch_norm.synchronise(nn.Sequential(WithActivation(3)))


def test_the_batch_norm_of_timm_keeps_its_activation():
    from timm.layers import BatchNormAct2d  # takes seconds, in each process

    network = nn.Sequential(BatchNormAct2d(3, act_layer=nn.SiLU)).train()
    nn.init.normal_(network[0].weight)
    x, names = torch.randn(4, 3, 5, 5), list(network.state_dict())
    expected = copy.deepcopy(network)(x)
    batch_norm.synchronise(network)
    torch.testing.assert_close(network(x), expected)  # of one process, which has the whole batch
    assert (
        isinstance(network[0], batch_norm.SyncBatchNorm)
        and list(network.state_dict()) == names
        and expected.min() > -0.3
    )


def test_half_precision_is_normalised_by_statistics_of_full_precision():
    norm = batch_norm.SyncBatchNorm(WIDTH)
    # Near 1000 bf16 has steps of 4.
    x = (1000 + torch.arange(4 * WIDTH).view(4, WIDTH) * 8).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        given = x.to(dtype, copy=True).requires_grad_()
        y = norm(given)
        y.square().sum().backward()
        results.append((y, given.grad))
        assert {y.dtype, given.grad.dtype, norm.running_mean.dtype, norm.weight.grad.dtype} == {
            dtype,
            torch.float32,
        }
    assert torch.equal(results[0][0], results[1][0].bfloat16())


@pytest.mark.gpu
@pytest.mark.values
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(64, 32), (8, 32, 9, 9)])
def test_a_gpu_normalises_as_torch_does_and_keeps_the_layout(dtype, affine, shape):
    norm = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(32, affine=affine).cuda()
    network = nn.Sequential(copy.deepcopy(norm))
    batch_norm.synchronise(network)
    x = torch.randn(shape, device="cuda").to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x
    results = []
    for layer in (norm, network):
        given = x.clone().requires_grad_()
        y = layer(given)
        y.sin().sum().backward()
        results.append((y, given.grad, *layer.buffers(), *(p.grad for p in layer.parameters())))
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
        torch.testing.assert_close(
            ours,
            theirs,
            atol=1e-5 if dtype == torch.float32 else 0.02,
            rtol=1e-4 if dtype == torch.float32 else 0.02,
        )


def test_one_process_keeps_what_it_has():
    x = torch.ones(2, 3, requires_grad=True)
    assert (rank(), world_size()) == (0, 1)
    assert torch.equal(gather(x), x) and not gather(x).requires_grad
    assert gather_with_gradient(x) is x and mean_over_ranks(x) is x


def set_launcher(monkeypatch, **variables):
    """As a launcher's environment, with no others of its kind."""
    for name in (
        "WORLD_SIZE",
        "RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "LOCAL_WORLD_SIZE",
        "LOCAL_RANK",
    ):
        value = variables.get(name)
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(
            name, value
        )


COMPLETE = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "variables, message",
    [
        (
            {"WORLD_SIZE": "2"},
            (
                "WORLD_SIZE is 2 in the environment, but not RANK, MASTER_ADDR, MASTER_PORT; "
                "start with torchrun"
            ),
        ),
        (
            COMPLETE | {"RANK": " "},
            "WORLD_SIZE is 2 in the environment, but not RANK; start with torchrun",
        ),
        (
            COMPLETE | {"MASTER_ADDR": None},
            "WORLD_SIZE is 2 in the environment, but not MASTER_ADDR; ",
        ),
        (COMPLETE | {"RANK": "2"}, "RANK is 2 in the environment, but WORLD_SIZE is 2"),
        (
            COMPLETE | {"RANK": "first"},
            "RANK is 'first' in the environment, which must be an integer of 0 or more",
        ),
        (COMPLETE | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http' in the environment"),
        (
            {"WORLD_SIZE": "two"},
            (
                "WORLD_SIZE is 'two' in the environment, which must be an integer of 1 or "
                "more; unset it"
            ),
        ),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0' in the environment"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1' in the environment"),
    ],
)
def test_an_environment_that_names_ranks_in_part_is_refused_before_anything_waits(
    monkeypatch, variables, message
):
    set_launcher(monkeypatch, **variables)
    for joining in (
        lambda: local_device(torch.device("cpu")),
        lambda: process_group(torch.device("cpu")).__enter__(),
    ):
        with pytest.raises(UserError) as refused:
            joining()
        assert str(refused.value).startswith(message)


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "WORLD_SIZE"])
def test_of_machines_and_gpus_too(monkeypatch, name):
    set_launcher(monkeypatch, **COMPLETE | {name: "many"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match=f"{name} is 'many' in the environment"):
        local_device(torch.device("cuda"))


def test_a_gpu_that_the_machine_has_not_is_refused(monkeypatch):
    set_launcher(monkeypatch, **COMPLETE, LOCAL_RANK="4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match="LOCAL_RANK is 4, but this machine has 4 GPUs"):
        local_device(torch.device("cuda"))


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1", "RANK": "", "LOCAL_WORLD_SIZE": ""},
    ],
)
def test_one_process_needs_no_launcher(monkeypatch, variables):
    set_launcher(monkeypatch, **variables)
    with process_group(torch.device("cpu")):
        assert not torch.distributed.is_initialized() and ranks_here() == 1
        assert local_device(torch.device("cuda")) == torch.device("cuda")


@pytest.mark.parametrize("number, index", [("3", 3), (None, 0)])
def test_a_rank_takes_the_gpu_of_its_local_number_or_else_the_first(monkeypatch, number, index):
    set_launcher(
        monkeypatch,
        WORLD_SIZE="8",
        RANK="7",
        MASTER_ADDR="a",
        MASTER_PORT="1",
        LOCAL_WORLD_SIZE=number and "4",
        LOCAL_RANK=number,
    )
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert local_device(torch.device("cuda")) == torch.device("cuda", index)
    assert chosen == [torch.device("cuda", index)]


def test_what_is_saved_of_an_epoch_goes_on_in_another_number_of_ranks(monkeypatch):
    # The means of four.
    totals = EpochTotals(
        [torch.tensor(1.0)] * 3,
        [torch.tensor(2.0)] * 3,
        seconds=10.0,
        compile_seconds=5.0,
        waited=1.0,
        replaced=1.5,
        kwh=0.5,
    )
    monkeypatch.setattr("ffssl.training.totals.world_size", lambda: 4)
    saved = totals.state()
    for ranks in (1, 2, 4):
        monkeypatch.setattr("ffssl.training.totals.world_size", lambda: ranks)
        goes_on = EpochTotals.restored(saved, torch.device("cpu"))
        assert (goes_on.replaced * ranks, goes_on.kwh * ranks) == (6, 2)
        assert (goes_on.seconds, goes_on.waited, goes_on.steps) == (10, 1, 3)
        assert goes_on.compile_seconds == 5


def test_each_of_any_number_of_ranks_goes_on_with_its_part_of_the_embeddings(monkeypatch):
    totals = EpochTotals(embeddings=torch.arange(1024.0)[:, None])
    saved = totals.state()
    monkeypatch.setattr("ffssl.training.totals.world_size", lambda: 48)
    parts = []
    for each in range(48):
        monkeypatch.setattr("ffssl.training.totals.rank", lambda: each)
        parts.append(EpochTotals.restored(saved, torch.device("cpu")).embeddings)
    assert torch.equal(torch.cat(parts), totals.embeddings)
