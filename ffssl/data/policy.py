"""View policies: which random views of an image are drawn, and the draw itself.

Random numbers are counted, not drawn from a stream: draw k of a view is a hash of (seed, epoch, sample, view, k). So a view is
the same whatever the number of workers, ranks or restarts, and changing one option of a policy leaves the other draws alone.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from ffssl.data.compiled import compiled
from ffssl.data.rand_augment import IDENTITY, MOST_MAGNITUDE, OPERATIONS, operation_strength
from ffssl.errors import UserError

STANDARD_MAGNITUDE = 5.0

# Columns of a policy row (float64): what the compiled code reads of a policy, magnitude already applied.
(CENTRE_CROP, SCALE_LOW, SCALE_HIGH, LOG_RATIO_LOW, LOG_RATIO_HIGH, FLIP, JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY,
 BLUR, SIGMA_LOW, SIGMA_HIGH, SOLARISE, AFFINE_JITTER, RAND_AUGMENT, RAND_MAGNITUDE) = range(19)  # fmt: skip
POLICY_COLUMNS = 19

# Columns of a view's parameters (float64): what was drawn. Factors of a step that was not drawn are the step's identity.
# The last two are repeated for each operation of RandAugment.
(P_TOP, P_LEFT, P_HEIGHT, P_WIDTH, P_FLIP, P_JITTER, P_BRIGHTNESS, P_CONTRAST, P_SATURATION, P_HUE, P_ORDER, P_GREY, P_SIGMA,
 P_SOLARISE, P_OPERATION, P_STRENGTH) = range(16)  # fmt: skip
MOST_OPERATIONS = 4
PARAMETER_COLUMNS = P_OPERATION + 2 * MOST_OPERATIONS

JITTER_FORMS = ("torchvision", "affine")


@dataclass(frozen=True)
class ViewPolicy:
    """The distribution of one view: torchvision's RandomResizedCrop, flip, ColorJitter, grey, GaussianBlur, solarise and RandAugment.

    They come in this order. The defaults are SimSiam's and MoCo v2's. `brightness`, `contrast`, `saturation` and `hue` are
    torchvision's ranges at the standard magnitude 5 and scale linearly with the magnitude. `jitter_form` is "torchvision" (its four
    steps in random order, clipped after each) or "affine" (one colour matrix a view, cheaper; `kernels.colour_matrix` says what
    differs). `blur_sigma` is in pixels of the rendered view. `rand_augment` is the number of RandAugment's operations, whose
    magnitude is the run's, 0..30 and clipped there. With `centre_crop` > 0 nothing is random: the largest centred square is taken,
    and of it that fraction of the side.
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
    solarise: float = 0.0
    jitter_form: str = "torchvision"
    rand_augment: int = 0

    def __post_init__(self):
        for name in ("flip", "jitter", "grey", "blur", "solarise", "centre_crop"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"view policy: {name} is {getattr(self, name)}, must lie in 0..1")
        for name, most in (("brightness", math.inf), ("contrast", math.inf), ("saturation", math.inf), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise UserError(f"view policy: {name} is {getattr(self, name)}, must lie in 0..{most:g}")
        for name in ("crop_scale", "crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise UserError(f"view policy: {name} is ({low}, {high}), must be two positive numbers, the smaller first")
        if self.crop_scale[1] > 1:
            raise UserError(f"view policy: crop_scale goes up to {self.crop_scale[1]}, must not exceed 1")
        if self.jitter_form not in JITTER_FORMS:
            raise UserError(f"view policy: jitter_form is {self.jitter_form!r}, must be one of {', '.join(JITTER_FORMS)}")
        if self.rand_augment not in range(MOST_OPERATIONS + 1):
            raise UserError(f"view policy: rand_augment is {self.rand_augment}, must be a whole number of operations, 0..{MOST_OPERATIONS}")

    def row(self, magnitude: float = STANDARD_MAGNITUDE) -> np.ndarray:
        """This policy at a magnitude, as the compiled code reads it: float64 (POLICY_COLUMNS,)."""
        strength = magnitude / STANDARD_MAGNITUDE
        return np.array([
            self.centre_crop, *self.crop_scale, math.log(self.crop_ratio[0]), math.log(self.crop_ratio[1]), self.flip, self.jitter,
            self.brightness * strength, self.contrast * strength, self.saturation * strength, min(self.hue * strength, 0.5),
            self.grey, self.blur, *self.blur_sigma, self.solarise, self.jitter_form == "affine",
            self.rand_augment, min(max(magnitude, 0), MOST_MAGNITUDE),
        ])  # fmt: skip


EVALUATION = ViewPolicy(centre_crop=224 / 256, flip=0, jitter=0, grey=0, blur=0)
_SIMSIAM = ViewPolicy()
_BYOL = replace(_SIMSIAM, crop_scale=(0.08, 1.0), saturation=0.2)

# One policy a view; they are dealt out in turn where there are more views than policies.
POLICIES = {
    "simsiam": (_SIMSIAM,),
    "simclr": (replace(_SIMSIAM, crop_scale=(0.08, 1.0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),),
    "byol": (replace(_BYOL, blur=1.0), replace(_BYOL, blur=0.1, solarise=0.2)),
    "randaugment": (replace(_SIMSIAM, jitter=0, grey=0, blur=0, rand_augment=2),),
    "evaluation": (EVALUATION,),
}


def choose_policies(name: str, *, crop_scale_min: float | None = None, **changes) -> tuple[ViewPolicy, ...]:
    """The policies called `name`, with those fields changed whose new value is not None. Raises UserError for an unknown name."""
    if name not in POLICIES:
        raise UserError(f"augment.policy: unknown policy {name!r}; known are {', '.join(POLICIES)}")
    if crop_scale_min is not None:
        changes["crop_scale"] = (crop_scale_min, 1.0)
    changes = {field: value for field, value in changes.items() if value is not None}
    return tuple(replace(policy, **changes) for policy in POLICIES[name])


@compiled
def _mix(x):
    """The output function of SplitMix64 (Steele, Lea & Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled
def view_key(seed, epoch, sample, view):
    """The 64-bit key of a view, from which all its random numbers follow."""
    key = np.uint64(0)
    for part in (np.uint64(seed), np.uint64(epoch), np.uint64(sample), np.uint64(view)):
        key = _mix((key ^ part) + np.uint64(0x9E3779B97F4A7C15))
    return key


@compiled
def uniform(key, k):
    """Draw k of a view: uniform in [0, 1)."""
    bits = _mix(key + np.uint64(k + 1) * np.uint64(0x9E3779B97F4A7C15))
    return np.float64(bits >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@compiled
def _between(key, k, low, high):
    return low + (high - low) * uniform(key, k)


@compiled
def _draw_crop(key, height, width, policy, out):
    """torchvision's RandomResizedCrop.get_params: ten tries, then the largest centred crop of an admissible ratio."""
    for attempt in range(10):
        area = height * width * _between(key, 100 + 4 * attempt, policy[SCALE_LOW], policy[SCALE_HIGH])
        ratio = math.exp(_between(key, 101 + 4 * attempt, policy[LOG_RATIO_LOW], policy[LOG_RATIO_HIGH]))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            out[P_TOP] = math.floor(_between(key, 102 + 4 * attempt, 0, height - h + 1))
            out[P_LEFT] = math.floor(_between(key, 103 + 4 * attempt, 0, width - w + 1))
            out[P_HEIGHT], out[P_WIDTH] = h, w
            return
    low, high = math.exp(policy[LOG_RATIO_LOW]), math.exp(policy[LOG_RATIO_HIGH])
    w, h = float(width), float(height)
    if width < low * height:
        h = max(1.0, round(width / low))
    elif width > high * height:
        w = max(1.0, round(height * high))
    out[P_TOP], out[P_LEFT] = (height - h) // 2, (width - w) // 2
    out[P_HEIGHT], out[P_WIDTH] = h, w


@compiled
def _centre_crop(height, width, fraction, out):
    side = max(1.0, round(min(height, width) * fraction))
    out[P_TOP], out[P_LEFT] = (height - side) // 2, (width - side) // 2
    out[P_HEIGHT], out[P_WIDTH] = side, side


@compiled
def _factor(key, k, strength):
    return _between(key, k, max(0.0, 1.0 - strength), 1.0 + strength)


@compiled
def draw(key, height, width, policy, out):
    """Draw the parameters of a view of a `height` x `width` image into `out` (float64, (PARAMETER_COLUMNS,))."""
    if policy[CENTRE_CROP] > 0:
        _centre_crop(height, width, policy[CENTRE_CROP], out)
    else:
        _draw_crop(key, height, width, policy, out)
    out[P_FLIP] = uniform(key, 0) < policy[FLIP]
    out[P_JITTER] = uniform(key, 1) < policy[JITTER]
    out[P_BRIGHTNESS] = _factor(key, 2, policy[BRIGHTNESS])
    out[P_CONTRAST] = _factor(key, 3, policy[CONTRAST])
    out[P_SATURATION] = _factor(key, 4, policy[SATURATION])
    out[P_HUE] = _between(key, 5, -policy[HUE], policy[HUE])
    out[P_ORDER] = math.floor(_between(key, 6, 0, 24))
    out[P_GREY] = uniform(key, 7) < policy[GREY]
    out[P_SIGMA] = _between(key, 9, policy[SIGMA_LOW], policy[SIGMA_HIGH]) if uniform(key, 8) < policy[BLUR] else 0.0
    out[P_SOLARISE] = uniform(key, 10) < policy[SOLARISE]
    for i in range(MOST_OPERATIONS):
        operation = int(_between(key, 200 + 2 * i, 0, OPERATIONS)) if i < policy[RAND_AUGMENT] else IDENTITY
        out[P_OPERATION + 2 * i] = operation
        out[P_STRENGTH + 2 * i] = operation_strength(operation, policy[RAND_MAGNITUDE], uniform(key, 201 + 2 * i) < 0.5)
