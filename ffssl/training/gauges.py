"""What a run monitors besides its loss. Nothing here needs labels.

hardness: the loss of the chosen pairs minus the loss of random pairs of the same images, at the
    training resolution. It is negative only if the selection is upside down.
predictor_cosine: the cosine between a view's projection and its prediction, for methods with a
    predictor. It is near 1 in a healthy run. A predictor that only ever sees opposite views learns
    to reverse projections, and the cosine goes to -1.
effective_rank: how many dimensions the embeddings use (RankMe: Garrido et al., ICML 2023).
"""

import math

import torch
from torch import Tensor

from ffssl.data.normalise import to_input
from ffssl.hard_augment import Selection, compare_by, draw_pairs, take_pair, without_trace
from ffssl.methods.base import Method, cosines
from ffssl.methods.prediction import PredictionMethod

# A measurement costs at most half a step: all together cost less than 1 %.
STEPS_BETWEEN = 64
# Embeddings from the last steps of an epoch, for the effective rank.
EMBEDDINGS = 1024


def is_due(step: int, steps_per_epoch: int) -> bool:
    """Return whether to measure at a step of an epoch.

    It is due once in STEPS_BETWEEN steps, and at least once an epoch.
    """
    return step % STEPS_BETWEEN == min(STEPS_BETWEEN, steps_per_epoch) // 2


def hardness(
    method: Method, views: Tensor, chosen: tuple[Tensor, Tensor], selection: Selection, seed: int
) -> tuple[Tensor, Tensor]:
    """Measure how much harder the chosen pairs are than random pairs.

    views: uint8 (B, m, 3, R, R).
    chosen: the chosen views, normalised, each (B, 3, R, R).
    seed: seed of the random pairs.

    Return the mean difference of the losses over half of the images, and the variance of that mean.
    The loss is the method's, or the negative cosine if the method has no loss of single images. No
    state changes.
    """
    images = max(len(views) // 2, 2)
    drawn, _ = draw_pairs(views, selection, seed)
    others = (to_input(view[:images], chosen[0].dtype) for view in take_pair(views, drawn))
    four = torch.stack([*(view[:images] for view in chosen), *others], dim=1)
    loss = "method" if method.has_pair_losses else "cosine"
    # In eager mode: torch.compile would compile once more for this shape.
    with without_trace(method, views.device), torch.compiler.set_stance("force_eager"):
        losses, _, _ = compare_by(method, four.flatten(0, 1), four.shape[:2], loss)
    difference = losses[:, 0, 1] - losses[:, 2, 3]
    return difference.mean(), difference.var() / images


def predictor_cosine(method: Method, projections: Tensor) -> Tensor | None:
    """Return the mean cosine of projections (N, d) and their predictions.

    Return None for a method without a predictor.
    """
    if not (isinstance(method, PredictionMethod) and hasattr(method, "predictor")):
        return None
    with without_trace(method, projections.device), torch.compiler.set_stance("force_eager"):
        predictions = method.predict(projections)
        return cosines(predictions[:, None], projections[:, None]).mean()


def effective_rank(embeddings: Tensor) -> float:
    """RankMe (eq. 1) of embeddings (N, d).

    It is the exponential of the entropy of the singular values, and NaN if a value is not finite.
    """
    z = embeddings.double()
    # On the host: for so small a matrix a GPU is not faster, and would load cuSOLVER for it.
    products = (z @ z.T if len(z) < z.shape[1] else z.T @ z).cpu()
    if not products.isfinite().all():
        return math.nan
    squares = torch.linalg.eigvalsh(products)
    singular = squares.clamp(min=0).sqrt()
    shares = singular / singular.sum()
    return torch.special.entr(shares).sum().exp().item()
