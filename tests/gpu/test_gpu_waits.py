"""What may not wait for the GPU does not: no step, on one GPU or on two.

What must wait sleeps, with its own GPU current.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from support.gpu_runs import no_waits, start, views

from ffssl.errors import UserError
from ffssl.methods import METHODS
from ffssl.training.step import train_step

SETTINGS = {  # of Hard Augment, precision, accumulation and optimiser
    "pairs off": ["--augment.views=2", "--hard_augment.select=off", "--training.amp=bf16"],
    "random pairs": ["--hard_augment.select=random", "--training.amp=off"],
    "random pairs, targets": [
        "--hard_augment.select=random",
        "--hard_augment.extra_targets=true",
        "--training.amp=bf16",
    ],
    "cosine, fp16, lars": ["--training.amp=fp16", "--training.optimizer=lars"],
    "cosine, targets, fp16": ["--hard_augment.extra_targets=true", "--training.amp=fp16"],
    "method's loss, parts, adamw": [
        "--hard_augment.loss=method",
        "--training.accumulate=2",
        "--training.optimizer=adamw",
    ],
    "method's loss, targets, lars": [
        "--hard_augment.loss=method",
        "--hard_augment.extra_targets=true",
        "--training.optimizer=lars",
    ],
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_never_waits(name, setting):
    try:
        run = start(name, *SETTINGS[setting], batch_size=16)
    except UserError as error:  # of a method that has no such thing
        pytest.skip(str(error))
    of_images = views()[:, : run.options.augment.views]
    for step in range(2):
        train_step(run, of_images, step)  # constants are copied to the device once
    with no_waits():
        train_step(run, of_images, 2)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_step_of_two_ranks_never_waits(two_ranks, name, amp):
    run = start(name, f"--training.amp={amp}")
    for step in range(2):
        train_step(run, views(), step)
    with no_waits():
        train_step(run, views(), 2)


@pytest.mark.parametrize("name", METHODS)
def test_all_that_convolutions_take_is_channels_last(two_ranks, made_up, name):
    run = start(name)
    made_up.reset()
    train_step(run, views(), 0)
    assert (
        made_up.layouts["input"] > 4 < made_up.layouts["gradient"] and len(made_up.layouts) == 2
    ), made_up.layouts


WAITING = """
import contextlib, sys, torch
from pathlib import Path
from made_up_gpu.plugin import MadeUp, pytest_configure
from ffssl.backbones import SmallResNet
from ffssl.data.convert.conversion import convert
from ffssl.data.convert.sources.embedded import Embedded
from ffssl.parallel.device import choose_device
from ffssl.evaluate.features import extract_features, open_views
from ffssl.data.loader import ViewLoader
from ffssl.run_folder.background_writer import Saver
from ffssl.training.transfer import RunAheadLimit, to_device
pytest_configure(None)
folder = Path(sys.argv[1])
convert(Embedded("train", 40), folder / "train.beton")
gpu = choose_device("cuda:1")
weights = torch.zeros(10, device=gpu)
lead, saver, made_up = RunAheadLimit(gpu), Saver(folder, gpu, keep=1, minutes=1), MadeUp()
with ViewLoader(folder / "train.beton", batch_size=4, views=2, resolution=32, workers=2) as loader:
    for views in to_device((views for views, _, _ in loader), gpu):
        lead()
saver.save({"weights": weights})
saver.close()
network = SmallResNet((8,)).to(gpu)
settings = dict(batch_size=16, views=1, resolution=32, workers=2, drop_last=False)
with ViewLoader(folder / "train.beton", **settings) as loader:
    features, labels = extract_features(
        network, loader, gpu, contextlib.nullcontext(), store=torch.device("cpu")
    )
assert features.shape == (40, 8) and features.device.type == labels.device.type == "cpu"
for name, count in made_up.counts().items():
    if name.startswith("wait") or "pageable" in name:
        print(name)
"""


def test_threads_wait_asleep_and_on_their_own_gpu(made_up, tmp_path):
    """Of a machine's second: loader, saver, features.

    What little is copied to the device by waiting are constants.
    """
    tests = Path(__file__).resolve().parents[1]
    ran = subprocess.run(
        [sys.executable, "-c", WAITING, str(tmp_path)], capture_output=True, text=True, cwd=tests
    )
    assert ran.returncode == 0, ran.stderr
    waits = [line for line in ran.stdout.splitlines() if "event" in line]
    assert waits == ["wait for an event, asleep, GPU 1"], ran.stdout
