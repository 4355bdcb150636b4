"""The formulas of csrc/math for Triton kernels: the same names, element by element on blocks of any shape.

The dense pass computes in float32 with two special-function instructions per logit; what a positive needs is computed
in the dtype of its arguments, float64 in the losses: positives are few, and everything else is weighted by them.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter knows no inline assembly. It is chosen when triton is imported (TRITON_INTERPRET=1).
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)
# A logit whose loss and gradient as a negative are exactly 0 (2^-14427 = 0). Ignored and positive entries are computed
# with it, so that NaN logits of ignored anchors vanish too.
OFF = tl.constexpr(-1e4)
# The same as words of memory; in bfloat16 it is -9984.
OFF_32, OFF_BF16, OFF_16 = (tl.constexpr(word - 2**32) for word in (0xC61C4000, 0xC61CC61C, 0xF0E2F0E2))
MAX_LOG_RATIO = tl.constexpr(4.135166556742356)  # log(1000 / 16)
MAX_FOVEA_DISTANCE = tl.constexpr(16.0)
NO_LABEL = tl.constexpr(-1)
UNMATCHED, BETWEEN = tl.constexpr(-1), tl.constexpr(-2)
SHORTEST_SIDE = tl.constexpr(2.0**-60)  # its square is a normal number


# ---------------------------------------------------------------------------------------------- special functions


@triton.jit
def ex2(t):
    """2^t of float32; denormals are 0."""
    if INTERPRET:
        return tl.exp2(t)
    # tl.exp2 is ex2.approx without .ftz: two multiplications, a comparison and a selection more.
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [t], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def rcp(u):
    """1 / u of float32, exactly 1 at 1."""
    if INTERPRET:
        return 1.0 / u
    # A division is 8 instructions and a branch.
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def twice_log1p(e, p, PRECISE: tl.constexpr):
    """2 log1p(e) on [0, 1], given p = e / (1 + e); exactly e + p as e vanishes: a bias there would be the whole sum's.

    With y = log1p(e): e + p = 2 sinh(y), m = e - p = 4 sinh(y / 2)^2, and y / sinh(y) is so smooth a function of m that
    a short polynomial has it. Degree 2 is off by 8e-7 at most; PRECISE, degree 3, by 3e-8: a large gamma multiplies it.
    """
    both = e + p
    m = e - p
    if PRECISE:
        slope = m * 1.21937075e-3 - 6.99793315e-3
        slope = slope * m + 3.33101675e-2
        slope = slope * m - 1.66665509e-1
    else:
        slope = m * -5.83051238e-3 + 3.29733118e-2
        slope = slope * m - 1.66637942e-1
    return both * m * slope + both


@triton.jit
def log1p(e):
    """log(1 + e) for e >= 0 in e's precision: the rounding error of 1 + e cancels in the quotient."""
    u = 1.0 + e
    d = u - 1.0
    return tl.where(d == 0.0, e, tl.log(u) * (e / tl.where(d == 0.0, 1.0, d)))


