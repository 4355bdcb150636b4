// IoU-balanced smooth L1 (Eq. 6 and 7) over deltas (P, 4).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/sums.h"
#include "common/tensor_access.h"
#include "cpu/box_tiles.h"

namespace ioubal {
namespace {

constexpr int64_t kRowsPerBlock = 1 << 12;  // fixed: the same sums for any number of threads

class SmoothL1Loss {
 public:
  SmoothL1Loss(const Tensor& pred, const Tensor& target, const OptionalTensor& iou, const OptionalTensor& weight,
               const OptionalTensor& scope_ids, int64_t num_scopes, double lambda, double beta, double w_loc,
               double eps, bool normalize, const std::vector<double>& box_weights)
      : pred_(pred, 4),
        target_(target, 4),
        scopes_(scope_ids, num_scopes),
        rows_(pred.size(0)),
        lambda_(lambda),
        beta_(beta),
        w_loc_(w_loc),
        eps_(eps),
        normalize_(normalize),
        box_weights_(to_quad(box_weights)) {
    if (iou) iou_.emplace(*iou, 1);
    if (weight) weight_.emplace(*weight, weight->dim() == 2 ? 4 : 1);
  }

  void add_up(const Tensor& sums_tensor) const {
    const int64_t per_block = 4 * (1 + scopes_.count());
    std::vector<double> parts(blocks() * per_block);
    for_blocks([&](int64_t b, int64_t begin, int64_t end) {
      const Sums sums{parts.data() + b * per_block};
      sums.shared(Sums::kCount) = static_cast<double>(end - begin);
      if (!normalize_ && !scopes_) return;
      Terms terms;
      for_tiles(begin, end, [&](int64_t first, int64_t rows) {
        if (normalize_) compute(first, rows, terms);
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t scope = scopes_.get(first + i);
          if (scope < 0) {
            sums.shared(Sums::kBad) += 1;
          } else if (normalize_) {
            sums.add(scope, Sums::kLocPlain, terms.loss.v[i], terms.balance.v[i]);
          }
        }
      });
    });
    double* total = static_cast<double*>(sums_tensor.mutable_data_ptr());
    std::fill(total, total + per_block, 0.0);
    for (int64_t b = 0; b < blocks(); ++b) {
      for (int64_t i = 0; i < per_block; ++i) total[i] += parts[b * per_block + i];
    }
  }

  // Sum of the weighted losses; each: the rows' losses; out: out_scale (or the row's element of grad_rows) times the
  // gradient.
  double run(const Tensor& sums_tensor, const Tensor* each, const Tensor* out, double out_scale,
             const Tensor* grad_rows) const {
    const Sums sums = sums_of(sums_tensor);
    std::optional<RowWriter> each_row, gradient;
    std::optional<RowReader> grad_row;
    if (each) each_row.emplace(*each, 1);
    if (out) gradient.emplace(*out, 4);
    if (grad_rows) grad_row.emplace(*grad_rows, 1);
    std::vector<double> parts(blocks());
    for_blocks([&](int64_t b, int64_t begin, int64_t end) {
      double sum = 0;
      Terms terms;
      BoxTile scale;
      for_tiles(begin, end, [&](int64_t first, int64_t rows) {
        compute(first, rows, terms);
        if (grad_row) grad_row->read(first, rows, scale);
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t scope = scopes_.get(first + i);
          double w = scope < 0 ? NAN : w_loc_ * terms.balance.v[i];
          if (normalize_ && scope >= 0) w *= sums.loc_normalizer(scope, eps_);
          terms.loss.v[i] = weighted_loss(w, terms.loss.v[i]);
          sum += terms.loss.v[i];
          const double factor = w * (grad_row ? scale.v[i] : out_scale);
          for (int j = 0; j < 4; ++j) terms.grad.v[4 * i + j] *= factor;
        }
        if (each_row) each_row->write(first, rows, terms.loss.v);
        if (gradient) gradient->write(first, rows, terms.grad.v);
      });
      parts[b] = sum;
    });
    double total = 0;
    for (double part : parts) total += part;
    return total;
  }

 private:
  // A tile's rows: what is read, and what they are without w_loc and the normaliser.
  struct Terms {
    BoxTile pred, target, weight, iou, loss, balance, grad;
  };

  void compute(int64_t first, int64_t rows, Terms& terms) const {
    SmoothL1Tile tile;
    tile.pred = pred_.read(first, rows, terms.pred);
    tile.target = target_.read(first, rows, terms.target);
    tile.weight = weight_ ? weight_->read(first, rows, terms.weight) : nullptr;
    tile.weight_columns = weight_ ? weight_->columns() : 0;
    tile.iou = iou_ && lambda_ != 0 ? iou_->read(first, rows, terms.iou) : nullptr;
    tile.beta = beta_;
    tile.lambda = lambda_;
    tile.loss = terms.loss.v;
    tile.balance = terms.balance.v;
    tile.grad = terms.grad.v;
    box_kernels().smooth_l1(tile, rows, box_weights_);
  }

