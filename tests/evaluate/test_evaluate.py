"""ffssl evaluate"""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support.printed_tables import rows_of
from support.small_runs import save_run
from torch.nn import functional as F

from ffssl.config.command_line import exit_status
from ffssl.data.beton.description import description_path
from ffssl.data.beton.read import read_beton
from ffssl.data.convert.conversion import ConvertOptions, convert
from ffssl.data.convert.sources.embedded import Embedded
from ffssl.data.convert.sources.folder import ImageFolder
from ffssl.data.loader import ViewLoader
from ffssl.data.normalise import to_input
from ffssl.data.policy import EVALUATION
from ffssl.errors import UserError
from ffssl.evaluate.__main__ import main
from ffssl.evaluate.frozen_run import FrozenRun, describe, freeze
from ffssl.evaluate.linear import Recipe, usual_batch_size
from ffssl.evaluate.results import read_results
from ffssl.load import fingerprint
from ffssl.run_folder import checkpoint


def evaluate(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, words)])
    return exit_status(main)


@pytest.fixture
def run(tmp_path, betons):
    save_run(tmp_path / "run", *data_of(betons))
    return tmp_path / "run"


def data_of(betons):
    return f"--data.train={betons['train']}", f"--data.validation={betons['val']}"


def centre_crops(network, path, resolution=32):
    with ViewLoader(
        path,
        batch_size=8,
        views=1,
        resolution=resolution,
        policy=EVALUATION,
        shuffle=False,
        drop_last=False,
    ) as loader:
        batches = [(network(to_input(views[:, 0])).double(), labels) for views, labels, _ in loader]
    return tuple(torch.cat(parts) for parts in zip(*batches))


@torch.no_grad()
def knn_by_definition(network, betons, k, temperature, resolution):
    (bank, bank_labels), (queries, labels) = (
        centre_crops(network, betons[split], resolution) for split in ("train", "val")
    )
    # As they are kept.
    bank, queries = (F.normalize(features, dim=1).half().double() for features in (bank, queries))
    cosines = F.cosine_similarity(queries[:, None], bank[None], dim=2)
    kept = torch.where(
        cosines >= cosines.sort(1).values[:, -k, None], (cosines / temperature).exp(), 0
    )
    votes = torch.stack([kept[:, bank_labels == c].sum(1) for c in range(8)], 1)
    return (votes.argmax(1) == labels).double().mean().item()


def test_knn_of_several_runs_is_compared_in_a_table_and_recorded(
    tmp_path, betons, monkeypatch, capsys
):
    methods = [save_run(tmp_path / str(seed), *data_of(betons), seed=seed) for seed in range(2)]
    accuracies = [knn_by_definition(method.backbone, betons, 7, 0.2, 48) for method in methods]
    words = [
        "knn",
        tmp_path / "0",
        tmp_path / "1" / "checkpoint.pt",
        "--k",
        7,
        "--temperature",
        0.2,
        "--resolution",
        48,
        "--device",
        "cpu",
    ]
    assert evaluate(monkeypatch, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].startswith("| run ") and set(lines[-3]) <= set("|-:")
    for seed, line in enumerate(lines[-2:]):
        assert (
            f"| {tmp_path / str(seed)}" in line
            and "k = 7, T = 0.2; 48 px, float32" in line
            and f"{accuracies[seed]:.2%}" in line
        )
        (record,) = read_results(tmp_path / str(seed))
        assert record["scores"] == {"top1": pytest.approx(accuracies[seed])}
        assert record["settings"] == {
            "k": 7,
            "temperature": 0.2,
            "resolution": 48,
            "classes": 8,
            "precision": "float32",
        }
        told = {name: (data["file"], data["images"]) for name, data in record["data"].items()}
        assert told == {"train": ("train.beton", 160), "validation": ("val.beton", 40)}
        assert (record["epoch"], record["network"], record["weights"]) == (
            3,
            "student",
            fingerprint(methods[seed].backbone),
        )


def test_the_same_evaluation_replaces_its_record_and_another_is_added(run, monkeypatch):
    for k in (5, 200, 5):
        assert evaluate(monkeypatch, "knn", run, "--k", k, "--device", "cpu") == 0
    # Cut to the images there are.
    assert [record["settings"]["k"] for record in read_results(run)] == [160, 5]