@triton.jit
def clamp(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """x within [LOW, HIGH]; NaN stays NaN. The limits are taken in x's precision."""
    return tl.where(x < LOW, tl.full((), LOW, x.dtype), tl.where(x > HIGH, tl.full((), HIGH, x.dtype), x))


# ---------------------------------------------------------------------------------------------- words of memory
#
# Four bytes as an integer: a float32, or two 16-bit elements, the first one in the lower half.


@triton.jit
def off_word(T: tl.constexpr):
    """OFF, once or twice."""
    if T == tl.float32:
        return OFF_32
    elif T == tl.bfloat16:
        return OFF_BF16
    else:
        return OFF_16


@triton.jit
def first_half(words, T: tl.constexpr):
    """The first of two 16-bit elements, in float32."""
    if T == tl.bfloat16:
        return (words << 16).to(tl.float32, bitcast=True)
    else:
        return words.to(tl.int16).to(T, bitcast=True).to(tl.float32)


@triton.jit
def second_half(words, T: tl.constexpr):
    if T == tl.bfloat16:
        return (words & -0x10000).to(tl.float32, bitcast=True)
    else:
        return (words >> 16).to(tl.int16).to(T, bitcast=True).to(tl.float32)


@triton.jit
def pack_halves(first, second, T: tl.constexpr):
    """Two float32 as 16-bit elements of a word."""
    if INTERPRET:
        low = first.to(T).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return low | (second.to(T).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    elif T == tl.bfloat16:  # one instruction instead of three
        asm: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
        return tl.inline_asm_elementwise(asm, "=r,f,f", [first, second], dtype=tl.int32, is_pure=True, pack=1)
    else:
        asm: tl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;"
        return tl.inline_asm_elementwise(asm, "=r,f,f", [first, second], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def all_negative(words, T: tl.constexpr):
    """Whether all elements have their sign bits set, as a scalar."""
    if INTERPRET:  # which takes long for reductions that are not its own
        if T.primitive_bitwidth == 16:
            words = tl.maximum(words, words << 16)
        return tl.max(tl.max(words, 1), 0) < 0
    clear = tl.reduce_or(~words, 1)
    if T.primitive_bitwidth == 16:
        clear |= clear << 16
    return tl.reduce_or(clear, 0) >= 0


@triton.jit
def anew(x):
    """x (32 bits); what follows from it is computed where it stands, not before a loop and kept for it."""
    if INTERPRET:
        return x
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1)


@triton.jit
def any_bits(words):
    """All bits that are in one of the words (a matrix) at least."""
    if INTERPRET:
        bits = tl.zeros((), tl.int32)
        for k in tl.static_range(32):
            bits |= tl.max(tl.max((words >> k) & 1, 1), 0) << k
        return bits
    return tl.reduce_or(tl.reduce_or(words, 1), 0)


# ---------------------------------------------------------------------------------------------- focal loss


@triton.jit
def is_usual(factor):
    """Whether a gradient's factor may meet an entry whose derivative is 0: 0 times infinity would be NaN."""
    return tl.abs(factor) < 1e30


@triton.jit
def focal_negative(x, gamma, GAMMA: tl.constexpr):
    """p^gamma softplus(x) of a negative entry and its derivative, in float32. GAMMA: 0, 1, 2, or -1 for any `gamma`."""
    e = ex2(tl.abs(x) * -LOG2E)
    r = rcp(1.0 + e)
    other = e * r
    log1pe = 0.5 * twice_log1p(e, other, GAMMA == -1)
    softplus = log1pe + tl.maximum(x, 0.0)
    p = tl.where(x >= 0.0, r, other)
    if GAMMA == 0:
        return softplus, p
    # (1 - p) * softplus tends to 0; at x = +inf it would be 0 * inf.
    capped = tl.minimum(softplus, 1e30)
    if GAMMA == 1:
        return p * softplus, p * (p + (capped - p * capped))
    elif GAMMA == 2:
        p2 = p * p
        return p2 * softplus, p2 * ((capped - p * capped) * 2.0 + p)
    else:
        # p^gamma through log p = min(x, 0) - log1p(e): no 0^0 and no logarithm.
        modulator = ex2((tl.minimum(x, 0.0) - log1pe) * (gamma * LOG2E))
        # 1 - p by itself: a large gamma multiplies what cancels in a difference.
        one_minus_p = tl.where(x >= 0.0, other, r)
        return modulator * softplus, modulator * (gamma * one_minus_p * capped + p)


@triton.jit
def focal_below(x, gamma, GAMMA: tl.constexpr):
    """The same where x is known to be at most 0, its loss doubled: a third of the operations less."""
    e = ex2(x * LOG2E)
    r = rcp(1.0 + e)
    p = e * r
    softplus = twice_log1p(e, p, GAMMA == -1)
    if GAMMA == 0:
        return softplus, p
    elif GAMMA == 1:
        return p * softplus, p * (0.5 * r * softplus + p)
    elif GAMMA == 2:
        p2 = p * p
        return p2 * softplus, p2 * (r * softplus + p)
    else:
        modulator = ex2((x - 0.5 * softplus) * (gamma * LOG2E))
        return modulator * softplus, modulator * (0.5 * gamma * r * softplus + p)


@triton.jit
def focal_positive(x, gamma):
    """(1 - p)^gamma softplus(-x) of a positive entry and its derivative, in float64."""
    x = -x  # a negative entry seen from the other side
    e = tl.exp(-tl.abs(x))
    log1pe = log1p(e)
    low = tl.where(x < 0.0, x, 0.0 * e)
    p = tl.where(x < 0.0, e, 1.0) / (1.0 + e)
    one_minus_p = tl.where(x < 0.0, 1.0, e) / (1.0 + e)
    softplus = tl.where(x > 0.0, x, 0.0 * e) + log1pe  # e is NaN where x is
    modulator = tl.where(gamma == 0.0, 1.0, tl.exp(gamma * (low - log1pe)))
    tail = tl.where(one_minus_p > 0.0, one_minus_p * softplus, 0.0)
    return modulator * softplus, -modulator * (p + gamma * tail)


# ---------------------------------------------------------------------------------------------- Eq. 4 and 7


@triton.jit
def iou_power(iou, exponent):
    """iou^exponent with iou clamped to [0, 1]; anything^0 = 1, also 0^0. float64."""
    return tl.where(exponent == 0.0, 1.0, tl.exp2(exponent * tl.log2(clamp(iou, 0.0, 1.0))))


@triton.jit
def normalizer(plain, weighted, eps):
    """S / (D + eps), bounded: finite in float32 too; a denominator of exactly 0 gives 0, never NaN."""
    d = weighted + eps
    quotient = tl.where(d == 0.0, 0.0, plain / tl.where(d == 0.0, 1.0, d))
    return tl.where(quotient > 1e36, 1e36, quotient)


@triton.jit
def balance_share(loss, balance):
    """What a positive adds to S and D: an infinite loss bounded, a NaN one not at all."""
    bad = (loss != loss) | (balance != balance)
    plain = tl.where(bad, 0.0, tl.where(loss < 1e30, loss, 1e30))
    return plain, tl.where(bad, 0.0, plain * balance)


@triton.jit
def weighted_loss(weight, loss):
    """weight * loss, where a weight of 0 silences an infinite loss too (but never a NaN)."""
    infinite = (loss - loss != 0.0) & (loss == loss)
    return tl.where((weight == 0.0) & infinite, 0.0, weight * loss)


# ---------------------------------------------------------------------------------------------- smooth L1


@triton.jit
def smooth_l1(d, beta):
    """0.5 d^2 / beta below beta, |d| - beta / 2 above, and the derivative; beta = 0 is L1."""
    size = tl.abs(d)
    inner = size < beta
    safe = tl.where(inner, beta, 1.0)
    sign = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))  # of 0 it is 0, of NaN NaN
    return tl.where(inner, 0.5 * d * d / safe, size - 0.5 * beta), tl.where(inner, d / safe, sign)


