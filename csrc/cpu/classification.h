// The positives of a sigmoid focal loss, shared by the flat op and the fused detection op.
#pragma once

#include <algorithm>
#include <vector>

#include "common/sums.h"
#include "common/tensor_access.h"
#include "cpu/dense_pass.h"
#include "math/focal.h"

namespace ioubal {

struct FocalParameters {
  double eta, alpha, gamma, eps;  // alpha < 0: none
  double positive_factor() const { return alpha < 0 ? 1.0 : alpha; }
  double negative_factor() const { return alpha < 0 ? 1.0 : 1.0 - alpha; }
};

// The entry (anchor, class of the anchor) of a positive.
struct PositiveEntry {
  int64_t run, entry, scope, image;
  double balance;          // iou^eta
  double weight;           // the sample's
  Term<double> term = {};  // plain loss with alpha and weight, once the logit is known

  void meet(double logit, const FocalParameters& focal) {
    const Term<double> plain = focal_positive(logit, focal.gamma);
    const double factor = focal.positive_factor() * weight;
    term = {factor * plain.loss, factor * plain.grad};
  }
  void add_to(const Sums& sums) const { sums.add(scope, Sums::kClsPlain, term.loss, balance); }
};

}  // namespace ioubal
