"""Two files' labels, where they meet: in the training's kNN, in evaluations, reports, studies and
the demo.
"""

import contextlib
import io
import json
import re

import numpy as np
import PIL.Image
import pytest
import torch
from support.options import SMALL
from support.small_runs import save_run

from ffssl.config import read_options
from ffssl.data.beton.description import description_path
from ffssl.data.beton.read import MODE_JPEG, read_beton
from ffssl.data.beton.write import BetonWriter
from ffssl.demo import raw_pixel_accuracy
from ffssl.errors import UserError
from ffssl.evaluate.features import extract_features
from ffssl.evaluate.frozen_run import freeze
from ffssl.evaluate.labels import shared_classes
from ffssl.evaluate.linear import Recipe
from ffssl.evaluate.online import OnlineKnn
from ffssl.report.runs import read_runs
from ffssl.report.samples import embed, nearest_neighbours
from ffssl.run_folder.log import read_log
from ffssl.study.__main__ import conduct
from ffssl.study.recipes import read_study
from ffssl.train import train
from ffssl.training.classifier import online_classifier

COLOURS = ("red", "lime", "blue")
IDS = (-(2**62), 1_400_000_000, 2**63 - 1)


def write(path, labels, names=None, field=b"label"):
    """A beton file of plain images, whose colours follow from the labels' order, and its
    description where the classes have `names`.
    """
    places = np.unique(labels, return_inverse=True)[1]
    with BetonWriter(path, len(labels)) as writer:
        for i, (label, place) in enumerate(zip(labels, places)):
            image = io.BytesIO()
            PIL.Image.new("RGB", (40 + i % 3, 40), COLOURS[place]).save(image, "JPEG")
            writer.add(image.getvalue(), MODE_JPEG, 40 + i % 3, 40, label)
        writer.finish()
    path.write_bytes(path.read_bytes().replace(b"label", field, 1))
    if names:
        description_path(path).write_text(json.dumps({"class_names": names}))
    return path


def files(folder, train, validation):
    """Files of 36 and 12 images. train, validation: labels, and the names of their classes."""
    return [
        write(folder / f"{split}.beton", np.resize(labels, count).tolist(), names)
        for split, count, (labels, names) in (("train", 36, train), ("val", 12, validation))
    ]


def options_of(folder, *more):
    words = [
        *SMALL,
        "--training.epochs=1",
        "--training.batch_size=12",
        "--evaluate.k=3",
        "--data.workers=1",
        f"--data.train={folder / 'train.beton'}",
        f"--data.validation={folder / 'val.beton'}",
        f"--run.folder={folder / 'run'}",
    ]
    return read_options([*words, *more])