# ---------------------------------------------------------------------------------------------- boxes and IoU


@triton.jit
def exp_clamped(t):
    return tl.exp(clamp(t, -MAX_LOG_RATIO, MAX_LOG_RATIO))


@triton.jit
def decode_box(d0, d1, d2, d3, a0, a1, a2, a3, w0, w1, w2, w3, FOVEA: tl.constexpr):
    """Box x1 y1 x2 y2 of deltas d on the anchor a with the coder's weights w."""
    width = a2 - a0
    height = a3 - a1
    x = a0 + 0.5 * width
    y = a1 + 0.5 * height
    if FOVEA:
        left = width * exp_clamped(d0 / w0)
        top = height * exp_clamped(d1 / w1)
        right = width * exp_clamped(d2 / w2)
        bottom = height * exp_clamped(d3 / w3)
        return x - left, y - top, x + right, y + bottom
    else:
        x = d0 / w0 * width + x
        y = d1 / w1 * height + y
        half_w = 0.5 * width * exp_clamped(d2 / w2)
        half_h = 0.5 * height * exp_clamped(d3 / w3)
        return x - half_w, y - half_h, x + half_w, y + half_h


@triton.jit
def log_slope(t, size, weight):
    """Derivative of size * exp(clamped t) with respect to a delta of this weight; 0 beyond the clamp, NaN stays."""
    beyond = (t > MAX_LOG_RATIO) | (t < -MAX_LOG_RATIO)
    return tl.where(beyond, 0.0, size * tl.exp(t) / weight)