@pytest.mark.parametrize("cached", [False, True])
def test_a_probe_leaves_the_backbone_alone_and_says_what_it_was_trained_on(
    run, monkeypatch, capsys, cached
):
    words = [
        "linear",
        run,
        "--epochs",
        2,
        "--batch-size",
        40,
        "--learning-rate",
        0.5,
        "--device",
        "cpu",
        *["--cached"] * cached,
    ]
    assert evaluate(monkeypatch, *words) == 0
    told, warned = capsys.readouterr()
    assert "warning: with 160 images, at a learning rate of 0.5, the probe may end" in warned
    label = "on cached features: no augmentation" if cached else "on random crops and flips"
    assert f"linear probe {label}: epoch 2/2, loss " in told
    assert f"| 2 epochs {label}, learning rate 0.5, batch 40; 32 px, float32 |" in told
    (record,) = read_results(run)
    assert record["settings"]["training"] == label and record["settings"]["cached"] == cached
    state = checkpoint.load(run, name=record["probe"])
    frozen = freeze(run, device="cpu")
    features, labels = centre_crops(frozen.backbone, frozen.validation)
    ranks = (
        (features @ state["classifier"]["weight"].double().T + state["classifier"]["bias"])
        .argsort(1, descending=True)
        .tolist()
    )
    right = {
        k: np.mean([label in rank[:k] for rank, label in zip(ranks, labels.tolist())])
        for k in (1, 5)
    }
    assert record["scores"] == {"top1": pytest.approx(right[1]), "top5": pytest.approx(right[5])}
    assert evaluate(monkeypatch, *words) == 0
    assert "continued after epoch 2" in capsys.readouterr().out and len(read_results(run)) == 1
    assert evaluate(monkeypatch, *words, "--learning-rate", 4) == 0
    assert not capsys.readouterr().err


def test_a_probes_batch_size_suits_the_training_images(run, monkeypatch):
    assert evaluate(monkeypatch, "linear", run, "--epochs", 1, "--cached", "--device", "cpu") == 0
    assert [record["settings"]["batch_size"] for record in read_results(run)] == [2]  # of 160


def test_a_frozen_backbone_keeps_its_weights_and_statistics(run):
    frozen = freeze(run, device="cpu")
    before = fingerprint(frozen.backbone)
    frozen.linear(Recipe(epochs=1, batch_size=40))
    assert fingerprint(frozen.backbone) == before
    assert not any(module.training for module in frozen.backbone.modules())
    assert all(not p.requires_grad and p.grad is None for p in frozen.backbone.parameters())


def test_probes_of_other_settings_have_other_checkpoints(run, betons):
    for recipe in (Recipe(1, batch_size=40, cached=True), Recipe(1, 0.4, 40, cached=True)):
        freeze(run, device="cpu").linear(recipe)
    save_run(run, *data_of(betons), seed=1)
    freeze(run, device="cpu").linear(Recipe(1, batch_size=40, cached=True))
    assert len(list(run.glob("linear-*.pt"))) == 3


def test_files_of_one_name_are_told_apart(tmp_path, betons, run):
    """Else a probe would be taken for one that was trained on other images."""
    (tmp_path / "other").mkdir()
    convert(Embedded("val", 160), tmp_path / "other" / "train.beton")
    probes = [
        freeze(run, train=path, device="cpu").linear(Recipe(1, cached=True))
        for path in (betons["train"], tmp_path / "other" / "train.beton")
    ]
    assert (
        probes[0]["data"]["train"]["file"] == probes[1]["data"]["train"]["file"]
        and probes[0]["probe"] != probes[1]["probe"]
    )


def test_raw_images_of_one_size_are_told_apart(tmp_path):
    digests = set()
    for colour in ("red", "blue"):
        for label in "ab":
            (tmp_path / colour / label).mkdir(parents=True)
            Image.new("RGB", (40, 40), colour).save(tmp_path / colour / label / "0.png")
        convert(
            ImageFolder(tmp_path / colour),
            tmp_path / f"{colour}.beton",
            ConvertOptions(compressed_share=0),
        )
        digests.add(describe(tmp_path / f"{colour}.beton")["digest"])
    assert len(digests) == 2


