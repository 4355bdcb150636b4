// The sigmoid focal loss of one logit in float32, with two special-function instructions.
#pragma once

#include "cuda/device.cuh"

namespace ioubal::cuda {

// A logit whose loss and gradient as a negative are exactly 0: e = 2^-14427 = 0, p = 0, softplus = 0. Ignored and
// positive entries are computed with it, so that NaN logits of ignored anchors vanish too.
constexpr float kOff = -1e4f;

// log1p(e) / e on [0, 1]; exactly 1 at 0: most entries have a small e, and a bias there would be the bias of the sum.
// Degree 6 is off by 1.5e-6 at most; kPrecise, degree 7, by 3.2e-7: a large gamma multiplies the error.
template <bool kPrecise>
IOUBAL_DEVICE float log1p_over(float e) {
  if constexpr (kPrecise) {
    float q = fmaf(-0.0087789502f, e, 0.0449866205f);
    q = fmaf(q, e, -0.109022886f);
    q = fmaf(q, e, 0.178472057f);
    q = fmaf(q, e, -0.245368659f);
    q = fmaf(q, e, 0.332840651f);
    q = fmaf(q, e, -0.499981791f);
    return fmaf(q, e, 1.f);
  } else {
    float q = fmaf(0.0145883197f, e, -0.0678512082f);
    q = fmaf(q, e, 0.151027694f);
    q = fmaf(q, e, -0.236113444f);
    q = fmaf(q, e, 0.331404269f);
    q = fmaf(q, e, -0.499907464f);
    return fmaf(q, e, 1.f);
  }
}

// The factor s of a gradient. For gamma = 2 it costs nothing when its cube root k is folded into the reciprocal:
// with P = k p, s p^2 (p + 2 (1 - p) softplus) = P^2 (P + 2 (k - P) softplus). Only where the gradient is rounded to 16
// bits: the error is 1e-5 in the worst case, against 6e-6 without. k is the reciprocal as the hardware gives it, so
// that k - P is exactly 0 for a large logit.
struct Scale {
  float value;                      // s
  float root = 1.f, inverse = 1.f;  // k and about 1 / k, or 1
  bool usual;  // finite, and not 0 if folded: else the folded form, or 0 times inf at an ignored entry, is NaN
};
template <bool kFold>
IOUBAL_DEVICE Scale make_scale(float s) {
  Scale scale;
  scale.value = s;
  scale.usual = fabsf(s) < 1e30f && (!kFold || fabsf(s) > 1e-30f);
  if (kFold && scale.usual) {
    scale.inverse = 1.f / cbrtf(s);
    scale.root = rcp(scale.inverse);
  }
  return scale;
}

// kGamma = 0, 1, 2, or -1 for any gamma. Returns s times the derivative of p^gamma softplus(x), and adds the loss times
// root^2 to `loss`. kSafe: no folding, and right at infinite logits too, where the fast form gives NaN for the
// derivative (0 * inf) and an infinite loss, by which a caller notices.
template <int kGamma, bool kFold, bool kSafe>
IOUBAL_DEVICE float negative_entry(float x, const Scale& s, float gamma, float& loss) {
  static_assert(!kFold || kGamma == 2);
  constexpr bool kFolded = kFold && !kSafe;
  const float e = ex2(-1.44269504f * fabsf(x));
  const float r = rcp(kFolded ? fmaf(e, s.inverse, s.inverse) : 1.f + e);
  const float log1pe_over_e = log1p_over<kGamma == -1>(e);
  const float softplus = fmaf(e, log1pe_over_e, fmaxf(x, 0.f));
  const float p = x >= 0.f ? r : e * r;
  const float capped = kSafe ? fminf(softplus, 1e30f) : softplus;  // 1 - p is 0 where it matters
  const float squared = kSafe ? s.root * s.root : 1.f;
  if constexpr (kGamma == 0) {
    loss = kSafe ? fmaf(squared, softplus, loss) : loss + softplus;
    return p * s.value;
  } else if constexpr (kGamma == 1) {
    loss = fmaf(kSafe ? p * squared : p, softplus, loss);
    return p * s.value * (p + fmaf(-p, capped, capped));
  } else if constexpr (kGamma == 2) {
    const float p2 = p * p;
    loss = fmaf(kSafe ? p2 * squared : p2, softplus, loss);
    if constexpr (kFolded) return p2 * fmaf(fmaf(-2.f, p, 2.f * s.root), softplus, p);
    return p2 * s.value * fmaf(2.f, fmaf(-p, capped, capped), p);
  } else {
    // p^gamma through log p = min(x, 0) - log1p(e): one more special function, no logarithm.
    const float log_p = fmaf(-e, log1pe_over_e, fminf(x, 0.f));
    const float modulator = gamma == 0.f ? 1.f : ex2(1.44269504f * gamma * log_p);
    loss = fmaf(kSafe ? modulator * squared : modulator, softplus, loss);
    // 1 - p by itself: a large gamma multiplies what cancels in a difference.
    const float one_minus_p = x >= 0.f ? e * r : r;
    return modulator * s.value * fmaf(gamma * one_minus_p, capped, p);
  }
}

// The loss and, times s, the derivative of a positive entry: a negative one seen from the other side.
template <int kGamma>
IOUBAL_DEVICE float positive_entry(float x, float s, float gamma, float& loss) {
  const Scale scale = {s, 1.f, 1.f, true};
  return -negative_entry<kGamma, false, true>(-x, scale, gamma, loss);
}

}  // namespace ioubal::cuda