@triton.jit
def decode_axis_backward(low, high, d0, d1, size, w0, w1, FOVEA: tl.constexpr):
    """Gradients of an axis's two deltas, given those of its two corners."""
    slope1 = log_slope(d1 / w1, size, w1)
    if FOVEA:
        return -low * log_slope(d0 / w0, size, w0), high * slope1
    else:
        return (low + high) * size / w0, 0.5 * (high - low) * slope1


@triton.jit
def fovea_distance(reach, size, weight):
    return weight * tl.log(clamp((reach + 0.5 * size) / size, 1.0 / MAX_FOVEA_DISTANCE, MAX_FOVEA_DISTANCE))


@triton.jit
def encode_box(b0, b1, b2, b3, a0, a1, a2, a3, w0, w1, w2, w3, FOVEA: tl.constexpr):
    """Deltas of box b on anchor a. Distances are taken between corners before anything is added to them: coordinates
    are large beside their differences, and float32 would lose the difference of two centres."""
    width = a2 - a0
    height = a3 - a1
    left = a0 - b0
    top = a1 - b1
    right = b2 - a2
    bottom = b3 - a3
    if FOVEA:
        return (
            fovea_distance(left, width, w0),
            fovea_distance(top, height, w1),
            fovea_distance(right, width, w2),
            fovea_distance(bottom, height, w3),
        )
    else:
        return (
            w0 * (0.5 * (right - left)) / width,
            w1 * (0.5 * (bottom - top)) / height,
            w2 * tl.log((b2 - b0) / width),
            w3 * tl.log((b3 - b1) / height),
        )


@triton.jit
def is_degenerate(b0, b1, b2, b3):
    """Whether a side is not positive. NaN is not degenerate: it must reach the loss."""
    return (b2 - b0 <= 0.0) | (b3 - b1 <= 0.0)


@triton.jit
def not_negative(x):
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def interval_overlap(a1, a2, b1, b2):
    """Overlap of [a1, a2] and [b1, b2]; 0 when apart or inverted."""
    return not_negative(tl.where(b2 < a2, b2, a2) - tl.where(b1 > a1, b1, a1))


@triton.jit
def box_iou(a0, a1, a2, a3, b0, b1, b2, b3):
    """IoU; areas of inverted boxes count as 0, an empty union gives 0."""
    inter = interval_overlap(a0, a2, b0, b2) * interval_overlap(a1, a3, b1, b3)
    area_a = not_negative(a2 - a0) * not_negative(a3 - a1)
    area_b = not_negative(b2 - b0) * not_negative(b3 - b1)
    united = area_a + area_b - inter
    return tl.where(united == 0.0, 0.0, inter / tl.where(united == 0.0, 1.0, united))


@triton.jit
def centered_overlap(shift, w1, w2):
    """Overlap of two intervals of widths w1 and w2 whose centres are `shift` apart."""
    narrow = tl.where(w2 < w1, w2, w1)
    reach = 0.5 * (w1 + w2) - tl.abs(shift)
    return not_negative(tl.where(narrow < reach, narrow, reach))


@triton.jit
def delta_iou(p0, p1, p2, p3, t0, t1, t2, t3, w0, w1, w2, w3, FOVEA: tl.constexpr):
    """IoU of the two boxes that deltas decode to on any one anchor: decoding is a shift and a scale per axis, to which
    IoU is invariant. Sizes and distances are never turned into corners, which would lose them far from the anchor."""
    p2, p3 = exp_clamped(p2 / w2), exp_clamped(p3 / w3)
    t2, t3 = exp_clamped(t2 / w2), exp_clamped(t3 / w3)
    if FOVEA:  # distances from one centre to all sides
        p0, p1 = exp_clamped(p0 / w0), exp_clamped(p1 / w1)
        t0, t1 = exp_clamped(t0 / w0), exp_clamped(t1 / w1)
        inter_w = tl.where(t0 < p0, t0, p0) + tl.where(t2 < p2, t2, p2)
        inter = inter_w * (tl.where(t1 < p1, t1, p1) + tl.where(t3 < p3, t3, p3))
        united = (p0 + p2) * (p1 + p3) + (t0 + t2) * (t1 + t3) - inter
    else:
        inter = centered_overlap(p0 / w0 - t0 / w0, p2, t2) * centered_overlap(p1 / w1 - t1 / w1, p3, t3)
        united = p2 * p3 + t2 * t3 - inter
    return inter / united


