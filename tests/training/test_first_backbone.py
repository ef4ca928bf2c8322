"""Runs that start from a file of weights."""

import hashlib

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from support.options import SMALL
from support.small_runs import save_run

from ffssl.config import read_options
from ffssl.errors import UserError
from ffssl.export.__main__ import export
from ffssl.lr_range import range_test
from ffssl.prepare import prepared
from ffssl.run_folder import checkpoint
from ffssl.run_folder.provenance import read_starts


def options(betons, folder, *more):
    data = f"--data.train={betons['train']}"
    return read_options([*SMALL, data, f"--run.folder={folder}", "--run.tensorboard=false", *more])


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_starts_from_an_export_and_is_continued_without_it(betons, tmp_path, capsys):
    save_run(tmp_path / "old", seed=5)
    file = tmp_path / "weights.safetensors"
    export(tmp_path / "old", "safetensors", file)
    weights, digest = load_file(file), hashlib.sha256(file.read_bytes()).hexdigest()
    given = options(
        betons,
        tmp_path / "run",
        "--method.name=byol",
        "--method.predictor=8",
        f"--model.weights={file}",
    )
    with prepared(given) as prep:
        method = prep.run.method
        assert equal(method.backbone.state_dict(), weights)
        assert equal(method.teacher.layers[0].state_dict(), weights)
        record = prep.run.weights
        assert record["file"] == "weights.safetensors" and record["sha256"] == digest
        assert record["loaded"] == len(weights) and not record["left_at_random"]
        method.backbone.stem[0].weight.data.add_(1)
        prep.record.save(prep.run)
    assert "starts from the weights of weights.safetensors: 72 tensors\n" in capsys.readouterr().out
    file.unlink()
    with prepared(given) as prep:
        assert prep.run.resumed and prep.run.weights == record
        kept = prep.run.method.backbone.state_dict()
        assert torch.equal(kept["stem.0.weight"], weights["stem.0.weight"] + 1)
    assert "starts from" not in capsys.readouterr().out
    assert [start["weights"] for start in read_starts(tmp_path / "run")] == [record] * 2
    export(tmp_path / "run", "safetensors", file)
    card = file.with_name("weights.safetensors.md").read_text()
    assert f"- started from the weights of weights.safetensors (sha256 {digest}): 72 ten" in card
    assert "  weights: weights.safetensors\n" in card and str(tmp_path) not in card
    with pytest.raises(UserError, match="--model.weights: the run in .* not 'other.pth'"):
        prepared_once(options(betons, tmp_path / "run", "--model.weights=other.pth"))


def prepared_once(given):
    with prepared(given):
        pass


def test_a_part_of_the_weights_is_taken_on_request_and_recorded(betons, tmp_path, capsys):
    state = torchvision.models.resnet18().state_dict()
    torch.save(state | {"conv1.weight": torch.zeros(1)}, tmp_path / "a.pth")
    words = ["--model.backbone=resnet18", f"--model.weights={tmp_path / 'a.pth'}"]
    with pytest.raises(UserError, match=r"^--model.weights: .*a.pth does not fit .*partial=true"):
        prepared_once(options(betons, tmp_path / "run", *words))
    assert not (tmp_path / "run").exists()
    with prepared(options(betons, tmp_path / "run", *words, "--model.weights_partial=true")) as p:
        backbone = p.run.method.backbone
        assert torch.equal(backbone.bn1.weight, state["bn1.weight"])
        assert torch.equal(backbone.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
        assert p.run.weights["left_at_random"] == ["conv1.weight"] == p.run.weights["ignored"]
        p.record.save(p.run)
    out = capsys.readouterr().out
    assert "2 of a classifier ignored (fc.weight, fc.bias); 1 ignored (conv1.weight); 1 of" in out
    export(tmp_path / "run", "torchvision", tmp_path / "b.pth")
    card = (tmp_path / "b.pth.md").read_text()
    assert "a classifier's, ignored: fc.weight, fc.bias; ignored: conv1.weight; left at r" in card


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "damaged, or not a file of weights"),
        (None, "can't be read: No such file"),
    ],
)
def test_a_file_that_is_none_is_named_before_anything_is_made(betons, tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.pth").write_bytes(content)
    given = options(betons, tmp_path / "run", f"--model.weights={tmp_path / 'a.pth'}")
    with pytest.raises(UserError, match=f"^--model.weights: .*a.pth: {message}"):
        prepared_once(given)
    with pytest.raises(UserError, match="^--model.weights: "):
        range_test(given, low=1e-3, high=1.0, steps=2, images=32)
    assert not (tmp_path / "run").exists()


def test_a_part_of_no_weights_is_refused(betons, tmp_path):
    with pytest.raises(UserError, match="--model.weights_partial: there are no weights"):
        options(betons, tmp_path, "--model.weights_partial=true")
    assert not checkpoint.exists(tmp_path)
