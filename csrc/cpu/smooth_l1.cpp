// IoU-balanced smooth L1 (Eq. 6 and 7) over deltas (P, 4).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/sums.h"
#include "common/tensor_access.h"
#include "math/iou.h"
#include "math/smooth_l1.h"

namespace ioubal {
namespace {

constexpr int64_t kRowsPerBlock = 1 << 12;  // fixed: the same sums for any number of threads

struct SmoothL1Loss {
  const Tensor &pred, &target;
  const OptionalTensor &iou, &weight, &scope_ids;
  int64_t num_scopes;
  double lambda, beta, w_loc, eps;
  bool normalize;  // Eq. 7
  Quad<double> box_weights;

  int64_t rows() const { return pred.size(0); }
  int64_t blocks() const { return (rows() + kRowsPerBlock - 1) / kRowsPerBlock; }

  struct Row {
    double loss, balance;
    Quad<double> grad;
  };

  Row row(int64_t r) const {
    const Quad<double> p = FloatReader(pred).quad(4 * r, 1), t = FloatReader(target).quad(4 * r, 1);
    Quad<double> w = {{1, 1, 1, 1}};
    if (weight && weight->dim() == 2) w = FloatReader(*weight).quad(4 * r, 1);
    if (weight && weight->dim() == 1) w.v[0] = w.v[1] = w.v[2] = w.v[3] = FloatReader(*weight)[r];
    Row out;
    out.loss = 0;
    for (int j = 0; j < 4; ++j) {
      const Term<double> term = smooth_l1(p.v[j] - t.v[j], beta);
      out.loss += w.v[j] * term.loss;
      out.grad.v[j] = w.v[j] * term.grad;
    }
    const double overlap = iou ? FloatReader(*iou)[r] : delta_iou(p, t, box_weights, BoxCoder::kDelta);
    out.balance = iou_power(overlap, lambda);
    return out;
  }

  int64_t scope_of(int64_t r) const { return scope_ids ? IntReader(*scope_ids)[r] : 0; }

  template <class F>
  void for_blocks(const F& f) const {
    torch::stable::parallel_for(0, blocks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) f(b, b * kRowsPerBlock, std::min(rows(), (b + 1) * kRowsPerBlock));
    });
  }

  void add_up(const Tensor& sums_tensor) const {
    const int64_t per_block = 4 * (1 + num_scopes);
    std::vector<double> parts(blocks() * per_block);
    for_blocks([&](int64_t b, int64_t first, int64_t last) {
      const Sums sums{parts.data() + b * per_block};
      sums.shared(Sums::kCount) = static_cast<double>(last - first);
      for (int64_t r = first; r < last; ++r) {
        const int64_t scope = scope_of(r);
        if (scope < 0 || scope >= num_scopes) {
          sums.shared(Sums::kBad) += 1;
        } else if (normalize) {
          const Row terms = row(r);
          sums.scope(scope, Sums::kLocPlain) += terms.loss;
          sums.scope(scope, Sums::kLocWeighted) += terms.loss * terms.balance;
        }
      }
    });
    double* total = static_cast<double*>(sums_tensor.mutable_data_ptr());
    std::fill(total, total + per_block, 0.0);
    for (int64_t b = 0; b < blocks(); ++b) {
      for (int64_t i = 0; i < per_block; ++i) total[i] += parts[b * per_block + i];
    }
  }

  double divisor_of(const Sums& sums, const OptionalTensor& avg_factor, double divisor, double world_size) const {
    const Number given(avg_factor, divisor);
    return given.is_tensor() || divisor > 0 ? given.get() : sums.positives_divisor(world_size);
  }

