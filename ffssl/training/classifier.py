"""A linear classifier of the backbone's features, trained beside the method.

It serves to watch a run: it sends no gradient to the backbone and draws no random numbers, so the
method's weights are the same with it and without.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, skip_init, vector_to_parameters

from ffssl.config import Options
from ffssl.data.beton.read import UNLABELLED
from ffssl.parallel.device import send
from ffssl.parallel.ranks import mean_over_ranks
from ffssl.schedules import cosine
from ffssl.training.optimizers import (
    build_optimizer,
    restore_optimizer,
    set_learning_rate_and_momentum,
)

MOMENTUM = 0.9
USUAL_BATCH = 256  # images a step, for which the learning rate is given


class OnlineClassifier:
    """Learn to classify the features that a backbone computes in its training steps.

    The recipe is that of lightly's linear evaluation, after SimCLR's: SGD with a momentum of 0.9
    and no weight decay, cross entropy, and a learning rate that is in proportion to the batch and
    falls to 0 by a cosine. The weights begin at 0. With several ranks all have the same classifier,
    which learns from the joint batch.

    backbone: returns features (N, features). Those of passes with gradient are kept, detached.
    classes: int64 (C,), the labels that occur, each once, ascending, without UNLABELLED.
    learning_rate: at the start, for a batch of 256 images.
    batch_size: images of all ranks in a step.
    total_steps: of the run.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: Tensor,
        *,
        learning_rate: float,
        batch_size: int,
        total_steps: int,
        device: torch.device,
    ):
        self.classes, self.trained = classes, False
        self._peak, self._total_steps = learning_rate * batch_size / USUAL_BATCH, total_steps
        # Without torch's random weights, which would move the run's random numbers.
        self.layer = skip_init(nn.Linear, backbone.features, len(classes), device=device)
        for parameter in self.layer.parameters():
            nn.init.zeros_(parameter)
        groups = [{"params": list(self.layer.parameters()), "weight_decay": 0.0}]
        self._optimizer = build_optimizer(
            "sgd", groups, weight_decay=0.0, decay_norm_and_bias=None, momentum=MOMENTUM
        )
        self._images = torch.zeros(1, device=device)  # with a label, in the step under way
        self._features: list[Tensor] = []
        backbone.register_forward_hook(self._keep)

    def _keep(self, backbone: nn.Module, images: tuple[Tensor], features: Tensor) -> None:
        # The selection pass, the gauges and the evaluations have no gradient.
        if torch.is_grad_enabled():
            self._features.append(features.detach())

    def targets(self, labels: Tensor) -> Tensor:
        """Return the indices of labels int64 (B,) among the classes, on the classifier's device.

        UNLABELLED stays as it is.
        """
        indices = torch.searchsorted(self.classes, labels)
        indices[labels == UNLABELLED] = UNLABELLED
        return send(indices, self.layer.weight.device)

    def add_gradients(self, targets: Tensor) -> None:
        """Add the gradient of the features kept since the last call.

        targets: int64 (n,), those of the n images whose pairs of views have passed the backbone,
        the first views in the images' order, then the second ones. Local views pass it after them,
        and do not count.
        """
        features = torch.cat(self._features).float()
        self._features.clear()
        targets = targets.repeat(min(2, len(features) // len(targets)))
        features = features[: len(targets)]
        logits = self.layer(features)
        F.cross_entropy(logits, targets, ignore_index=UNLABELLED, reduction="sum").backward()
        self._images += (targets != UNLABELLED).sum()

    def step(self, step: int) -> None:
        """Take an optimiser step along the mean of the added gradients, over all ranks.

        Called by all ranks. Images without a label do not count.

        step: counted from the start of the run.
        """
        gradients = [parameter.grad for parameter in self.layer.parameters()]
        sums = mean_over_ranks(parameters_to_vector([*gradients, self._images]))
        # Features that are not finite, of a step that fp16's scaler skips, would ruin the weights
        # for good. Where no image has a label, 0 / 0 stands for no gradient.
        means = (sums[:-1] / sums[-1]).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        vector_to_parameters(means, gradients)
        learning_rate = cosine(step, total=self._total_steps, peak=self._peak)
        set_learning_rate_and_momentum(self._optimizer, learning_rate, MOMENTUM, peak=self._peak)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._images.zero_()
        self.trained = True

    def state(self) -> dict:
        return {
            "classes": self.classes,
            "trained": self.trained,
            "layer": self.layer.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def restore(self, state: dict | None) -> None:
        """Continue from a state, saved on any device.

        Without one, or with one of other classes, it begins anew.
        """
        if state is not None and torch.equal(state["classes"].cpu(), self.classes):
            self.trained = state["trained"]
            self.layer.load_state_dict(state["layer"])
            restore_optimizer(self._optimizer, state["optimizer"])


def online_classifier(
    options: Options, backbone: nn.Module, labels: np.ndarray | None, *, total_steps: int
) -> OnlineClassifier | None:
    """Return the classifier of a run, or None if it has none.

    labels: int64 (N,), of the training images.
    """
    learning_rate = options.evaluate.linear_learning_rate
    if not options.data.validation or not learning_rate or labels is None:
        return None
    return OnlineClassifier(
        backbone,
        torch.from_numpy(np.unique(labels[labels != UNLABELLED])),
        learning_rate=learning_rate,
        batch_size=options.training.batch_size,
        total_steps=total_steps,
        device=next(backbone.parameters()).device,
    )
