"""Logits as integers in the same order, and as weights: what sampling compares and sums."""

import triton
import triton.language as tl

NO_LOGIT = tl.constexpr(-0x7F800000)  # image of -infinity: less than of any finite logit
BROKEN = tl.constexpr(0x7FFFFFFF)  # stands for NaN and infinities; more than any finite logit's
_SIGN = tl.constexpr(-(2**31))
_LOG2_E = tl.constexpr(1.4426950408889634)
_MIN_RATE = tl.constexpr(1e-30)  # at which the lowest float is still far from any logit
_MAX_FLOAT = tl.constexpr(3.4028234663852886e38)
_MIN_FLOAT = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def image_of(x):
    """float32 -> int32 in the same order; equal for both zeros."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def logit_of(image):
    """The float32 that has this image."""
    bits = tl.where(image < 0, (-image) ^ _SIGN, image)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def rate_of(temperature):
    """Of 2, by which weights grow with a logit."""
    return tl.minimum(tl.maximum(_LOG2_E / temperature, _MIN_RATE), _MAX_FLOAT)


@triton.jit
def weigh(x, greatest, rate, min_p):
    """Likelihood relative to the likeliest token's; 0 if that is nearly so, or less than min_p."""
    weight = tl.exp2((x - greatest) * rate)
    return tl.where(weight >= tl.maximum(min_p, _MIN_FLOAT), weight, 0.0)
