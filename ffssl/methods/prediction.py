"""The common part of SimSiam, BYOL, MoCo and DINO.

For each image they compare the prediction of one view with the target of another view.
"""

import torch
from torch import Tensor

from ffssl.methods.base import Method


class PredictionMethod(Method):
    """A method that predicts the target of one view from another view of the same image.

    A subclass defines `project`, `predict` and `distances`, and also `targets` if the targets are
    not its own projections.
    """

    takes_local_views = True
    # Weight of each view's prediction in the loss: 0.5 averages the two, 1 adds them.
    direction_weight = 0.5

    def predict(self, projections: Tensor) -> Tensor:
        """Return predictions (N, d') from projections (N, d)."""
        raise NotImplementedError

    def distances(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each prediction of an image against each target of it: (N, m, n).

        predictions: (N, m, d').
        targets: (N, n, d').

        Changes no state.
        """
        raise NotImplementedError

    def remember(self, targets: Tensor) -> None:
        """Store the pair's targets (N, 2, d') in a queue or a centre. Called after the loss."""

    def loss(
        self,
        first: Tensor,
        second: Tensor,
        extra_targets: Tensor | None = None,
        local: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the first views' projections, as in Method.

        extra_targets: (N, n, d'), targets of further views of each image, without gradient.
        local: normalised local views (N, n, 3, r, r). They predict targets and are none. They pass
            through the networks as one batch (SwAV, section 3.2, and its official code).

        Each view's prediction is compared with all targets but its own. The loss is the mean.
        """
        batches = self.batches(first, second)
        projections = [self.project(images) for images in batches]
        predictions = _by_image([self.predict(z) for z in projections])
        pair = _by_image([self.targets(images, z) for images, z in zip(batches, projections)])
        targets = pair if extra_targets is None else torch.cat([pair, extra_targets], dim=1)
        distances = self.distances(predictions, targets)
        # Target 0 is prediction 0's own, and target 1 is prediction 1's: leave these two out.
        others = [distances[:, 0, 1:], distances[:, 1, :1], distances[:, 1, 2:]]
        if local is not None:
            predicted = self.predict(self.project(local.flatten(0, 1)))
            distances = self.distances(predicted.unflatten(0, local.shape[:2]), targets)
            others.append(distances.flatten(1))
        self.remember(pair)
        loss = 2 * self.direction_weight * torch.cat(others, dim=1).mean()
        return loss, projections[0][: len(first)]

    def pair_losses(self, projections: Tensor, targets: Tensor) -> Tensor:
        return self.both_ways(self.predictions(projections), targets)

    def predictions(self, projections: Tensor) -> Tensor:
        """Return the predictions (N, m, d') of projections (N, m, d)."""
        return self.predict(projections.flatten(0, 1)).unflatten(0, projections.shape[:2])

    def both_ways(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the losses of all pairs, (N, m, m), of predictions and targets, (N, m, d')."""
        distances = self.distances(predictions, targets)
        return self.direction_weight * (distances + distances.mT)


def _by_image(batches: list[Tensor]) -> Tensor:
    """Return (N, 2, d) of both views, from one batch (2N, d) or two (N, d)."""
    return torch.cat(batches).unflatten(0, (2, -1)).transpose(0, 1)