  int64_t blocks() const { return (rows_ + kRowsPerBlock - 1) / kRowsPerBlock; }

  template <class F>
  void for_blocks(const F& f) const {
    torch::stable::parallel_for(0, blocks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) f(b, b * kRowsPerBlock, std::min(rows_, (b + 1) * kRowsPerBlock));
    });
  }

  RowReader pred_, target_;
  std::optional<RowReader> iou_, weight_;
  Scopes scopes_;
  int64_t rows_;
  double lambda_, beta_, w_loc_, eps_;
  bool normalize_;  // Eq. 7
  Quad<double> box_weights_;
};

void smooth_l1_sums(Tensor pred, Tensor target, OptionalTensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                    int64_t num_scopes, double lambda, double beta, std::vector<double> box_weights, bool normalize,
                    Tensor sums, TensorList) {
  SmoothL1Loss(pred, target, iou, weight, scope_ids, num_scopes, lambda, beta, 1.0, 0.0, normalize, box_weights)
      .add_up(sums);
}

void smooth_l1_fill(Tensor pred, Tensor target, OptionalTensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                    int64_t num_scopes, double lambda, double beta, std::vector<double> box_weights, bool normalize,
                    double w_loc, double eps, OptionalTensor avg_factor, double divisor, double world_size,
                    OptionalTensor grad_scale_tensor, double grad_scale, bool compute_sums, Tensor sums, Tensor loss,
                    TensorList grads, TensorList) {
  const SmoothL1Loss op(pred, target, iou, weight, scope_ids, num_scopes, lambda, beta, w_loc, eps, normalize,
                        box_weights);
  if (compute_sums) op.add_up(sums);
  const double divide_by = divisor_of(avg_factor, divisor, sums_of(sums).default_divisor(world_size));
  const double expected = Number(grad_scale_tensor, grad_scale).get();
  const Tensor* out = grads.empty() ? nullptr : &grads[0];
  FloatWriter(loss).set(0, op.run(sums, nullptr, out, expected / divide_by, nullptr) / divide_by);
}

void smooth_l1_backward(Tensor pred, Tensor target, OptionalTensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                        int64_t num_scopes, double lambda, double beta, std::vector<double> box_weights, bool normalize,
                        double w_loc, double eps, OptionalTensor avg_factor, double divisor, double world_size,
                        OptionalTensor grad_scale_tensor, double grad_scale, bool filled, Tensor sums,
                        Tensor grad_output, Tensor grad, TensorList) {
  const double scale = FloatReader(grad_output)[0];
  if (filled && scale == Number(grad_scale_tensor, grad_scale).get()) return;
  const SmoothL1Loss op(pred, target, iou, weight, scope_ids, num_scopes, lambda, beta, w_loc, eps, normalize,
                        box_weights);
  const double divide_by = divisor_of(avg_factor, divisor, sums_of(sums).default_divisor(world_size));
  op.run(sums, nullptr, &grad, scale / divide_by, nullptr);
}

// reduction = "none": the rows' losses (P,), or with grad_output (P,) the gradient.
void smooth_l1_elementwise(Tensor pred, Tensor target, OptionalTensor iou, OptionalTensor weight,
                           OptionalTensor scope_ids, int64_t num_scopes, double lambda, double beta,
                           std::vector<double> box_weights, bool normalize, double w_loc, double eps,
                           OptionalTensor grad_output, bool compute_sums, Tensor sums, Tensor out, TensorList) {
  const SmoothL1Loss op(pred, target, iou, weight, scope_ids, num_scopes, lambda, beta, w_loc, eps, normalize,
                        box_weights);
  if (compute_sums) op.add_up(sums);
  if (grad_output) {
    op.run(sums, nullptr, &out, 0.0, &*grad_output);
  } else {
    op.run(sums, &out, nullptr, 0.0, nullptr);
  }
}

}  // namespace
}  // namespace ioubal

STABLE_TORCH_LIBRARY_IMPL(ioubal, CPU, m) {
  m.impl("smooth_l1_sums.cpp", TORCH_BOX(&ioubal::smooth_l1_sums));
  m.impl("smooth_l1_fill.cpp", TORCH_BOX(&ioubal::smooth_l1_fill));
  m.impl("smooth_l1_backward.cpp", TORCH_BOX(&ioubal::smooth_l1_backward));
  m.impl("smooth_l1_elementwise.cpp", TORCH_BOX(&ioubal::smooth_l1_elementwise));
}