@pytest.mark.parametrize(
    "evaluation",
    [
        lambda run: run.knn(k=5, temperature=0.1),
        lambda run: run.linear(Recipe(1, batch_size=40)),
        lambda run: run.linear(Recipe(1, batch_size=40, cached=True)),
    ],
    ids=["knn", "linear", "cached"],
)
def test_broken_training_images_are_replaced_where_they_were_in_the_training(
    tmp_path, betons, evaluation
):
    content = bytearray(betons["train"].read_bytes())
    begin = int(read_beton(betons["train"]).images["data_ptr"][3])
    content[begin : begin + 2] = b"\0\0"
    (tmp_path / "broken.beton").write_bytes(content)
    data = f"--data.train={tmp_path / 'broken.beton'}", f"--data.validation={betons['val']}"
    for broken in ("stop", "replace"):
        save_run(tmp_path / broken, *data, f"--data.broken={broken}")
    with pytest.raises(UserError, match="broken.beton: image 3 does not decode"):
        evaluation(freeze(tmp_path / "stop", device="cpu"))
    assert evaluation(freeze(tmp_path / "replace", device="cpu"))["scores"]["top1"] > 0


def test_a_run_within_an_epoch_is_recorded_as_such(tmp_path, betons, monkeypatch, capsys):
    save_run(tmp_path, *data_of(betons), epoch=1, steps=5)
    assert evaluate(monkeypatch, "knn", tmp_path, "--device", "cpu") == 0
    assert "| 1 + 5 steps |" in capsys.readouterr().out
    (record,) = read_results(tmp_path)
    assert (record["epoch"], record["steps"]) == (1, 5)


def test_what_can_not_be_recorded_is_told_before_any_work(run, monkeypatch, capsys):
    monkeypatch.setattr(FrozenRun, "knn", lambda *_, **__: pytest.fail("evaluated"))
    (run / "evaluation.json").write_text("[")
    assert evaluate(monkeypatch, "knn", run, "--device", "cpu") == 2
    assert_one_line(capsys, "evaluation.json: not readable")
    (run / "evaluation.json").unlink()
    with open(run / "checkpoint.pt") as file:  # in a folder that not even root can write to
        assert (
            evaluate(monkeypatch, "knn", f"/proc/self/fd/{file.fileno()}", "--device", "cpu") == 2
        )
    assert_one_line(capsys, "/proc/self/fd: evaluation.json can't be written")


def test_an_accuracy_that_can_not_be_recorded_is_told(run, monkeypatch, capsys):
    knn = FrozenRun.knn

    def knn_then_damage(self, **settings):
        (run / "evaluation.json").write_text("[")
        return knn(self, **settings)

    monkeypatch.setattr(FrozenRun, "knn", knn_then_damage)
    assert evaluate(monkeypatch, "knn", run, "--device", "cpu") == 2
    told = capsys.readouterr()
    assert rows_of(told.out)[-1][:4] == [str(run), "student", "3", "knn"]
    assert "not readable" in told.err


def test_an_interrupted_probe_with_augmentation_ends_in_the_same_weights(run, interrupted_after):
    recipe = Recipe(epochs=3, batch_size=40)
    with interrupted_after(1):
        freeze(run, device="cpu").linear(recipe)
    probes = [freeze(run, device="cpu").linear(recipe)["probe"]]
    interrupted = checkpoint.load(run, name=probes[0])["classifier"]["weight"]
    (run / probes[0]).unlink()
    freeze(run, device="cpu").linear(recipe)
    assert torch.equal(checkpoint.load(run, name=probes[0])["classifier"]["weight"], interrupted)