  // Sum of the weighted losses; each: the rows' losses; out: out_scale (or the row's element of grad_rows) times the
  // gradient.
  double run(const Tensor& sums_tensor, const Tensor* each, const Tensor* out, double out_scale,
             const Tensor* grad_rows) const {
    const Sums sums{static_cast<double*>(sums_tensor.mutable_data_ptr())};
    std::vector<double> parts(blocks());
    for_blocks([&](int64_t b, int64_t first, int64_t last) {
      double sum = 0;
      for (int64_t r = first; r < last; ++r) {
        const int64_t scope = scope_of(r);
        const bool usable = scope >= 0 && scope < num_scopes;
        const Row terms = row(r);
        double w = usable ? w_loc * terms.balance : NAN;
        if (normalize && usable) w *= sums.loc_normalizer(scope, eps);
        if (each) FloatWriter(*each).set(r, w * terms.loss);
        if (out) {
          const double scale = w * (grad_rows ? FloatReader(*grad_rows)[r] : out_scale);
          for (int j = 0; j < 4; ++j) FloatWriter(*out).set(4 * r + j, scale * terms.grad.v[j]);
        }
        sum += w * terms.loss;
      }
      parts[b] = sum;
    });
    double total = 0;
    for (double part : parts) total += part;
    return total;
  }
};

void smooth_l1_sums(Tensor pred, Tensor target, OptionalTensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                    int64_t num_scopes, double lambda, double beta, std::vector<double> box_weights, bool normalize,
                    Tensor sums) {
  SmoothL1Loss{pred,   target, iou, weight, scope_ids, num_scopes,
               lambda, beta,   1.0, 0.0,    normalize, to_quad(box_weights)}
      .add_up(sums);
}

void smooth_l1_fill(Tensor pred, Tensor target, OptionalTensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                    int64_t num_scopes, double lambda, double beta, std::vector<double> box_weights, bool normalize,
                    double w_loc, double eps, OptionalTensor avg_factor, double divisor, double world_size,
                    OptionalTensor grad_scale_tensor, double grad_scale, bool compute_sums, Tensor sums, Tensor loss,
                    TensorList grads) {
  const SmoothL1Loss op{pred,   target, iou,   weight, scope_ids, num_scopes,
                        lambda, beta,   w_loc, eps,    normalize, to_quad(box_weights)};
  if (compute_sums) op.add_up(sums);
  const double divide_by =
      op.divisor_of({static_cast<double*>(sums.mutable_data_ptr())}, avg_factor, divisor, world_size);
  const double expected = Number(grad_scale_tensor, grad_scale).get();
  const Tensor* out = grads.empty() ? nullptr : &grads[0];
  FloatWriter(loss).set(0, op.run(sums, nullptr, out, expected / divide_by, nullptr) / divide_by);
}

void smooth_l1_backward(Tensor pred, Tensor target, OptionalTensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                        int64_t num_scopes, double lambda, double beta, std::vector<double> box_weights, bool normalize,
                        double w_loc, double eps, OptionalTensor avg_factor, double divisor, double world_size,
                        OptionalTensor grad_scale_tensor, double grad_scale, bool filled, Tensor sums,
                        Tensor grad_output, Tensor grad) {
  const double scale = FloatReader(grad_output)[0];
  if (filled && scale == Number(grad_scale_tensor, grad_scale).get()) return;
  const SmoothL1Loss op{pred,   target, iou,   weight, scope_ids, num_scopes,
                        lambda, beta,   w_loc, eps,    normalize, to_quad(box_weights)};
  const double divide_by =
      op.divisor_of({static_cast<double*>(sums.mutable_data_ptr())}, avg_factor, divisor, world_size);
  op.run(sums, nullptr, &grad, scale / divide_by, nullptr);
}

// reduction = "none": the rows' losses (P,), or with grad_output (P,) the gradient.
void smooth_l1_elementwise(Tensor pred, Tensor target, OptionalTensor iou, OptionalTensor weight,
                           OptionalTensor scope_ids, int64_t num_scopes, double lambda, double beta,
                           std::vector<double> box_weights, bool normalize, double w_loc, double eps,
                           OptionalTensor grad_output, bool compute_sums, Tensor sums, Tensor out) {
  const SmoothL1Loss op{pred,   target, iou,   weight, scope_ids, num_scopes,
                        lambda, beta,   w_loc, eps,    normalize, to_quad(box_weights)};
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
