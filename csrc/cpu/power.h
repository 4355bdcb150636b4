// The IoU's powers on a CPU.
#pragma once

#include <cmath>

#include "math/balance.h"

namespace ioubal {

// iou_power; for the usual exponent without pow, which takes as long as the rest of a positive's arithmetic.
template <class T>
IOUBAL_HD T fast_iou_power(T iou, double exponent) {
  using std::sqrt;
  if (exponent != 1.5) return iou_power(iou, exponent);
  const T clamped = clamp(iou, T(0), T(1));
  return clamped * sqrt(clamped);
}

}  // namespace ioubal
