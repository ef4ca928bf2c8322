import random
import signal
from pathlib import Path

import pytest
from support import leftovers

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption(
        "--seed",
        type=int,
        help="of the moments that tests choose at random; a failed test prints its own",
    )


def pytest_configure(config):
    # As in a shell's background: programs under test would inherit it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    leftovers.watch()


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        _skip(items, "slow", "takes minutes: run with --slow")
    if any(item.get_closest_marker("gpu") for item in items):
        import torch  # seconds: not for those who collect no such test

        if not torch.cuda.is_available():
            _skip(items, "gpu", "needs a CUDA device")


def _skip(items, marker, reason):
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def moments(request) -> random.Random:
    """For what happens at random moments."""
    seed = request.config.getoption("--seed")
    seed = random.randrange(1 << 32) if seed is None else seed
    print(f"random moments: --seed={seed}")
    return random.Random(seed)


@pytest.fixture(scope="session")
def betons(tmp_path_factory) -> dict[str, Path]:
    """Drawn images with labels: 160 to train on, 40 to validate."""
    from ffssl.data.convert.conversion import convert
    from ffssl.data.convert.sources.embedded import Embedded

    folder = tmp_path_factory.mktemp("betons")
    paths = {split: folder / f"{split}.beton" for split in ("train", "val")}
    for split, count in (("train", 160), ("val", 40)):
        convert(Embedded(split, count), paths[split])
    return paths


@pytest.fixture(scope="session")
def shared_data():
    """The folder of sample images that may lie beside the checkout, ../shared/data."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"sample images not found: {folder}")
    return folder
