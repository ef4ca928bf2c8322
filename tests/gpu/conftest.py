import pytest
import torch
from torch import distributed as dist

import ffssl.training.build
from ffssl.backbones import SmallResNet


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu/" in str(item.path):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def made_up(request):
    """What has been asked of the GPU, where it is made up."""
    plugin = request.config.pluginmanager.get_plugin("made_up_gpu.plugin")
    if plugin is None:
        pytest.skip("asks the made-up GPU what has been asked of it")
    found = plugin.MadeUp()
    yield found
    found.memory(0)
    torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def tiny_backbone(monkeypatch):
    monkeypatch.setattr(
        ffssl.training.build, "build_backbone", lambda *_, **__: SmallResNet((8, 16))
    )


@pytest.fixture
def two_ranks():
    """A group of two ranks, of which this is the first and the other does not answer: what comes
    from it has no values.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()
