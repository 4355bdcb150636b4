// The IoU-balanced weights of Eq. 3, 4 (classification) and Eq. 5, 6, 7 (localisation). Constants for the gradient.
#pragma once

#include "math/macros.h"

namespace ioubal {

// iou^exponent with iou clamped to [0, 1]; anything^0 = 1, also 0^0.
template <class T>
IOUBAL_HD T iou_power(T iou, T exponent) {
  return exponent == T(0) ? T(1) : std::pow(clamp(iou, T(0), T(1)), exponent);
}

// S / (D + eps): the factor that keeps the positives' sum unchanged. A denominator of exactly 0 gives 0, never NaN.
template <class T>
IOUBAL_HD T normalizer(T plain_sum, T weighted_sum, T eps) {
  const T denominator = weighted_sum + eps;
  return denominator == T(0) ? T(0) : plain_sum / denominator;
}

}  // namespace ioubal