def test_the_teacher_is_evaluated_on_its_own(tmp_path, betons, monkeypatch):
    method = save_run(tmp_path, *data_of(betons), "--method.name=byol", "--method.predictor=8")
    for network in ("student", "teacher"):
        assert evaluate(monkeypatch, "knn", tmp_path, "--network", network, "--device", "cpu") == 0
    weights = [fingerprint(network) for network in (method.backbone, method.teacher.layers[0])]
    assert [record["weights"] for record in read_results(tmp_path)] == weights and weights[
        0
    ] != weights[1]


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Files that do not go with the runs' own."""
    folder = tmp_path_factory.mktemp("others")
    for i in range(4):
        (folder / "classes" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        for place in (folder / "classes" / "ab"[i % 2], folder):
            Image.new("RGB", (40, 40), (60 * i, 0, 0)).save(place / f"{i}.jpg")
    (folder / "flat").mkdir()
    for path in folder.glob("*.jpg"):
        path.rename(folder / "flat" / path.name)
    convert(ImageFolder(folder / "flat"), folder / "flat.beton")
    convert(ImageFolder(folder / "classes"), folder / "classes.beton")
    shutil.copy(folder / "classes.beton", folder / "undescribed.beton")
    return folder


@pytest.mark.parametrize("evaluation", ["knn", "linear"])
@pytest.mark.parametrize(
    "words, message",
    [
        ("OTHERS", "others.*holds no checkpoint.pt; name the folder of a run"),
        ("RUN --validation OTHERS/flat.beton", "flat.beton: an evaluation needs labels"),
        ("RUN --train OTHERS/flat.beton", "flat.beton: an evaluation needs labels"),
        (
            "RUN --validation OTHERS/classes.beton",
            (
                "classes.beton: its classes are not those of .*train.beton: '.*' is in one of "
                "them only"
            ),
        ),
        (
            "RUN --train OTHERS/undescribed.beton",
            "val.beton: its classes are not those of .*: label 2 has no training image",
        ),
        ("RUN --validation missing.beton", "missing.beton: no such file"),
        ("RUN --network teacher", "--network: simclr has no teacher"),
        ("RUN --network both", "argument --network: invalid choice: 'both'"),
        ("RUN --resolution 0", "argument --resolution: expected an integer of 1 or more, got '0'"),
        ("RUN --device cuda:99", "--device: cuda:99 can't be used here"),
        ("RUN missing", "missing: no such run"),
        ("", "the following arguments are required: RUN"),
    ],
)
def test_mistakes_cost_a_line_and_status_2(
    run, others, monkeypatch, capsys, evaluation, words, message
):
    words = words.replace("RUN", str(run)).replace("OTHERS", str(others)).split()
    assert evaluate(monkeypatch, evaluation, *words) == 2
    assert_one_line(capsys, message)
    assert not (run / "evaluation.json").exists()


def assert_one_line(capsys, message):
    import re

    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and re.search(message, error), (
        error
    )


def test_an_unknown_evaluation_and_a_run_without_validation_are_told(tmp_path, monkeypatch, capsys):
    assert evaluate(monkeypatch, "svm", tmp_path) == 2
    assert_one_line(capsys, "invalid choice: 'svm'")
    save_run(tmp_path)
    assert evaluate(monkeypatch, "knn", tmp_path) == 2
    assert_one_line(capsys, "the run had no validation images; name a beton file with --validation")


def test_classes_in_another_order_are_told(tmp_path, betons, run, monkeypatch, capsys):
    shutil.copy(betons["val"], tmp_path / "val.beton")
    description = json.loads(description_path(betons["val"]).read_text())
    description["class_names"].reverse()
    description_path(tmp_path / "val.beton").write_text(json.dumps(description))
    assert evaluate(monkeypatch, "knn", run, "--validation", tmp_path / "val.beton") == 2
    assert_one_line(capsys, "its classes are not those of .*: the order is another")


@pytest.mark.slow
def test_a_probe_of_the_demo_converges_and_cached_features_do_so_near_by(tmp_path):
    from ffssl.config import read_options
    from ffssl.train import train

    paths = {split: tmp_path / f"{split}.beton" for split in ("train", "val")}
    for split, path in paths.items():
        convert(Embedded(split, 4000 if split == "train" else 1000), path)
    train(
        read_options(
            [
                "--config",
                "rn50_configs/demo_efficient.yaml",
                *data_of(paths),
                f"--run.folder={tmp_path / 'run'}",
                "--run.tensorboard=false",
            ]
        )
    )
    recipes = [Recipe(batch_size=usual_batch_size(4000), cached=cached) for cached in (False, True)]
    full, cached = (freeze(tmp_path / "run").linear(recipe)["scores"]["top1"] for recipe in recipes)
    # Of a drawing, a crop of 8 % often does not show what it is.
    assert full > 0.9 and 0 < cached - full < 0.07
