"""View policies: which random views of an image are rendered."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ffssl.data.kernels.draw import MOST_OPERATIONS, POLICY_COLUMNS
from ffssl.data.kernels.layout import layout_of_size
from ffssl.data.kernels.rand_augment import MOST_MAGNITUDE
from ffssl.errors import UserError

STANDARD_MAGNITUDE = 5.0

JITTER_FORMS = ("torchvision", "affine")
INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class ViewPolicy:
    """The distribution of one view.

    Torchvision's operations are applied in this order: RandomResizedCrop, flip, ColorJitter, grey,
    GaussianBlur, solarise, RandAugment. The defaults are SimSiam's and MoCo v2's.

    centre_crop: if above 0, the crop is not random: the largest centred square, reduced to this
        fraction of its side.
    crop_scale, crop_ratio: ranges of the crop's share of the image's area, and of width / height.
    flip, jitter, grey, blur, solarise: probabilities.
    brightness, contrast, saturation, hue: torchvision's ranges at the standard magnitude, 5. They
        scale linearly with the magnitude.
    blur_sigma: range, in pixels of the rendered view.
    blur_side: side in pixels of the view that blur_sigma is meant for. The sigmas of a smaller view
        are smaller in proportion. 0: they are the same for every view.
    jitter_form: "torchvision" (its four steps in random order, clipped after each) or "affine" (one
        colour matrix a view, cheaper; `operations.colour_matrix` says what differs).
    rand_augment: number of RandAugment's operations. Their magnitude is the run's, clipped to
        0..30.
    interpolation: filter by which crops are resized: "bilinear", or "bicubic", which takes more
        time. Both are antialiased.

    Raises UserError for values out of range.
    """

    centre_crop: float = 0.0
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grey: float = 0.2
    blur: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_side: int = 0
    solarise: float = 0.0
    jitter_form: str = "torchvision"
    rand_augment: int = 0
    interpolation: str = "bilinear"

    def __post_init__(self):
        for name in ("flip", "jitter", "grey", "blur", "solarise", "centre_crop"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"view policy: {name} is {getattr(self, name)}, must lie in 0..1")
        for name in ("brightness", "contrast", "saturation", "hue"):
            most = 0.5 if name == "hue" else math.inf
            if not 0 <= getattr(self, name) <= most:
                raise UserError(
                    f"view policy: {name} is {getattr(self, name)}, must lie in 0..{most:g}"
                )
        for name in ("crop_scale", "crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise UserError(
                    f"view policy: {name} is ({low}, {high}), must be two positive numbers, "
                    "the smaller first"
                )
        if self.crop_scale[1] > 1:
            raise UserError(
                f"view policy: crop_scale goes up to {self.crop_scale[1]}, must not exceed 1"
            )
        if self.blur_side < 0:
            raise UserError(f"view policy: blur_side is {self.blur_side}, must be at least 0")
        self._require_one_of("jitter_form", JITTER_FORMS)
        self._require_one_of("interpolation", INTERPOLATIONS)
        if self.rand_augment not in range(MOST_OPERATIONS + 1):
            raise UserError(
                f"view policy: rand_augment is {self.rand_augment}, "
                f"must be a whole number of operations, 0..{MOST_OPERATIONS}"
            )

    def _require_one_of(self, name: str, known: tuple[str, ...]) -> None:
        if getattr(self, name) not in known:
            raise UserError(
                f"view policy: {name} is {getattr(self, name)!r}, must be one of {', '.join(known)}"
            )

    def row(self, magnitude: float = STANDARD_MAGNITUDE, side: int | None = None) -> np.ndarray:
        """Return the policy at a magnitude as kernels read it: float64 (POLICY_COLUMNS,).

        side: of the view, in pixels; `blur_side` by default.
        """
        strength = magnitude / STANDARD_MAGNITUDE
        blur_scale = side / self.blur_side if side and self.blur_side else 1.0
        return np.array(
            [
                self.centre_crop,
                *self.crop_scale,
                math.log(self.crop_ratio[0]),
                math.log(self.crop_ratio[1]),
                self.flip,
                self.jitter,
                self.brightness * strength,
                self.contrast * strength,
                self.saturation * strength,
                min(self.hue * strength, 0.5),
                self.grey,
                self.blur,
                *(sigma * blur_scale for sigma in self.blur_sigma),
                self.solarise,
                self.jitter_form == "affine",
                self.rand_augment,
                min(max(magnitude, 0), MOST_MAGNITUDE),
                self.interpolation == "bicubic",
            ]
        )


EVALUATION = ViewPolicy(centre_crop=224 / 256, flip=0, jitter=0, grey=0, blur=0)
_SIMSIAM = ViewPolicy()
_BYOL = replace(_SIMSIAM, crop_scale=(0.08, 1.0), saturation=0.2)

# One policy a view. If there are more views than policies, the views take them in turn.
POLICIES = {
    "simsiam": (_SIMSIAM,),
    "simclr": (
        replace(
            _SIMSIAM, crop_scale=(0.08, 1.0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2
        ),
    ),
    "byol": (replace(_BYOL, blur=1.0), replace(_BYOL, blur=0.1, solarise=0.2)),
    "randaugment": (replace(_SIMSIAM, jitter=0, grey=0, blur=0, rand_augment=2),),
    "evaluation": (EVALUATION,),
}


LOCAL_CROP_SCALE_MIN = 0.05  # SwAV's and DINO's


def choose_policies(
    name: str, *, crop_scale_min: float | None = None, **changes
) -> tuple[ViewPolicy, ...]:
    """Return the policies called `name`, with some fields changed.

    crop_scale_min: the smallest crop scale; the largest becomes 1.
    changes: new values of fields; None leaves a field as it is.

    Raises UserError for an unknown name.
    """
    if name not in POLICIES:
        raise UserError(f"augment.policy: unknown policy {name!r}; known are {', '.join(POLICIES)}")
    if crop_scale_min is not None:
        changes["crop_scale"] = (crop_scale_min, 1.0)
    changes = {field: value for field, value in changes.items() if value is not None}
    return tuple(replace(policy, **changes) for policy in POLICIES[name])


def local_policy(policy: ViewPolicy, crop_scale_max: float) -> ViewPolicy:
    """Return the policy of multi-crop's local views beside global ones of `policy`.

    They show small parts of an image, from 5 % of its area to `crop_scale_max`. At most half of
    them are blurred, and none is solarised (SwAV and DINO, the official code of both).
    """
    crop_scale = (min(LOCAL_CROP_SCALE_MIN, crop_scale_max), crop_scale_max)
    return replace(policy, crop_scale=crop_scale, blur=min(policy.blur, 0.5), solarise=0.0)


class Size(NamedTuple):
    """The views of one size.

    first: number of the first of them among all views of an image.
    views: how many.
    side: in pixels.
    """

    first: int
    views: int
    side: int


class ViewSettings:
    """What to render of each image.

    views: views of each image, at most. For views of several sizes, a sequence: how many of each
        size.
    resolution: side of a view, in pixels. For several sizes a sequence of sides.
    policy: one for all views, or several, which the views take in turn. For several sizes one for
        all, or a sequence with such an entry for each size.
    seed: all random numbers follow from it, the epoch, the sample and the view.
    scaled_decoding: decode a JPEG that is large beside its views at 1/2, 1/4 or 1/8 of its size,
        see `choose_denominator`.

    Views are numbered through all sizes. A view keeps its number where fewer views are served.

    `set_epoch` changes epoch, resolution, magnitude and number of views without recompiling. The
    compiled code reads two of them from arrays whose addresses never change: `counters` (int64:
    seed, epoch) and `policy_rows` (float64 (views, POLICY_COLUMNS)).

    Raises UserError for values out of range.
    """

    def __init__(
        self,
        views: int | Sequence[int],
        resolution: int | Sequence[int],
        policy: ViewPolicy | Sequence[ViewPolicy] | Sequence[Sequence[ViewPolicy]],
        seed: int,
        scaled_decoding: bool = True,
    ):
        self.several_sizes = isinstance(views, Sequence)
        self._number_of_sizes = len(views) if isinstance(views, Sequence) else 1
        self.most_views = self.by_size("views", views)
        if not self.most_views or min(self.most_views) < 1:
            raise UserError(f"{views} views asked for, at least 1 is needed")
        self.policies = self._policies(policy)
        self.scaled_decoding = scaled_decoding
        self.counters = np.array([seed, 0])
        self.policy_rows = np.zeros((len(self.policies), POLICY_COLUMNS))
        self.set_epoch(0, resolution, views)

    def by_size(self, name: str, value: int | Sequence[int]) -> tuple[int, ...]:
        """Return a setting's values, one for each size.

        Raises UserError if `value` is not a number, or for several sizes not as many numbers.
        """
        values = tuple(value) if isinstance(value, Sequence) else (value,)
        if isinstance(value, Sequence) != self.several_sizes or (
            len(values) != self._number_of_sizes
        ):
            numbers = f"{self._number_of_sizes} numbers" if self.several_sizes else "a number"
            raise UserError(f"{name} is {value}, must be {numbers}, one for each size of the views")
        return values

    def _policies(
        self, policy: ViewPolicy | Sequence[ViewPolicy] | Sequence[Sequence[ViewPolicy]]
    ) -> tuple[ViewPolicy, ...]:
        """Return the policy of each view, by the view's number."""
        each = [policy] * self._number_of_sizes
        if self.several_sizes and not isinstance(policy, ViewPolicy):
            each = list(policy)
        if len(each) != self._number_of_sizes:
            raise UserError(
                f"policy has {len(each)} entries, must be one ViewPolicy, or an entry for each of "
                f"the {self._number_of_sizes} sizes of the views"
            )
        each = [(one,) if isinstance(one, ViewPolicy) else tuple(one) for one in each]
        if not all(each):
            raise UserError("no view policy given, at least one is needed")
        return tuple(
            policies[v % len(policies)]
            for policies, views in zip(each, self.most_views)
            for v in range(views)
        )

    def set_epoch(
        self,
        epoch: int,
        resolution: int | Sequence[int],
        views: int | Sequence[int],
        magnitude: float = STANDARD_MAGNITUDE,
    ) -> None:
        sides, counts = self.by_size("resolution", resolution), self.by_size("views", views)
        if min(sides) < 1:
            raise UserError(f"resolution {min(sides)} asked for, at least 1 pixel is needed")
        for count, most in zip(counts, self.most_views):
            if not 1 <= count <= most:
                raise UserError(f"{count} views asked for, of 1 to {most}")
        self.resolution, self.views = resolution, views
        firsts = itertools.accumulate(self.most_views, initial=0)
        self.sizes = tuple(map(Size, firsts, counts, sides))
        self.counters[1] = epoch
        of_views = (side for most, side in zip(self.most_views, sides) for _ in range(most))
        self.policy_rows[:] = [
            policy.row(magnitude, side) for policy, side in zip(self.policies, of_views)
        ]

    def shapes(self, batch_size: int) -> list[tuple[int, int, int, int, int]]:
        """Return the shape of a batch's views of each size: (batch, views, 3, side, side)."""
        return [(batch_size, views, 3, side, side) for _, views, side in self.sizes]

    def layout(self, batch_size: int) -> np.ndarray:
        """Return where the views of a batch lie, as kernels read it, see `kernels.layout`."""
        starts = itertools.accumulate(map(math.prod, self.shapes(batch_size)), initial=0)
        return np.concatenate(
            [layout_of_size(*size, start) for size, start in zip(self.sizes, starts)]
        )
