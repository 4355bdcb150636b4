// Kernels for any CPU, and the float64 ones of every instruction set.
#include <algorithm>

#include "cpu/isa_body.h"
#include "math/focal.h"
#include "math/softmax.h"

namespace ioubal {
namespace {

#define IOUBAL_ISA 0
#include "cpu/simd.inc"
//
#include "cpu/focal_dense.inc"
#include "cpu/softmax_rows.inc"

// float64 is for gradcheck and the oracle's company: plain scalar code.
double focal_dense_f64(const void* x_, void* out_, int64_t n, double scale, double gamma, const LeftOut& left_out_,
                       Output output, bool, const OctaveTable*) {
  LeftOut left_out = left_out_;
  const double* x = (const double*)x_;
  double* out = (double*)out_;
  double total = 0;
  for (int64_t i = 0; i < n; ++i) {
    Term<double> term = {0, 0};
    uint8_t counts = 0xff;
    if (left_out.mask.period || left_out.reaches(i + 1)) left_out.fill_mask(x + i, i, 1, &counts);
    if (counts) term = focal_negative(x[i], gamma);
    total += term.loss;
    if (output == Output::kGradient) out[i] = scale * term.grad;
    if (output == Output::kLoss) out[i] = scale * term.loss;
  }
  return total;
}

void softmax_rows_f64(SoftmaxTile* next, SoftmaxTile*) {
  if (!next) return;
  SoftmaxTile& tile = *next;
  const int64_t columns = tile.columns;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const double* x = (const double*)tile.x + (tile.order ? tile.order[r] : r) * columns;
    double* out = tile.out ? (double*)tile.out + r * columns : nullptr;
    const int64_t target = tile.target[r];
    if (target < 0) {
      tile.loss[r] = 0;
      if (out) std::fill(out, out + columns, 0.0);
      continue;
    }
    const RowSum<double> row = row_sum<double>([x](int64_t k) { return x[k]; }, columns);
    // What is not the target's, apart: beside a 1 of the target's own, small losses and slopes would lose their digits.
    double rest = 0;
    for (int64_t k = 0; k < columns; ++k) rest += k == target ? 0.0 : std::exp(x[k] - row.top);
    const double own = std::exp(x[target] - row.top);
    // A row's logits may be its gradient's memory.
    const double loss = own == 1.0 ? std::log1p(rest) : std::log(row.sum) + (row.top - x[target]);
    if (out) {
      for (int64_t k = 0; k < columns; ++k) out[k] = std::exp(x[k] - row.top) / row.sum * tile.scale[r];
      out[target] = -rest / row.sum * tile.scale[r];
    }
    tile.loss[r] = loss;
  }
}

}  // namespace

const KernelTable& portable_kernels() {
  static const KernelTable table = {{focal_dense<float>, focal_dense<BFloat16>, focal_dense<Half>, focal_dense_f64},
                                    {softmax_rows<float>, softmax_rows<BFloat16>, softmax_rows<Half>, softmax_rows_f64},
                                    0};
  return table;
}

}  // namespace ioubal