MISMATCHES = {
    "a class is missing, which shifts the others": (
        ((0, 1, 2), "abc"),
        ((0, 1), "bc"),
        "val.beton: its classes .*: 'a' is in one of them only",
    ),
    "the order is another": (
        ((0, 1, 2), "abc"),
        ((0, 1, 2), "acb"),
        "val.beton: .*the order is another",
    ),
    "a class has no training image": (
        ((0, 1), "abc"),
        ((0, 2), "abc"),
        r"val.beton: .*label 2 \('c'\) has no training image",
    ),
    "the same without names": (
        ((0, 1), None),
        ((0, 7), None),
        "val.beton: .*label 7 has no training image",
    ),
    "one class": (((3,), None), ((3,), None), "train.beton: all images have one label"),
    "no label": (
        ((0, 1), None),
        ((0, -1), None),
        "val.beton: an evaluation needs labels, and 6 of 12 images have none",
    ),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_classes_that_differ_are_refused_by_name(tmp_path, case):
    *content, message = MISMATCHES[case]
    with pytest.raises(UserError, match=message):
        shared_classes(*map(read_beton, files(tmp_path, *content)))


def test_that_is_so_wherever_labels_of_two_files_meet(tmp_path):
    *content, message = MISMATCHES["a class is missing, which shifts the others"]
    paths = files(tmp_path, *content)
    with pytest.raises(UserError, match=f"{message}.*; or train without --data.validation"):
        train(options_of(tmp_path))
    assert not (tmp_path / "run").exists()  # before anything was trained or written
    save_run(
        tmp_path / "run",
        *(f"--data.{name}={path}" for name, path in zip(("train", "validation"), paths)),
    )
    with pytest.raises(UserError, match=message):
        freeze(tmp_path / "run", device="cpu")
    with pytest.raises(UserError, match=message):
        raw_pixel_accuracy(options_of(tmp_path))
    (tmp_path / "study.yaml").write_text(
        "data: {{train: {}, validation: {}}}\nruns: {{one: }}".format(*paths)
    )
    with pytest.raises(UserError, match=f"study.yaml: .*{message}"):
        conduct(read_study(tmp_path / "study.yaml", tmp_path / "study", []), tmp_path / "study")
    # Of a version that did not look.
    (tmp_path / "run" / "log.jsonl").write_text('{"epoch": 3, "knn": 0.5}\n')
    (run,) = read_runs([tmp_path / "run"])
    assert re.search(message, run.accuracy_doubt)
    with pytest.raises(UserError, match=message):
        nearest_neighbours(run, run.method)


def test_labels_may_be_any_numbers(tmp_path):
    """Ids too large for a column each, of which some are negative: the same accuracies as of 0, 1,
    2.
    """
    found = {}
    for name, labels in (("ids", IDS), ("dense", (0, 1, 2))):
        folder, run = tmp_path / name, tmp_path / name / "run"
        folder.mkdir()
        paths = files(folder, (labels, None), (labels[1:] + labels[:1], None))
        assert shared_classes(*map(read_beton, paths)).tolist() == list(labels)
        method = save_run(
            run, *(f"--data.{split}={path}" for split, path in zip(("train", "validation"), paths))
        )
        (run / "log.jsonl").write_text('{"epoch": 3, "knn": 0.5}\n')
        frozen = freeze(run, device="cpu")
        (reported,) = read_runs([run])
        embedding, near = (
            embed(reported, reported.method),
            nearest_neighbours(reported, reported.method),
        )
        assert (
            sorted(set(embedding.labels.tolist())) == list(labels)
            and embedding.classes == 3
            and reported.accuracy_doubt is None
        )
        with contextlib.closing(OnlineKnn(options_of(folder), torch.device("cpu"))) as online:
            found[name] = (
                online.accuracies(method.backbone, contextlib.nullcontext()),
                frozen.knn(k=5, temperature=0.1)["scores"],
                [
                    frozen.linear(Recipe(epochs=1, batch_size=12, cached=cached))["scores"]
                    for cached in (False, True)
                ],
                raw_pixel_accuracy(options_of(folder)),
                (near.found_labels == near.query_labels[:, None]).tolist(),
            )
    # Of plain colours the pixels tell.
    assert found["ids"] == found["dense"] and found["ids"][3] == 1


def test_training_images_without_a_label_are_left_out_and_counted(tmp_path, capsys):
    """The bank and the classifier are those of the labelled images alone."""
    labels = np.resize([0, -1, 1], 36)
    write(tmp_path / "train.beton", labels.tolist())
    write(tmp_path / "val.beton", np.resize([0, 1], 12).tolist())
    options, cpu = options_of(tmp_path), torch.device("cpu")
    method = save_run(tmp_path / "other")
    with contextlib.closing(OnlineKnn(options, cpu)) as online:
        bank, found = extract_features(method.backbone, online._bank, cpu, contextlib.nullcontext())
        assert found.tolist() == labels[labels != -1].tolist()
        queries, asked = extract_features(
            method.backbone, online._queries, cpu, contextlib.nullcontext()
        )
        classifier = online_classifier(options, method.backbone, labels, total_steps=3)
        assert classifier.classes.tolist() == [0, 1]
        torch.nn.init.normal_(classifier.layer.weight)
        accuracies = online.accuracies(method.backbone, contextlib.nullcontext(), classifier)
        assert accuracies.keys() == {"knn"}  # it has learned nothing
        classifier.trained = True
        accuracies = online.accuracies(method.backbone, contextlib.nullcontext(), classifier)
    scores = queries.numpy() @ classifier.layer.weight.detach().numpy().T
    right = (scores.argmax(1) == asked.numpy()).mean()
    assert accuracies["linear_top1"] == pytest.approx(right) and "linear_top5" not in accuracies

    train(options)
    assert "24 of 36 training images have a label" in capsys.readouterr().out
    (row,) = [row for row in read_log(tmp_path / "run") if row["epoch"] == 1]
    assert 0 <= row["linear_top1"] <= 1 and "linear_top5" not in row
    assert read_runs([tmp_path / "run"])[0].accuracy_doubt is None


def test_labels_of_another_field_are_found_or_the_fields_are_named(tmp_path, capsys):
    for split, count in (("train", 36), ("val", 12)):
        write(tmp_path / f"{split}.beton", np.resize([0, 1, 2], count).tolist(), field=b"taxon")
    train(options_of(tmp_path))
    assert "labels for the kNN: the field 'taxon'" in capsys.readouterr().out
    with pytest.raises(
        UserError,
        match="train.beton: the field of labels, 'class', is not in it; its fields: 'taxon' .int.",
    ):
        OnlineKnn(options_of(tmp_path, "--data.label_field=class"), torch.device("cpu"))
    with pytest.raises(UserError, match="train.beton: the field of labels, 'class'"):
        freeze(tmp_path / "run", device="cpu", label_field="class")
    assert (
        freeze(tmp_path / "run", device="cpu", label_field="taxon").knn(k=3, temperature=0.1)[
            "scores"
        ]["top1"]
        >= 0
    )
