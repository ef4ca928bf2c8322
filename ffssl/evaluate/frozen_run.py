"""Measure a run's frozen backbone: its kNN accuracy and its linear probe."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from ffssl.backbones import check_resolutions
from ffssl.config import Options
from ffssl.data.beton.description import read_description
from ffssl.data.beton.files import file_names
from ffssl.data.beton.several import read_betons
from ffssl.errors import UserError
from ffssl.evaluate.features import extract_features, open_views
from ffssl.evaluate.knn import knn_accuracy
from ffssl.evaluate.labels import shared_classes
from ffssl.evaluate.linear import (
    AUGMENTATION,
    Batches,
    Recipe,
    augmented_batches,
    cached_batches,
    top_accuracies,
    train_probe,
)
from ffssl.load import backbone_of, checkpoint_path, fingerprint, load_run
from ffssl.parallel.device import choose_device, mixed_precision
from ffssl.run_folder.machine import describe_machine

HOST = torch.device("cpu")
PACKAGES = ("ffssl", "torch", "torchvision", "timm", "torchmetrics", "ffcv")


@dataclass(frozen=True)
class FrozenRun:
    """A run's frozen backbone, and the labelled images to judge it by.

    The backbone is in evaluation mode and has no gradient. classes: int64, the labels that occur,
    each once, ascending.
    """

    checkpoint: Path
    options: Options
    epoch: int
    steps: int
    network: str
    backbone: nn.Module
    train: Path
    validation: Path
    classes: Tensor
    resolution: int
    device: torch.device
    amp: torch.autocast

    @cached_property
    def images(self) -> int:
        """The number of training images."""
        return len(read_betons(self.train))

    def knn(self, *, k: int, temperature: float) -> dict:
        """Return the accuracy of the weighted kNN vote of all training images.

        The result is a record, see `ffssl.evaluate.results`. k is cut to the number of training
        images.
        """
        bank, bank_labels = self.centre_crops(
            self.train, unit_length=True, broken=self.options.data.broken
        )
        queries, labels = self.centre_crops(self.validation, unit_length=True)
        k = min(k, len(bank))
        accuracy = knn_accuracy(
            bank, bank_labels, queries, labels, k=k, temperature=temperature, device=self.device
        )
        return self.record("knn", {"k": k, "temperature": temperature}, {"top1": accuracy})

    def linear(self, recipe: Recipe) -> dict:
        """Return the accuracy of a linear probe: a record, see `ffssl.evaluate.results`.

        The probe's own checkpoint lies beside the run's. Its name holds a hash of all that decides
        the result.
        """
        record = self.record("linear", asdict(recipe) | {"training": recipe.training}, {})
        decisive = {name: value for name, value in record.items() if name != "machine"}
        name = f"linear-{hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:8]}.pt"
        sizes = {
            "images": self.images,
            "features": self.backbone.features,
            "classes": len(self.classes),
        }
        common = {**sizes, "device": self.device, "folder": self.checkpoint.parent, "name": name}
        if recipe.cached:
            cached = self.centre_crops(self.train, broken=self.options.data.broken)
            classifier = train_probe(
                self._numbered(cached_batches(*cached, recipe)), recipe, **common
            )
        else:
            settings = {
                "policy": AUGMENTATION,
                "batch_size": recipe.batch_size,
                "shuffle": True,
                "seed": recipe.seed,
                "broken": self.options.data.broken,
            }
            with open_views(self.train, self.options.data, self.resolution, **settings) as loader:
                batches = augmented_batches(self.backbone, loader, self.device, self.amp)
                classifier = train_probe(self._numbered(batches), recipe, **common)
        features, labels = self.centre_crops(self.validation)
        return record | {
            "scores": top_accuracies(
                classifier, features, torch.searchsorted(self.classes, labels)
            ),
            "probe": name,
        }

    def _numbered(self, batches: Batches) -> Batches:
        """Replace each label, which may be any number, by its index among the classes."""
        return lambda epoch: (
            (features, torch.searchsorted(self.classes, labels))
            for features, labels in batches(epoch)
        )

    def centre_crops(
        self, path: Path, *, unit_length: bool = False, broken: str = "stop"
    ) -> tuple[Tensor, Tensor]:
        """Return features (N, d) and labels (N,) of a file's centre crops, in the host's memory.

        See `extract_features`, and `ViewLoader` for `broken`.
        """
        with open_views(path, self.options.data, self.resolution, broken=broken) as loader:
            return extract_features(
                self.backbone, loader, self.device, self.amp, store=HOST, unit_length=unit_length
            )

    def record(self, evaluation: str, settings: dict, scores: dict) -> dict:
        data = {"train": self.train, "validation": self.validation}
        label_field = self.options.data.label_field
        return {
            "evaluation": evaluation,
            "checkpoint": self.checkpoint.name,
            "epoch": self.epoch,
            "steps": self.steps,
            "network": self.network,
            "weights": fingerprint(self.backbone),
            "settings": settings
            | {
                "resolution": self.resolution,
                "classes": len(self.classes),
                "precision": precision(self.amp, self.device),
            },
            "data": {name: describe(path, label_field) for name, path in data.items()},
            "machine": describe_machine(PACKAGES),
            "scores": scores,
        }


def freeze(
    run: Path,
    *,
    network: str = "student",
    train: Path | None = None,
    validation: Path | None = None,
    label_field: str | None = None,
    resolution: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    amp: str = "auto",
) -> FrozenRun:
    """Load a run, from its folder or a checkpoint, ready to be evaluated.

    Arguments left out are as the run had them: files, resolution, workers.

    Raise UserError if the run can't be loaded, if images have no labels, or if the files have
    different classes, see `shared_classes`.
    """
    place = choose_device(device, "--device")
    autocast, _ = mixed_precision(amp, place, "--amp")
    path = checkpoint_path(run)
    loaded = load_run(path)
    options = loaded.options
    if not validation and not options.data.validation:
        raise UserError(
            f"{path}: the run had no validation images; name a beton file with --validation"
        )
    train = Path(train or options.data.train)
    validation = Path(validation or options.data.validation)
    changed = {"label_field": label_field, "workers": workers}
    options = options.changed(data={k: v for k, v in changed.items() if v is not None})
    classes = torch.from_numpy(
        shared_classes(
            *(read_betons(path, options.data.label_field) for path in (train, validation)),
            "--label-field",
        )
    )
    backbone = backbone_of(loaded.method, network).requires_grad_(False).eval()
    resolution = resolution or options.resolution.max
    check_resolutions(options.model.backbone, backbone, {resolution: "--resolution"})
    return FrozenRun(
        path,
        options,
        loaded.state["epoch"],
        loaded.steps,
        network,
        backbone.to(place, memory_format=torch.channels_last),
        train,
        validation,
        classes,
        resolution,
        place,
        autocast,
    )


def precision(amp: torch.autocast, device: torch.device) -> str:
    """Return the name of the type in which a backbone computes under `amp`."""
    with amp:
        return (
            str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")
            if torch.is_autocast_enabled(device.type)
            else "float32"
        )


def describe(path: Path, label_field: str | None = None) -> dict:
    """Return the name of a beton file or of several, the number of images, and a digest.

    The digest tells the files from others of their names. It covers the labels, the images' sizes
    and the checksum in the description. Without a description, other raw images of the same sizes
    have the same digest.
    """
    beton = read_betons(path, label_field)
    checksum = (read_description(path) or {}).get("sha256", "")
    digest = hashlib.sha256(
        beton.labels.tobytes() + beton.image_sizes.tobytes() + checksum.encode()
    ).hexdigest()
    return {"file": file_names(path), "images": len(beton), "digest": digest[:16]}
