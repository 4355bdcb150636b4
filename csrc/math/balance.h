// The IoU-balanced weights of Eq. 3, 4 (classification) and Eq. 5, 6, 7 (localisation). Constants for the gradient.
#pragma once

#include "math/macros.h"

namespace ioubal {

// iou^exponent with iou clamped to [0, 1]; anything^0 = 1, also 0^0.
template <class T, class Exponent>
IOUBAL_HD T iou_power(T iou, Exponent exponent) {
  using std::pow;
  if (exponent == Exponent(0)) return T(1);
  return pow(clamp(iou, T(0), T(1)), T(exponent));
}

// S / (D + eps): the factor that keeps the positives' sum unchanged. A denominator of exactly 0 gives 0, never NaN; one
// next to nothing a bounded factor, finite in float32 too.
template <class T>
IOUBAL_HD T normalizer(T plain_sum, T weighted_sum, T eps) {
  const T denominator = weighted_sum + eps, quotient = denominator == T(0) ? T(0) : plain_sum / denominator;
  return quotient > T(1e36) ? T(1e36) : quotient;
}

// What a positive adds to S and D. An infinite loss enters bounded, so that S / D tends to its limit instead of NaN; a
// NaN one is left out: it makes its own term NaN, not the other rows' gradients.
template <class T>
struct BalanceShare {
  T plain, weighted;
};
template <class T>
IOUBAL_HD BalanceShare<T> balance_share(T loss, T balance) {
  if (loss != loss || balance != balance) return {T(0), T(0)};
  const T bounded = loss < T(1e30) ? loss : T(1e30);
  return {bounded, bounded * balance};
}

// weight * loss, where a weight of 0 silences an infinite loss too (but never a NaN).
template <class T>
IOUBAL_HD T weighted_loss(T weight, T loss) {
  return weight == T(0) && loss - loss != T(0) && loss == loss ? T(0) : weight * loss;
}

}  // namespace ioubal
