// IoU-balanced smooth L1 (Eq. 6 and 7) over deltas (P, 4).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/sums.h"
#include "common/tensor_access.h"
#include "cpu/power.h"
#include "math/iou.h"
#include "math/smooth_l1.h"

namespace ioubal {
namespace {

constexpr int64_t kRowsPerBlock = 1 << 12;  // fixed: the same sums for any number of threads

class SmoothL1Loss {
 public:
  SmoothL1Loss(const Tensor& pred, const Tensor& target, const OptionalTensor& iou, const OptionalTensor& weight,
               const OptionalTensor& scope_ids, int64_t num_scopes, double lambda, double beta, double w_loc,
               double eps, bool normalize, const std::vector<double>& box_weights)
      : pred_(pred),
        target_(target),
        iou_(iou),
        weight_(weight),
        weight_columns_(weight ? weight->dim() : 0),
        scopes_(scope_ids, num_scopes),
        rows_(pred.size(0)),
        lambda_(lambda),
        beta_(beta),
        w_loc_(w_loc),
        eps_(eps),
        normalize_(normalize),
        box_weights_(to_quad(box_weights)) {}

  void add_up(const Tensor& sums_tensor) const {
    const int64_t per_block = 4 * (1 + scopes_.count());
    std::vector<double> parts(blocks() * per_block);
    for_blocks([&](int64_t b, int64_t first, int64_t last) {
      const Sums sums{parts.data() + b * per_block};
      sums.shared(Sums::kCount) = static_cast<double>(last - first);
      for (int64_t r = first; r < last; ++r) {
        const int64_t scope = scopes_.get(r);
        if (scope < 0) {
          sums.shared(Sums::kBad) += 1;
        } else if (normalize_) {
          const Row terms = row(r);
          sums.add(scope, Sums::kLocPlain, terms.loss, terms.balance);
        }
      }
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
    std::optional<FloatWriter> each_row, gradient;
    std::optional<FloatReader> grad_row;
    if (each) each_row.emplace(*each);
    if (out) gradient.emplace(*out);
    if (grad_rows) grad_row.emplace(*grad_rows);
    std::vector<double> parts(blocks());
    for_blocks([&](int64_t b, int64_t first, int64_t last) {
      double sum = 0;
      for (int64_t r = first; r < last; ++r) {
        const int64_t scope = scopes_.get(r);
        const Row terms = row(r);
        double w = scope < 0 ? NAN : w_loc_ * terms.balance;
        if (normalize_ && scope >= 0) w *= sums.loc_normalizer(scope, eps_);
        const double loss = weighted_loss(w, terms.loss);
        if (each_row) each_row->set(r, loss);
        if (gradient) {
          const double scale = w * (grad_row ? (*grad_row)[r] : out_scale);
          for (int j = 0; j < 4; ++j) gradient->set(4 * r + j, scale * terms.grad.v[j]);
        }
        sum += loss;
      }
      parts[b] = sum;
    });
    double total = 0;
    for (double part : parts) total += part;
    return total;
  }

 private:
  struct Row {
    double loss, balance;
    Quad<double> grad;
  };

  Row row(int64_t r) const {
    const Quad<double> p = pred_.quad(4 * r, 1), t = target_.quad(4 * r, 1);
    Row out;
    out.loss = 0;
    for (int j = 0; j < 4; ++j) {
      const Term<double> term = smooth_l1(p.v[j] - t.v[j], beta_);
      const double w = weight_.get(weight_columns_ == 2 ? 4 * r + j : r, 1.0);
      out.loss += w * term.loss;
      out.grad.v[j] = w * term.grad;
    }
    out.balance = 1.0;
    if (lambda_ != 0) {
      out.balance = fast_iou_power(iou_ ? iou_.reader()[r] : delta_iou(p, t, box_weights_, BoxCoder::kDelta), lambda_);
    }
    return out;
  }

  int64_t blocks() const { return (rows_ + kRowsPerBlock - 1) / kRowsPerBlock; }

  template <class F>
  void for_blocks(const F& f) const {
    torch::stable::parallel_for(0, blocks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) f(b, b * kRowsPerBlock, std::min(rows_, (b + 1) * kRowsPerBlock));
    });
  }

  FloatReader pred_, target_;
  OptionalFloats iou_, weight_;
  int64_t weight_columns_;
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
