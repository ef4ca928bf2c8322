"""What a run watches besides its loss, none of which needs labels.

hardness: the loss of the chosen pairs minus that of random pairs of the same images, at the
resolution that is trained. It is positive unless the selection is upside down.
predictor_cosine: of a view's projection and its prediction, for methods with a predictor. Near 1 in
a healthy run; a predictor that only ever sees opposite views learns to turn projections round, and
goes to -1.
effective_rank: how many dimensions the embeddings use (RankMe: Garrido et al., ICML 2023).
"""

import torch
from torch import Tensor

from ffssl.data.normalise import to_input
from ffssl.hard_augment import (
    Selection,
    compare,
    random_choice,
    take_pair,
    without_trace,
)
from ffssl.methods.base import Method, cosines

STEPS_BETWEEN = 64  # a measurement costs at most half a step, so that all cost less than 1 %
EMBEDDINGS = 1024  # of the last steps of an epoch, for the effective rank


def is_due(step: int, steps_per_epoch: int) -> bool:
    """Whether to measure at a step of an epoch: once in STEPS_BETWEEN, at least once an epoch."""
    return step % STEPS_BETWEEN == min(STEPS_BETWEEN, steps_per_epoch) // 2


def hardness(
    method: Method, views: Tensor, chosen: tuple[Tensor, Tensor], selection: Selection, seed: int
) -> tuple[Tensor, Tensor]:
    """How much harder the chosen pairs are than random ones of uint8 views (B, m, 3, R, R).

    chosen: normalised, each (B, 3, R, R). seed: of the random pairs. Returns the mean difference of
    the method's losses (of the cosines, if it has no loss of single images) over half of the
    images, and the variance of that mean. Changes nothing.
    """
    images = max(len(views) // 2, 2)
    drawn, _ = random_choice(views, selection, seed)
    others = (to_input(view[:images], chosen[0].dtype) for view in take_pair(views, drawn))
    four = torch.stack([*(view[:images] for view in chosen), *others], dim=1)
    loss = "method" if method.has_pair_losses else "cosine"
    # Eagerly: compiled code would be made anew for this shape.
    with without_trace(method, views.device), torch.compiler.set_stance("force_eager"):
        losses, _, _ = compare(method, four.flatten(0, 1), four.shape[:2], loss)
    difference = losses[:, 0, 1] - losses[:, 2, 3]
    return difference.mean(), difference.var() / images


def predictor_cosine(method: Method, projections: Tensor) -> Tensor | None:
    """Mean cosine of projections (N, d) and their predictions; None without a predictor."""
    if not hasattr(method, "predictor"):
        return None
    with without_trace(method, projections.device), torch.compiler.set_stance("force_eager"):
        predictions = method.predict(projections)
        return cosines(predictions[:, None], projections[:, None]).mean()


def effective_rank(embeddings: Tensor) -> float:
    """RankMe, eq. 1: the exponential of the entropy of the singular values of embeddings (N, d)."""
    z = embeddings.double()
    squares = torch.linalg.eigvalsh(z @ z.T if len(z) < z.shape[1] else z.T @ z)
    singular = squares.clamp(min=0).sqrt()
    shares = singular / singular.sum()
    return torch.special.entr(shares).sum().exp().item()
