"""Runs of two processes, on CPUs, against the same runs in one."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from support.options import SMALL
from torch import multiprocessing

import ffssl.prepare
import ffssl.train
import ffssl.training.build
from ffssl.backbones import SmallResNet
from ffssl.config import read_options
from ffssl.data.beton.read import read_beton
from ffssl.data.convert.conversion import ConvertOptions, convert
from ffssl.data.convert.sources.embedded import Embedded
from ffssl.data.order import epoch_order
from ffssl.errors import Stopped, UserError
from ffssl.evaluate.online import OnlineKnn
from ffssl.parallel import ranks as distributed
from ffssl.run_folder import checkpoint
from ffssl.run_folder.log import RunLog, read_log
from ffssl.run_folder.provenance import read_starts

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2
OPTIONS = [
    *SMALL,
    "--training.batch_size=32",
    "--training.epochs=4",
    "--training.learning_rate=0.0003",
    "--data.workers=1",
]
# Rounding errors grow from step to step, the faster the larger the learning rate: these are small,
# and the weights' changes as well.
THREE_VIEWS = ["--augment.views=3", "--hard_augment.resolution=16"]
RUNS = {  # of 20 steps; between them, all that is computed from a batch
    "simsiam": ["--method.predictor=8", "--training.accumulate=2"],
    "simclr": [
        *THREE_VIEWS,
        "--hard_augment.select=hard",
        "--hard_augment.loss=method",
        "--resolution.min=16",
        "--resolution.schedule=spl",
        "--training.schedule=f1-clr",
        "--training.warmup_epochs=1",
        "--method.temperature=1",
        "--augment.local_views=2",
    ],
    "mocov2plus": [*THREE_VIEWS, "--hard_augment.select=random", "--method.queue=128"],
    "dino": [
        "--method.prototypes=64",
        "--augment.local_views=2",
    ],  # whose last layer is frozen for 5 steps
}
CONTINUED = ["--method.name=simclr", *RUNS["simclr"]]
HANGS = 600  # seconds, after which what takes twenty does
PATIENCE = 3  # seconds


class Stop(Exception):
    pass


def options_of(betons, folder, *more):
    return [*OPTIONS, f"--data.train={betons['train']}", f"--run.folder={folder}", *more]


def train(arguments, *, stop_after=None, at_step=None):
    """Train, in one thread.

    Returns the losses of the steps, as rank 0 shows them, and all that the method, and the linear
    classifier beside it, held before and hold now.

    stop_after: an epoch at whose end Stop is raised. at_step: called with each step's number.
    """
    losses, runs, step_of, epoch_of, start = (
        [],
        [],
        ffssl.train.train_step,
        ffssl.train.train_epoch,
        ffssl.prepare.start_run,
    )

    def kept(*words):
        run = start(*words)
        runs.append((run, {name: tensor.clone() for name, tensor in held_by(run).items()}))
        return run

    def epoch(prep):
        if prep.run.epoch == stop_after:
            raise Stop
        return epoch_of(prep)

    def step(run, views, number, labels):
        if at_step:
            at_step(number)
        return step_of(run, views, number, labels)

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            RunLog, "write_step", lambda log, number, values: losses.append(values["loss"])
        )
        patch.setattr(ffssl.prepare, "start_run", kept)
        patch.setattr(ffssl.train, "train_epoch", epoch)
        patch.setattr(ffssl.train, "train_step", step)
        torch.set_num_threads(1)
        try:
            ffssl.train.train(read_options(arguments))
        finally:
            torch.set_num_threads(threads)
    ((run, before),) = runs
    return losses, before, held_by(run)


def held_by(run) -> dict[str, torch.Tensor]:
    classifier = run.classifier.layer.state_dict() if run.classifier else {}
    return run.method.state_dict() | {f"classifier.{name}": t for name, t in classifier.items()}


def assert_close(state, expected, atol=3e-5):
    assert list(state) == list(expected)
    for name, tensor in state.items():
        if name == "queue":  # where the keys of a batch lie in the order of the ranks
            assert torch.cdist(tensor, expected[name]).amin(1).max() < 1e-3
        else:
            torch.testing.assert_close(
                tensor, expected[name], atol=atol, rtol=1e-3, msg=lambda told: f"{name}: {told}"
            )


@contextlib.contextmanager
def tiny_backbone():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ffssl.training.build, "build_backbone", lambda *_, **__: SmallResNet((8, 16)))
        yield


def refusal(arguments) -> str:
    try:
        train(arguments)
    except UserError as error:
        return str(error)
    return "none"


def lose_patience(rank: int, folder: Path) -> tuple[str, float]:
    """Of rank 1, which answers once rank 0 has stopped waiting."""
    (folder / f"ready{rank}").touch()
    await_file(folder / f"ready{1 - rank}")  # they have the same time to join
    started = time.monotonic()
    try:
        with distributed.process_group(torch.device("cpu"), timeout=timedelta(seconds=PATIENCE)):
            if rank == 1:
                await_file(folder / "tired")
            distributed.gather_objects(None)
    except ConnectionError as error:
        (folder / "tired").touch()
        return str(error), time.monotonic() - started
    return "in time", 0.0


def await_file(path):
    deadline = time.monotonic() + HANGS
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def mix_devices(rank: int) -> str:
    """Of a rank 1 with a GPU, which is not touched."""
    with (
        pytest.raises(UserError) as refused,
        distributed.process_group(torch.device("cuda" if rank else "cpu")),
    ):
        pass
    return str(refused.value)


def work(rank, ports, folder, betons):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
    }
    ports, answer = iter(ports), {}

    def next_group():
        os.environ["MASTER_PORT"] = str(next(ports))

    with tiny_backbone():
        for name, more in RUNS.items():
            next_group()
            more = [f"--method.name={name}", f"--data.validation={betons['val']}", *more]
            answer[name] = train(options_of(betons, folder / name, *more))
        next_group()
        with contextlib.suppress(Stop):
            train(options_of(betons, folder / "stopped", *CONTINUED), stop_after=1)
        refused = {
            "options": [f"--training.learning_rate={0.1 + rank}"],
            "files": [
                f"--data.train={betons['other' if rank else 'train']}",
                f"--data.workers={1 + rank}",
            ],
            "missing": [f"--data.train={folder / 'missing.beton' if rank else betons['train']}"],
            "batch": ["--training.batch_size=33", "--training.accumulate=3"],
            "folders": [f"--run.folder={folder / 'simclr'}", *CONTINUED],
            "validation": [f"--data.validation={betons['val']}"] * rank,
            "precision": [],
        }
        for name, more in refused.items():
            next_group()
            with pytest.MonkeyPatch.context() as patch:
                if name == "folders" and rank == 1:  # of which rank 1 sees another
                    patch.setattr(checkpoint, "load", lambda *_, **__: None)
                if name == "precision":
                    patch.setattr(ffssl.prepare, "precision", lambda *_: ("bf16", "fp16")[rank])
                answer[name] = refusal(options_of(betons, folder / "refused", *more))
        next_group()
        answer["devices"] = mix_devices(rank)
        next_group()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped) as stopped:
            patch.setattr(OnlineKnn, "accuracies", lambda *_: signal.raise_signal(signal.SIGTERM))
            train(options_of(betons, folder / "evaluating", f"--data.validation={betons['val']}"))
        answer["evaluating"] = str(stopped.value)
        next_group()
        answer["patience"] = lose_patience(rank, folder)
        torch.save(answer, folder / f"{rank}.pt")

        def die(step):
            if rank == 1 and step == 7:
                (folder / "died.txt").write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)

        next_group()
        with pytest.raises(ConnectionError) as lost:
            train(options_of(betons, folder / "lost"), at_step=die)
        (folder / "lost.txt").write_text(f"{time.time()} {lost.value}")


def torchrun(ranks: int, arguments: list[str], *, stop_when=None) -> tuple[int, str, str]:
    """Its status, output and errors.

    stop_when: SIGTERM is sent to it as soon as this returns true.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={ranks}",
        f"--master-port={free_ports(1)[0]}",
    ]
    process = subprocess.Popen(
        [*command, str(ROOT / "ffssl" / "train.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    try:
        while stop_when and process.poll() is None:
            if stop_when():
                process.terminate()
                break
            time.sleep(0.01)
        output, errors = process.communicate(timeout=HANGS)
    finally:
        process.kill()
    return process.returncode, output, errors


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def files(betons, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "train.beton"
    convert(Embedded("val", 160), other, ConvertOptions(progress=False))
    return betons | {"other": other}


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory):
    """What two processes leave, of which the second dies in the end."""
    folder = tmp_path_factory.mktemp("ranks")
    server, ports = multiprocessing.get_context("forkserver"), free_ports(16)
    # What takes seconds to import is imported once.
    server.set_forkserver_preload(["pytest", "ffssl.train"])
    processes = [
        server.Process(target=work, args=(rank, ports, folder, files)) for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + HANGS
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
        process.kill()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]
    return folder


@pytest.fixture(scope="module")
def answers(folder):
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_as_one_process_does(answers, betons, tmp_path, name):
    with tiny_backbone():
        losses, before, state = train(
            options_of(
                betons,
                tmp_path,
                f"--method.name={name}",
                f"--data.validation={betons['val']}",
                *RUNS[name],
            )
        )
    (theirs, _, first), (nothing, _, second) = (answer[name] for answer in answers)
    assert len(losses) == 20 and nothing == []
    assert theirs == pytest.approx(losses, abs=1e-4)
    assert_close(first, state)
    # Student, teacher and buffers, to the bit.
    assert all(torch.equal(first[name], second[name]) for name in state)
    assert (state["projector.0.weight"] - before["projector.0.weight"]).abs().max() > 3e-4
    assert state["classifier.weight"].abs().max() > 3e-4


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "options",
            "--training.learning_rate: 0.1 on rank 0, but 1.1 on rank 1; all ranks need the same",
        ),
        ("files", "--data.train: digest: '"),
        ("missing", "missing.beton: no such file; write it with ffssl convert (rank 1)"),
        (
            "batch",
            (
                "--training.batch_size: 33 is no multiple, or less than twice, of 6 (2 "
                "processes, --training.accumulate=3)"
            ),
        ),
        ("folders", "a checkpoint of epoch 4, step 0' on rank 0, but 'no checkpoint' on rank 1"),
        (
            "validation",
            (
                "--data.validation: 'left out' on rank 0, but 'given' on rank 1; all ranks "
                "need the same"
            ),
        ),
        (
            "precision",
            "--training.amp: 'bf16' on rank 0, but 'fp16' on rank 1; all ranks need the same",
        ),
        ("devices", "--run.device: cpu on rank 0, but cuda on rank 1; all ranks need the same"),
    ],
)
def test_what_ranks_can_not_train_on_together_all_of_them_refuse(answers, name, message):
    assert answers[0][name] == answers[1][name]
    assert message in answers[0][name]


