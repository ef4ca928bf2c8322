"""docs/adding-a-method.md does what it says."""

import re
from pathlib import Path

import pytest
import torch
from support.options import SMALL

from ffssl import methods
from ffssl.config import read_options
from ffssl.data.convert.conversion import convert
from ffssl.data.convert.sources.embedded import Embedded
from ffssl.run_folder.log import read_log
from ffssl.train import train

DOCUMENT = Path(__file__).parent.parent / "docs" / "adding-a-method.md"


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The document's example, in a folder that is searched for methods as ffssl/methods is."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (tmp_path / "align_uniform.py").write_text(code)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    monkeypatch.setattr(methods, "METHODS", methods.discover())
    return methods.METHODS["align_uniform"]


@pytest.mark.parametrize(
    "selection",
    [[], ["--hard_augment.select=hard", "--augment.views=3"]],
)
def test_the_example_trains_three_steps(example, tmp_path, selection):
    convert(Embedded("train", 96), tmp_path / "train.beton")
    train(
        read_options(
            [
                *SMALL,
                f"--data.train={tmp_path / 'train.beton'}",
                f"--run.folder={tmp_path / 'run'}",
                "--method.name=align_uniform",
                "--method.temperature=0.4",
                "--training.batch_size=32",
                "--training.epochs=1",
                *selection,
            ]
        )
    )
    (row,) = read_log(tmp_path / "run")
    assert (
        torch.isfinite(torch.tensor(row["loss"])) and row["flops"] > 0 and row["embedding_std"] > 0
    )


def test_the_examples_loss_is_the_papers(example):
    class Features(torch.nn.Identity):
        features = 6

    method = example(Features(), hidden=8, projection=4, temperature=0.4).eval()
    first, second = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    z1, z2 = method.project(first), method.project(second)
    uniformity = [
        torch.stack(
            [torch.exp(-(a - b).square().sum() / 0.4) for i, a in enumerate(z) for b in z[:i]]
        )
        .mean()
        .log()
        for z in (z1, z2)
    ]
    expected = sum((a - b).square().sum() for a, b in zip(z1, z2)) / 5 + sum(uniformity) / 2
    torch.testing.assert_close(method.loss(first, second)[0], expected)


def test_every_name_that_the_document_mentions_exists():
    text = DOCUMENT.read_text()
    root = DOCUMENT.parent.parent
    for path in re.findall(r"`((?:ffssl|tests)/[\w/]+\.py)`", text):
        assert (root / path).exists() or path.endswith("align_uniform.py"), path