# ---------------------------------------------------------------------------------------------- matching
#
# Decisions compare for equality with torch's own results, so every operation is rounded by itself. Kernels that use
# these functions are launched with EXACT (_launch.py), which forbids the compiler to contract multiply-adds.


@triton.jit
def rounded_product(a, b):
    return a * b


@triton.jit
def rounded_quotient(a, b):
    return tl.div_rn(a, b)  # a / b of float32 is off by up to 2 units in the last place


@triton.jit
def is_nan(value):
    return value != value


@triton.jit
def is_padding(b0, b1, b2, b3):
    """Whether a place holds no box; a label of NO_LABEL says the same."""
    return is_nan(b0) | is_nan(b1) | is_nan(b2) | is_nan(b3)


@triton.jit
def matching_area(b0, b1, b2, b3):
    """Negative where one side is inverted, NaN where a coordinate is."""
    return rounded_product(b2 - b0, b3 - b1)


@triton.jit
def matching_iou(b0, b1, b2, b3, box_area, a0, a1, a2, a3, anchor_area):
    """torchvision's IoU, operation by operation: 0 (of either sign), positive, or NaN (0 / 0, infinite areas). A NaN
    coordinate makes it NaN through its area, so minimum and maximum need not care for it."""
    width = tl.minimum(b2, a2) - tl.maximum(b0, a0)
    height = tl.minimum(b3, a3) - tl.maximum(b1, a1)
    overlap = rounded_product(tl.maximum(width, 0.0), tl.maximum(height, 0.0))
    union = box_area + anchor_area - overlap
    # Most pairs of a block do not overlap, and a division of 0 takes a slow path of dozens of instructions. 2^-60 over
    # the union is 0, finite, infinite or NaN of the same sign just where 0 times it is what 0 over the union is.
    quotient = rounded_quotient(tl.where(overlap == 0.0, 8.6736173798840355e-19, overlap), union)
    return tl.where(overlap == 0.0, rounded_product(overlap, quotient), quotient)


@triton.jit
def takes_over(iou, best):
    """Whether `iou` takes the place of `best`, which came earlier: the rule of torch's max. Ties stay with the earlier
    one; a NaN is above every number, and the first NaN stays."""
    return ((iou <= best) == 0) & (is_nan(best) == 0)


@triton.jit
def matched_index(iou, index, high, low):
    """A NaN is below no threshold."""
    return tl.where(iou < low, UNMATCHED, tl.where(iou < high, BETWEEN, index))


@triton.jit
def is_regular_anchor(a0, a1, a2, a3):
    """Whether the anchor's area is positive (and may be infinite). Then its IoU with a regular box that it does not
    overlap is exactly 0."""
    return (a2 - a0 > SHORTEST_SIDE) & (a3 - a1 > SHORTEST_SIDE)


@triton.jit
def is_regular_box(area):
    """Whether the area is 0 or positive, and finite: no overlap is 0 * infinity, every union with a regular anchor is
    positive."""
    return (area >= 0.0) & (area < float("inf"))


@triton.jit
def is_in_scale(area, smallest_squared, largest_squared):
    """Whether a level of sizes smallest .. largest takes a box. An infinite area is no size."""
    return (area >= smallest_squared) & (area <= largest_squared) & (area < float("inf"))


@triton.jit
def fovea_cells(low, high, stride, from_, to, cells):
    """First and last cell of one axis whose centres lie in the box shrunk by sigma, clamped to the map; none if the
    first is behind the last. from_, to: 1 - sigma and 1 + sigma."""
    low = rounded_quotient(low, stride)
    half = rounded_product(0.5, rounded_quotient(high, stride) - low)
    first = tl.ceil(low + rounded_product(from_, half) - 0.5)
    last = tl.floor(low + rounded_product(to, half) - 0.5)
    return tl.minimum(tl.maximum(first, 0.0), cells - 1.0), tl.minimum(tl.maximum(last, 0.0), cells - 1.0)


@triton.jit
def takes_cell(area, current_area):
    """Whether a box takes a cell from the one that has it, which came earlier: the smallest box wins, of equal ones the
    last."""
    return area <= current_area
