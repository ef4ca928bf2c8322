"""The random parameters of a view.

Random numbers are counted, not drawn from a stream: draw k of a view is a hash of (seed, epoch,
sample, view, k). So a view does not depend on the number of workers, ranks or restarts. Changing
one option of a policy leaves the other draws alone.
"""

import math

import numpy as np

from ffssl.data.kernels.jit import compiled
from ffssl.data.kernels.rand_augment import IDENTITY, OPERATIONS, operation_strength

# Columns of a policy row (float64): a policy as the compiled code reads it, magnitude already
# applied.
(
    CENTRE_CROP,
    SCALE_LOW,
    SCALE_HIGH,
    LOG_RATIO_LOW,
    LOG_RATIO_HIGH,
    FLIP,
    JITTER,
    BRIGHTNESS,
    CONTRAST,
    SATURATION,
    HUE,
    GREY,
    BLUR,
    SIGMA_LOW,
    SIGMA_HIGH,
    SOLARISE,
    AFFINE_JITTER,
    RAND_AUGMENT,
    RAND_MAGNITUDE,
    CUBIC,
) = range(20)
POLICY_COLUMNS = 20

# Columns of a view's parameters (float64): what was drawn. Factors of a step that was not drawn are
# the step's identity. The last two are repeated for each operation of RandAugment.
(
    P_TOP,
    P_LEFT,
    P_HEIGHT,
    P_WIDTH,
    P_FLIP,
    P_JITTER,
    P_BRIGHTNESS,
    P_CONTRAST,
    P_SATURATION,
    P_HUE,
    P_ORDER,
    P_GREY,
    P_SIGMA,
    P_SOLARISE,
    P_CUBIC,
    P_OPERATION,
    P_STRENGTH,
) = range(17)
MOST_OPERATIONS = 4
PARAMETER_COLUMNS = P_OPERATION + 2 * MOST_OPERATIONS


@compiled
def _mix(x):
    """Apply the output function of SplitMix64 (Steele, Lea & Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled
def view_key(seed, epoch, sample, view):
    """Return the 64-bit key of a view, from which all its random numbers follow."""
    key = np.uint64(0)
    for part in (np.uint64(seed), np.uint64(epoch), np.uint64(sample), np.uint64(view)):
        key = _mix((key ^ part) + np.uint64(0x9E3779B97F4A7C15))
    return key


@compiled
def uniform(key, k):
    """Return random number k of a view: float64, uniform in [0, 1)."""
    bits = _mix(key + np.uint64(k + 1) * np.uint64(0x9E3779B97F4A7C15))
    return np.float64(bits >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@compiled
def _between(key, k, low, high):
    return low + (high - low) * uniform(key, k)


@compiled
def _draw_crop(key, height, width, policy, out):
    """Draw a crop as torchvision's RandomResizedCrop.get_params does.

    After ten tries take the largest centred crop of an admissible ratio.
    """
    for attempt in range(10):
        area = (
            height * width * _between(key, 100 + 4 * attempt, policy[SCALE_LOW], policy[SCALE_HIGH])
        )
        ratio = math.exp(
            _between(key, 101 + 4 * attempt, policy[LOG_RATIO_LOW], policy[LOG_RATIO_HIGH])
        )
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
    """Draw the parameters of a view of a `height` x `width` image.

    key: see `view_key`.
    policy: float64 (POLICY_COLUMNS,), see `ViewPolicy.row`.
    out: float64 (PARAMETER_COLUMNS,), written.
    """
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
    out[P_SIGMA] = (
        _between(key, 9, policy[SIGMA_LOW], policy[SIGMA_HIGH])
        if uniform(key, 8) < policy[BLUR]
        else 0.0
    )
    out[P_SOLARISE] = uniform(key, 10) < policy[SOLARISE]
    out[P_CUBIC] = policy[CUBIC]

    for i in range(MOST_OPERATIONS):
        operation = (
            int(_between(key, 200 + 2 * i, 0, OPERATIONS)) if i < policy[RAND_AUGMENT] else IDENTITY
        )
        out[P_OPERATION + 2 * i] = operation
        out[P_STRENGTH + 2 * i] = operation_strength(
            operation, policy[RAND_MAGNITUDE], uniform(key, 201 + 2 * i) < 0.5
        )
