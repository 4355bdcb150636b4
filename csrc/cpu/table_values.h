// What a table holds of its logits.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/isa.h"

namespace ioubal {

// Plain losses of some logits as negatives. Element by element the kernels give them for any gamma alone, p^gamma by a
// logarithm, which far below zero costs two digits: for 1 and 2 they are put together from p and softplus.
inline void losses_of(const FocalDense (&focal)[4], const float* x, int64_t count, double gamma, float* loss) {
  constexpr int64_t kBlock = 512;
  alignas(64) float p[kBlock];
  const bool whole = gamma == 1 || gamma == 2;
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t n = std::min(kBlock, count - i);
    focal[kFloat32](x + i, loss + i, n, 1.0, whole ? 0.0 : gamma, {}, Output::kLoss, false, nullptr);
    if (!whole) continue;
    focal[kFloat32](x + i, p, n, 1.0, 0.0, {}, Output::kGradient, false, nullptr);
    for (int64_t j = 0; j < n; ++j) loss[i + j] *= gamma == 2 ? p[j] * p[j] : p[j];
  }
}

// Their losses and, unless output is kNone, what is written for their bits in a dtype of 16.
inline void values_of(const FocalDense (&focal)[4], int dtype, const uint16_t* bits, const float* x, int64_t count,
                      double scale, double gamma, Output output, float* loss, uint16_t* written) {
  losses_of(focal, x, count, gamma, loss);
  if (output != Output::kNone) focal[dtype](bits, written, count, scale, gamma, {}, output, false, nullptr);
}

}  // namespace ioubal
