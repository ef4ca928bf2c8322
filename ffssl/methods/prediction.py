"""What SimSiam, BYOL, MoCo and DINO have in common: a view's prediction is compared with another
view's target, image by image.
"""

import torch
from torch import Tensor

from ffssl.methods.base import Method


class PredictionMethod(Method):
    """A subclass gives `project`, `predict` and `distances`, and `targets` if they are not its own
    projections.
    """

    # Of the first view's prediction and of the second's: 0.5 averages the two, 1 adds them.
    direction_weight = 0.5

    def predict(self, projections: Tensor) -> Tensor:
        """Predictions (N, d') from projections (N, d)."""
        raise NotImplementedError

    def distances(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Loss of each prediction of an image against each target of it: (N, m, n) from (N, m, d')
        and (N, n, d'). Changes no state.
        """
        raise NotImplementedError

    def remember(self, targets: Tensor) -> None:
        """Called after the loss with the pair's targets (N, 2, d'), for a queue or a centre of
        them.
        """

    def loss(
        self, first: Tensor, second: Tensor, extra_targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As in Method. extra_targets: (N, n, d') of further views of each image, without gradient.

        Each view's prediction is compared with all targets but its own, and the loss averaged over
        them.
        """
        batches = self.batches(first, second)
        projections = [self.project(images) for images in batches]
        predictions = _by_image([self.predict(z) for z in projections])
        pair = _by_image([self.targets(images, z) for images, z in zip(batches, projections)])
        distances = self.distances(
            predictions, pair if extra_targets is None else torch.cat([pair, extra_targets], dim=1)
        )
        others = torch.cat([distances[:, 0, 1:], distances[:, 1, :1], distances[:, 1, 2:]], dim=1)
        self.remember(pair)
        return 2 * self.direction_weight * others.mean(), projections[0][: len(first)]

    def pair_losses(self, projections: Tensor, targets: Tensor) -> Tensor:
        predictions = self.predict(projections.flatten(0, 1)).unflatten(0, projections.shape[:2])
        distances = self.distances(predictions, targets)
        return self.direction_weight * (distances + distances.mT)


def _by_image(batches: list[Tensor]) -> Tensor:
    """(N, 2, d) of both views, from (2N, d) or twice (N, d)."""
    return torch.cat(batches).unflatten(0, (2, -1)).transpose(0, 1)
