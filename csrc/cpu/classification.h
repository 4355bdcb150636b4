// The positives of a sigmoid focal loss, shared by the flat op and the fused detection op.
#pragma once

#include <algorithm>
#include <vector>

#include "common/sums.h"
#include "common/tensor_access.h"
#include "cpu/dense_pass.h"
#include "math/focal.h"

namespace ioubal {

inline DtypeIndex dtype_index(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kFloat16;
    default: return kFloat64;
  }
}

struct FocalParameters {
  double eta, alpha, gamma, eps;  // alpha < 0: none
  double positive_factor() const { return alpha < 0 ? 1.0 : alpha; }
  double negative_factor() const { return alpha < 0 ? 1.0 : 1.0 - alpha; }
};

// The entry (anchor, class of the anchor) of a positive.
struct PositiveEntry {
  int64_t run, entry, scope, image;
  double balance;     // iou^eta
  Term<double> term;  // plain loss with alpha and the sample's weight
};

inline PositiveEntry make_positive(int64_t run, int64_t entry, int64_t scope, int64_t image, double logit, double iou,
                                   double weight, const FocalParameters& focal) {
  Term<double> term = focal_positive(logit, focal.gamma);
  const double factor = focal.positive_factor() * weight;
  return {run, entry, scope, image, iou_power(iou, focal.eta), {factor * term.loss, factor * term.grad}};
}

}  // namespace ioubal
