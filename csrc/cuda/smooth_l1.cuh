// IoU-balanced smooth L1 (Eq. 6 and 7) over deltas (P, 4), a thread per row. In double: the rows are positives, few.
#pragma once

#include "cuda/coefficients.cuh"
#include "math/iou.h"
#include "math/smooth_l1.h"

namespace ioubal::cuda {

struct SmoothL1Table {
  FloatRef pred, target, iou, weight;
  int weight_columns;  // 0: none, 1: per row, 2: per coordinate
  int64_t rows;
  u32 tiles;
  ScopeOf scope;
  double lambda, beta, w_loc;
  Quad<double> box_weights;
  int64_t slots;
  double* positives;  // (tiles, slots, kPartials)

  Coefficients coefficients;
  FloatOut out, each;  // gradient; the rows' losses
  FloatRef grad_rows;  // per row, or none: `scale`
  NumberRef scale, expected;
  bool skip_expected;

  struct Row {
    double loss, balance;
    Quad<double> grad;
  };
  IOUBAL_DEVICE Row row(int64_t r) const {
    Quad<double> p, t;
    for (int j = 0; j < 4; ++j) {
      p.v[j] = pred[4 * r + j];
      t.v[j] = target[4 * r + j];
    }
    Row row;
    row.loss = 0;
    for (int j = 0; j < 4; ++j) {
      const Term<double> term = smooth_l1(p.v[j] - t.v[j], beta);
      const double w = weight.get(weight_columns == 2 ? 4 * r + j : r, 1.0);
      row.loss += w * term.loss;
      row.grad.v[j] = w * term.grad;
    }
    row.balance = 1.0;
    if (lambda != 0)
      row.balance = iou_power(iou.data ? iou[r] : delta_iou(p, t, box_weights, BoxCoder::kDelta), lambda);
    return row;
  }
};

__global__ void __launch_bounds__(kThreads, 3) smooth_l1_positives_kernel(const IOUBAL_GRID_CONSTANT SmoothL1Table tb) {
  __shared__ double scratch[kThreads / kWarp * kPartials];
  double* out = tb.positives + static_cast<int64_t>(blockIdx.x) * tb.slots * kPartials;
  clear_terms<kThreads>(tb.slots, out);
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  PositiveTerms terms;
  if (r < tb.rows) {
    terms.slot = tb.scope.get(0, 0, r);
    terms.part[kPartCount] = 1;
    if (terms.slot < 0) {
      terms.part[kPartBad] = 1;
    } else {
      const SmoothL1Table::Row row = tb.row(r);
      terms.add_localization(row.loss, row.balance);
    }
  }
  add_terms<kThreads>(terms, tb.slots, out, scratch);
}

__global__ void __launch_bounds__(kThreads, 3) smooth_l1_fill_kernel(const IOUBAL_GRID_CONSTANT SmoothL1Table tb) {
  if (tb.skip_expected && tb.scale.get() == tb.expected.get()) return;
  for (int64_t r = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; r < tb.rows;
       r += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t scope = tb.scope.get(0, 0, r);
    const SmoothL1Table::Row row = tb.row(r);
    const double w = scope < 0 ? NAN : row.balance * tb.coefficients.loc_norm[scope];
    if (tb.each.data) tb.each.set(r, static_cast<float>(weighted_loss(tb.w_loc * w, row.loss)));
    if (tb.out.data) {
      const double scale =
          tb.grad_rows.data ? tb.w_loc * tb.grad_rows[r] : tb.scale.get() * tb.coefficients.location[0];
      for (int j = 0; j < 4; ++j) tb.out.set(4 * r + j, static_cast<float>(w * scale * row.grad.v[j]));
    }
  }
}

}  // namespace ioubal::cuda
