// The sigmoid focal loss of one logit in float32, with two special-function instructions.
#pragma once

#include "cuda/device.cuh"

namespace ioubal::cuda {

// A logit whose loss and gradient as a negative are exactly 0: e = 2^-14427 = 0, p = 0, softplus = 0. Ignored and
// positive entries are computed with it, so that NaN logits of ignored anchors vanish too.
constexpr float kOff = -1e4f;

// With e = exp(-|x|) and p = e / (1 + e), y = log1p(e): e + p = 2 sinh(y), m = e - p = 4 sinh(y / 2)^2, and y / sinh(y)
// is so smooth a function of m that a short polynomial has it: 2 y = (e + p) (1 + m slope(m)), exactly e + p where m is
// 0. Most entries have a small e: a bias there would be the bias of the sum. Degree 2 is off by 7e-7 at most;
// kPrecise, degree 3, by 2e-8: a large gamma multiplies the error.
template <bool kPrecise>
IOUBAL_DEVICE float log1p_slope(float m) {
  if constexpr (kPrecise) {
    const float q = fmaf(fmaf(1.21937075e-3f, m, -6.99793315e-3f), m, 3.33101675e-2f);
    return fmaf(q, m, -1.66665509e-1f);
  } else {
    return fmaf(fmaf(-5.83051238e-3f, m, 3.29733118e-2f), m, -1.66637942e-1f);
  }
}

// A gradient's factor for which the fast form is right: with others, 0 times inf at an ignored entry would be NaN.
IOUBAL_DEVICE bool usual_scale(float s) { return fabsf(s) < 1e30f; }
// One whose cube root can be divided by, and whose square times a loss, however small, stays a normal number.
IOUBAL_DEVICE bool has_cube_root(float s) { return fabsf(s) > 1e-12f && fabsf(s) < 1e12f; }

// What a doubled sum of losses stands for.
constexpr float kHalf = 0.5f;

// How an entry gets to its gradient's factor s. kTimes: multiplies by it. kFolded, for gamma 2, an instruction shorter:
// with c the cube root of s, the reciprocal of (1 + e) / c gives c (1 - p) and c p, and (c p)^2 times c of the rest is
// s times it. Takes 1 / c in the place of s, and the sum has c^2 times the losses.
enum class Scaling { kTimes, kFolded };

// kGamma = 0, 1, 2, or -1 for any gamma. Returns s times the derivative of p^gamma softplus(x), and adds twice the loss
// to `sum`. kBelow: x is known to be at most 0; then NaN alone gives anything but finite numbers. kSafe: right at
// infinite logits too, where the fast form gives NaN for the derivative (0 * inf) and an infinite loss, by which a
// caller notices; and adds the loss once, as twice a huge one is infinite.
template <int kGamma, bool kBelow, bool kSafe, Scaling kScaling = Scaling::kTimes>
IOUBAL_DEVICE float negative_entry(float x, float s, float gamma, float& sum) {
  constexpr float kTimes = kSafe ? 1.f : 2.f, kOnce = 1.f / kTimes;  // softplus as it is computed, and what it is
  constexpr bool kFolded = kScaling == Scaling::kFolded;
  static_assert(!kFolded || (kGamma == 2 && !kSafe));
  const float e = ex2(kBelow ? 1.44269504f * x : -1.44269504f * fabsf(x));
  const float r = rcp(kFolded ? fmaf(e, s, s) : 1.f + e), other = e * r;
  const float both = kFolded ? fmaf(s, other, e) : e + other, m = kFolded ? fmaf(-s, other, e) : e - other;
  const float log1pe = fmaf(both * m, log1p_slope<kGamma == -1>(m), both);  // twice log1p(e)
  float softplus = kSafe ? kHalf * log1pe : log1pe;
  if (!kBelow) softplus = fmaf(kTimes, fmaxf(x, 0.f), softplus);
  // Each by itself: a large gamma multiplies what cancels in a difference.
  const float p = kBelow || x < 0.f ? other : r, one_minus_p = kBelow || x < 0.f ? r : other;
  const float capped = kSafe ? fminf(softplus, 1e30f) : softplus;  // 1 - p is 0 where it matters
  if constexpr (kGamma == 0) {
    sum += softplus;
    return p * s;
  } else if constexpr (kGamma == 1) {
    sum = fmaf(p, softplus, sum);
    return p * s * fmaf(kOnce * one_minus_p, capped, p);
  } else if constexpr (kGamma == 2) {
    const float p2 = p * p;
    sum = fmaf(p2, softplus, sum);
    return (kFolded ? p2 : s * p2) * fmaf(2.f * kOnce * one_minus_p, capped, p);
  } else {
    // p^gamma through log p = min(x, 0) - log1p(e): one more special function, no logarithm.
    const float log_p = fmaf(-kHalf, log1pe, kBelow ? x : fminf(x, 0.f));
    const float modulator = gamma == 0.f ? 1.f : ex2(1.44269504f * gamma * log_p);
    sum = fmaf(modulator, softplus, sum);
    return modulator * s * fmaf(kOnce * gamma * one_minus_p, capped, p);
  }
}

// The loss and, times s, the derivative of a positive entry: a negative one seen from the other side.
template <int kGamma>
IOUBAL_DEVICE float positive_entry(float x, float s, float gamma, float& loss) {
  return -negative_entry<kGamma, false, true>(-x, s, gamma, loss);
}

}  // namespace ioubal::cuda