def test_a_signal_while_one_rank_evaluates_stops_all(answers):
    assert [answer["evaluating"] for answer in answers] == ["stopped by SIGTERM"] * RANKS


def test_a_rank_that_does_not_answer_is_waited_for_no_longer_than_the_timeout(answers):
    message, seconds = answers[0]["patience"]
    assert message.startswith("rank 0 of 2 has lost another rank (")
    assert PATIENCE <= seconds < HANGS


def test_a_rank_that_dies_stops_the_others_at_once(folder):
    noticed, message = (folder / "lost.txt").read_text().split(maxsplit=1)
    assert message.startswith("rank 0 of 2 has lost another rank (")
    # And not the half hour of `ranks.TIMEOUT`.
    assert 0 < float(noticed) - float((folder / "died.txt").read_text()) < HANGS
    assert checkpoint.load(folder / "lost")["epoch"] == 1


def test_a_run_of_two_ranks_goes_on_in_one_process(folder, betons, tmp_path):
    shutil.copytree(folder / "stopped", tmp_path / "run")
    assert checkpoint.load(tmp_path / "run")["epoch"] == 1
    with tiny_backbone():
        _, _, state = train(options_of(betons, tmp_path / "run", *CONTINUED))
    assert [start["ranks"] for start in read_starts(tmp_path / "run")] == [2, 1]
    together = checkpoint.load(folder / "simclr")["method"]
    assert_close(state, together)


