// The flat sigmoid focal loss: its positives. The dense pass is the detection loss's (detection.cuh).
#pragma once

#include "cuda/positives.cuh"
#include "math/focal.h"

namespace ioubal::cuda {

struct FlatFocalProblem {
  IntRef values;  // labels
  FloatRef logits, iou, row_weight;
  ScopeOf scope;
  int64_t classes;
  FocalNumbers focal;
  float* weight;  // per row, written at positives: iou^eta times the row's weight

  IOUBAL_DEVICE bool plain(int64_t value) const { return value == kBackground && !scope.ids.data; }
  IOUBAL_DEVICE bool counts(int64_t row, int64_t value) const {
    return (value != kBackground && value != kIgnore) || scope.get(0, 0, row) < 0;
  }
  IOUBAL_DEVICE PositiveTerms terms(const PositivesTable&, const Place& place, int64_t value) const {
    PositiveTerms out;
    const int64_t row = place.anchor, scope_id = scope.get(0, 0, row);
    if (value < kIgnore || value >= classes || scope_id < 0) {
      out.part[kPartBad] = 1;
      return out;
    }
    const double balance = iou_power(iou[row], focal.eta), sample = row_weight.get(row, 1.0);
    const double factor = focal.positive_factor() * sample;
    out.slot = scope_id;
    out.part[kPartCount] = 1;
    out.add_classification(factor * focal_positive(logits[row * classes + value], focal.gamma).loss, balance);
    weight[row] = static_cast<float>(balance * sample);
    return out;
  }
};

__global__ void __launch_bounds__(kPositiveThreads, 6)
    focal_positives_kernel(const IOUBAL_GRID_CONSTANT PositivesTable tb,
                           const IOUBAL_GRID_CONSTANT FlatFocalProblem problem) {
  positives_tile(tb, problem, blockIdx.x);
}

}  // namespace ioubal::cuda
