// The IoU's powers on a CPU.
#pragma once

#include <cmath>

#include "math/balance.h"

namespace ioubal {

// iou_power; for the usual exponent without pow, which takes as long as the rest of a positive's arithmetic.
inline double fast_iou_power(double iou, double exponent) {
  if (exponent != 1.5) return iou_power(iou, exponent);
  const double clamped = clamp(iou, 0.0, 1.0);
  return clamped * std::sqrt(clamped);
}

}  // namespace ioubal