def test_a_run_of_one_process_goes_on_with_torchrun_which_writes_and_tells_once(betons, tmp_path):
    options = [f"--data.validation={betons['val']}", "--evaluate.every=3", *CONTINUED]
    with contextlib.suppress(Stop):
        train(options_of(betons, tmp_path / "run", *options), stop_after=2)
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    _, _, alone = train(options_of(betons, tmp_path / "alone", *options))
    status, output, errors = torchrun(RANKS, options_of(betons, tmp_path / "run", *options))
    assert status == 0, errors
    told = output.splitlines()
    assert [line.split()[1] for line in told if line.startswith("epoch ")] == ["3/4", "4/4"]
    assert len(told) == 5 and "on cpu, 2 processes: " in output
    ours, theirs = read_log(tmp_path / "run"), read_log(tmp_path / "alone")
    assert [row["epoch"] for row in ours] == [0, 1, 2, 3, 4]
    assert ["hardness" in row for row in ours[1:]] == [False, True, True, True]
    for row, other in zip(ours[2:], theirs[2:]):
        assert row["hardness"] == pytest.approx(other["hardness"], abs=2e-3)
    for name in ("loss", "embedding_std", "effective_rank", "flops", "resolution", "learning_rate"):
        # The mean of the ranks' embedding_stds, not that of the joint batch.
        rel = 0.02 if name == "embedding_std" else 1e-3
        assert [row[name] for row in ours[1:]] == pytest.approx(
            [row[name] for row in theirs[1:]], rel=rel
        ), name
    assert [("knn" in row) for row in ours] == [True, False, False, True, True]
    assert [
        start["ranks"] for start in json.loads((tmp_path / "run" / "run.json").read_text())
    ] == [1, 2]
    files = sorted(
        path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")
    )
    assert files == ["checkpoint.1.pt", "checkpoint.pt", "log.jsonl", "run.json"]
    state = checkpoint.load(tmp_path / "run")
    classifier = state["classifier"]["layer"].items()
    state = state["method"] | {f"classifier.{name}": tensor for name, tensor in classifier}
    assert_close(state, alone, atol=2e-4)  # of a network as deep as the program's
    assert ours[-1]["linear_top1"] == pytest.approx(theirs[-1]["linear_top1"], abs=0.1)


