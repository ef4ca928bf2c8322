"""Linear probe: a linear classifier on frozen features, trained as in the paper's section B."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from ffssl.data.loader import ViewLoader
from ffssl.data.order import epoch_order
from ffssl.data.policy import EVALUATION
from ffssl.errors import UserError
from ffssl.evaluate.features import frozen_features, labelled_images
from ffssl.parallel.device import send
from ffssl.run_folder import checkpoint
from ffssl.schedules import cosine
from ffssl.training.optimizers import build_optimizer, set_learning_rate_and_momentum

# Torchvision's for supervised training.
AUGMENTATION = replace(EVALUATION, centre_crop=0.0, crop_scale=(0.08, 1.0), flip=0.5)
MOMENTUM = 0.9

# From an epoch to its batches of features (B, d) and labels (B,).
Batches = Callable[[int], Iterable[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Recipe:
    """How a probe is trained: LARS, a learning rate of 0.8 that falls by a cosine.

    There is no weight decay. This is section B, and SimSiam's authors where section B is silent.

    cached: train on features of centre crops, computed once, instead of random crops. seed: of the
    weights and the order.
    """

    epochs: int = 90
    learning_rate: float = 0.8
    batch_size: int = 2048
    cached: bool = False
    seed: int = 0

    @property
    def training(self) -> str:
        """What the classifier is trained on, in words."""
        return "on cached features: no augmentation" if self.cached else "on random crops and flips"


def usual_batch_size(images: int) -> int:
    """Return section B's batch size, 2048, or less for a small training set.

    2048 is for ImageNet. A classifier needs steps too: at least 64 an epoch.
    """
    return max(min(2048, images // 64), 1)


def augmented_batches(
    backbone: nn.Module, loader: ViewLoader, device: torch.device, amp: torch.autocast
) -> Batches:
    """Return features of the loader's views, computed anew in every epoch.

    `backbone` must be in evaluation mode.
    """

    def of_epoch(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        loader.set_epoch(epoch)
        for images, labels in labelled_images(loader, device):
            yield frozen_features(backbone, images, amp), labels

    return of_epoch


def cached_batches(features: Tensor, labels: Tensor, recipe: Recipe) -> Batches:
    """Return the same features (N, d) in every epoch, in another order, without augmentation."""

    def of_epoch(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.from_numpy(epoch_order(len(features), seed=recipe.seed, epoch=epoch)).to(
            features.device
        )
        for indices in order.split(recipe.batch_size):
            yield features[indices], labels[indices]

    return of_epoch


def train_probe(
    batches: Batches,
    recipe: Recipe,
    *,
    images: int,
    features: int,
    classes: int,
    device: torch.device,
    folder: Path,
    name: str,
) -> nn.Linear:
    """Train a classifier of features on `device`, and return it.

    It continues from the checkpoint `name` in `folder`, which is replaced after every epoch. The
    caller must give each experiment a name of its own. Raise UserError if the loss diverges.
    """
    classifier = nn.Linear(features, classes)
    nn.init.normal_(
        classifier.weight, std=0.01, generator=torch.Generator().manual_seed(recipe.seed)
    )
    nn.init.zeros_(classifier.bias)
    classifier.to(device)
    groups = [{"params": list(classifier.parameters()), "weight_decay": 0.0}]
    optimizer = build_optimizer(
        "lars", groups, weight_decay=0.0, decay_norm_and_bias=None, momentum=MOMENTUM
    )
    steps, done = math.ceil(images / recipe.batch_size), 0
    if state := checkpoint.load(folder, device, name):
        classifier.load_state_dict(state["classifier"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["epoch"]
        print(f"linear probe {recipe.training}: continued after epoch {done}", flush=True)
    for epoch in range(done, recipe.epochs):
        losses = []
        for step, (inputs, labels) in enumerate(batches(epoch), epoch * steps):
            learning_rate = cosine(step, total=recipe.epochs * steps, peak=recipe.learning_rate)
            set_learning_rate_and_momentum(
                optimizer, learning_rate, MOMENTUM, peak=recipe.learning_rate
            )
            loss = F.cross_entropy(classifier(send(inputs, device)), send(labels, device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        loss = torch.stack(losses).mean().item()
        if not math.isfinite(loss):
            raise UserError(
                f"the probe's loss is not finite in epoch {epoch + 1}; choose a "
                f"--learning-rate below {recipe.learning_rate:g}"
            )
        state = {
            "epoch": epoch + 1,
            "recipe": asdict(recipe),
            "classifier": classifier.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        checkpoint.save(folder, state, name)
        print(
            f"linear probe {recipe.training}: epoch {epoch + 1}/{recipe.epochs}, loss {loss:.3f}",
            flush=True,
        )
    return classifier


@torch.no_grad()
def top_accuracies(
    classifier: nn.Linear, features: Tensor, labels: Tensor, batch_size: int = 2048
) -> dict[str, float | None]:
    """Return the top-1 and top-5 accuracy (0..1) of a classifier on features (N, d).

    top-5 is None if there are at most five classes.
    """
    device, classes = classifier.weight.device, classifier.out_features
    # Not over the ranks: while a run trains, rank 0 evaluates alone.
    settings = {"average": "micro", "sync_on_compute": False}
    metrics = {
        f"top{k}": MulticlassAccuracy(classes, top_k=k, **settings).to(device)
        for k in (1, 5)
        if k < classes
    }
    for inputs, targets in zip(features.split(batch_size), labels.split(batch_size)):
        logits, targets = classifier(send(inputs, device)), send(targets, device)
        for metric in metrics.values():
            metric.update(logits, targets)
    return {"top1": None, "top5": None} | {
        name: metric.compute().item() for name, metric in metrics.items()
    }
