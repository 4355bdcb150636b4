// The fused detection loss: its positives. The pass over all logits and deltas is in focal_fill.cuh.
#pragma once

#include "cuda/positives.cuh"
#include "math/focal.h"
#include "math/iou.h"
#include "math/smooth_l1.h"

namespace ioubal::cuda {

// The positives of a detection problem, each computed in double: they are few, and their IoU, target and sums decide
// the weight of everything else.
struct DetectionProblem {
  GroundTruth truth;
  IntRef values;  // matched_idxs
  AnchorRef anchors;
  Dtype logit_type, delta_type;
  int64_t classes;
  FocalNumbers focal;
  LocNumbers loc;
  float* weight;      // per anchor, written at positives: iou^eta
  float* loc_weight;  // iou^lambda, 0 where there is no localisation loss; nullptr: as `weight`

  IOUBAL_DEVICE bool plain(int64_t value) const { return value == kBackground; }
  IOUBAL_DEVICE bool counts(int64_t, int64_t value) const { return value != kBackground && value != kIgnore; }

  IOUBAL_DEVICE PositiveTerms terms(const PositivesTable& tb, const Place& place, int64_t value) const {
    PositiveTerms out;
    const bool known = value >= 0 && value < truth.count(place.image);
    const int64_t label = known ? truth.label(place.image, value) : -1;
    if (label < 0 || label >= classes) {
      out.part[kPartBad] = 1;
      return out;
    }
    const Level& level = tb.level[place.level];
    const u32 location = level.planes ? place.position : place.position / level.anchors;
    const u32 a = level.planes ? place.a : place.position % level.anchors;
    const int64_t entry =
        place.image * level.image_stride + (level.planes ? (a * classes + label) * level.locations + location
                                                         : static_cast<int64_t>(place.position) * classes + label);
    const double logit = FloatRef{level.logits, logit_type}[entry];
    const Quad<double> anchor = anchors.get(place.image, place.anchor), gt = truth.box<double>(place.image, value);
    double iou = 0, loc_loss = 0;
    const bool degenerate = is_degenerate(anchor) || is_degenerate(gt);
    if (!degenerate) {
      const FloatRef deltas = {level.deltas, delta_type};
      const int64_t at = level.delta_place.offset(place.image, location, level.width, a);
      const Quad<double> pred = deltas.four(at, level.delta_place.coordinate);
      const Quad<double> target = encode_box(gt, anchor, loc.weights, loc.coder);
      iou = delta_iou(pred, target, loc.weights, loc.coder);
      for (int j = 0; j < 4; ++j) loc_loss += smooth_l1(pred.v[j] - target.v[j], loc.beta).loss;
    }
    const double balance = iou_power(iou, focal.eta);
    const double loc_balance = loc.lambda == focal.eta ? balance : iou_power(iou, loc.lambda);
    out.part[kPartCount] = 1;
    out.part[kPartIou] = iou;
    out.add_classification(focal.positive_factor() * focal_positive(logit, focal.gamma).loss, balance);
    out.add_localization(loc_loss, loc_balance);
    weight[place.anchor] = static_cast<float>(balance);
    if (loc_weight) loc_weight[place.anchor] = degenerate ? 0.f : static_cast<float>(loc_balance);
    return out;
  }
};

__global__ void __launch_bounds__(kPositiveThreads, 6)
    detection_positives_kernel(const IOUBAL_GRID_CONSTANT PositivesTable tb,
                               const IOUBAL_GRID_CONSTANT DetectionProblem problem) {
  positives_tile(tb, problem, blockIdx.x);
}

}  // namespace ioubal::cuda