# Of 40 steps; at a rate so small that rounding stays small in a network as deep as the program's.
STOPPED = [
    "--method.name=simclr",
    "--method.temperature=1",
    "--training.batch_size=16",
    "--training.epochs=4",
    "--training.learning_rate=0.00003",
    "--data.broken=replace",
    "--run.checkpoint_minutes=0",
]
BROKEN = range(0, 160, 4)


@pytest.fixture(scope="module")
def stopped(betons, tmp_path_factory):
    """What torchrun leaves of two ranks when it is told to stop in the midst of an epoch: the file
    that they train on, and their folder.
    """
    folder = tmp_path_factory.mktemp("stopped")
    data = bytearray(betons["train"].read_bytes())
    for begin in read_beton(betons["train"]).images["data_ptr"][BROKEN].tolist():
        data[begin : begin + 20] = bytes(20)
    (folder / "broken.beton").write_bytes(data)
    files, run = {"train": folder / "broken.beton"}, folder / "run"
    status, _, errors = torchrun(
        RANKS, options_of(files, run, *STOPPED), stop_when=(run / checkpoint.NAME).exists
    )
    assert (
        status == 1 and "stopped by SIGTERM; the same command continues where it was" in errors
    ), errors
    return files, run


@pytest.fixture(scope="module")
def undisturbed(stopped, tmp_path_factory):
    """The folder of the same run in one process, and the losses of its steps."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, train(options_of(stopped[0], folder, *STOPPED))[0]


@pytest.mark.parametrize("ranks", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_of_two_ranks_that_was_stopped_goes_on_with_another_number(
    stopped, undisturbed, tmp_path, ranks
):
    (files, before), (alone, expected), run = stopped, undisturbed, tmp_path / "run"
    shutil.copytree(before, run)
    state = checkpoint.load(run)
    epoch, steps = state["epoch"], len(state["totals"]["losses"])
    done = 10 * epoch + steps
    assert 0 < done < 40
    assert state["totals"]["losses"].tolist() == pytest.approx(
        expected[10 * epoch : done], abs=1e-3
    )
    assert (
        state["totals"]["replaced"]
        == np.isin(epoch_order(160, seed=0, epoch=epoch)[: 16 * steps], BROKEN).sum()
    )
    if ranks == 1:
        losses, _, _ = train(options_of(files, run, *STOPPED))
        assert losses == pytest.approx(expected[done:], abs=1e-3)
    else:
        status, _, errors = torchrun(ranks, options_of(files, run, *STOPPED))
        assert status == 0, errors
    ours, theirs = read_log(run), read_log(alone)
    assert (
        [row["replaced"] for row in ours]
        == [row["replaced"] for row in theirs]
        == [len(BROKEN)] * 4
    )
    for name in ("loss", "flops", "learning_rate"):
        assert [row[name] for row in ours] == pytest.approx(
            [row[name] for row in theirs], rel=1e-3
        ), name
    assert_close(checkpoint.load(run)["method"], checkpoint.load(alone)["method"], atol=2e-4)
