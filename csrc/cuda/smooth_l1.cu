// IoU-balanced smooth L1 (Eq. 6 and 7) over deltas (P, 4) on CUDA.
#include "cuda/smooth_l1.cuh"

#include "cuda/flat.h"

namespace ioubal::cuda {
namespace {

class SmoothL1Loss {
 public:
  SmoothL1Loss(const Tensor& pred, const Tensor& target, const OptionalTensor& iou, const OptionalTensor& weight,
               const OptionalTensor& scope_ids, int64_t num_scopes, double lambda, double beta,
               const std::vector<double>& box_weights, bool normalize, double w_loc, const Tensor& sums,
               bool compute_sums, const TensorList& workspace)
      : device_(pred), memory_(workspace), compute_sums_(compute_sums) {
    tb_.pred = float_ref(pred);
    tb_.target = float_ref(target);
    tb_.iou = float_ref(iou);
    tb_.weight = float_ref(weight);
    tb_.weight_columns = weight ? static_cast<int>(weight->dim()) : 0;
    tb_.rows = pred.size(0);
    tb_.tiles = divide_up(tb_.rows, kThreads);
    tb_.scope = flat_scope(scope_ids, num_scopes);
    tb_.lambda = lambda;
    tb_.beta = beta;
    tb_.w_loc = w_loc;
    tb_.box_weights = to_quad(box_weights);
    tb_.slots = num_scopes;
    tb_.positives = memory_.take<double>(tb_.tiles * num_scopes * kPartials);
    coefficients_.emplace(memory_, tb_.positives, tb_.tiles, num_scopes, sums, compute_sums);
    coefficients_->table.normalize_loc = normalize;
    coefficients_->table.w_loc = w_loc;
    tb_.coefficients = coefficients_->memory.refs();
  }

  FlatCoefficients& coefficients() { return *coefficients_; }
  SmoothL1Table& table() { return tb_; }

  void find_coefficients() {
    if (compute_sums_) device_.launch(smooth_l1_positives_kernel, tb_.tiles, tb_);
    coefficients_->launch(device_);
  }

  void fill(const NumberRef& scale, const NumberRef& expected, bool may_skip) {
    tb_.scale = scale;
    tb_.expected = expected;
    tb_.skip_expected = may_skip;
    launch_pass(device_, smooth_l1_fill_kernel, tb_.tiles, may_skip, tb_);
  }

 private:
  OnDevice device_;
  Workspace memory_;
  bool compute_sums_;
  SmoothL1Table tb_{};
  std::optional<FlatCoefficients> coefficients_;
};

void smooth_l1_sums(Tensor pred, Tensor target, OptionalTensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                    int64_t num_scopes, double lambda, double beta, std::vector<double> box_weights, bool normalize,
                    Tensor sums, TensorList workspace) {
  SmoothL1Loss op(pred, target, iou, weight, scope_ids, num_scopes, lambda, beta, box_weights, normalize, 1.0, sums,
                  true, workspace);
  op.find_coefficients();
}

// The loss is known with the coefficients; the rows are read again for their gradient only.
void smooth_l1_fill(Tensor pred, Tensor target, OptionalTensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                    int64_t num_scopes, double lambda, double beta, std::vector<double> box_weights, bool normalize,
                    double w_loc, double eps, OptionalTensor avg_factor, double divisor, double world_size,
                    OptionalTensor grad_scale_tensor, double grad_scale, bool compute_sums, Tensor sums, Tensor loss,
                    TensorList grads, TensorList workspace) {
  SmoothL1Loss op(pred, target, iou, weight, scope_ids, num_scopes, lambda, beta, box_weights, normalize, w_loc, sums,
                  compute_sums, workspace);
  op.coefficients().divide_by(avg_factor, divisor, world_size);
  op.coefficients().table.eps = eps;
  op.coefficients().table.loc_loss = data_of<float>(loss);
  op.find_coefficients();
  if (grads.empty()) return;
  op.table().out = float_out(grads[0]);
  const NumberRef expected = number_ref(grad_scale_tensor, grad_scale);
  op.fill(expected, expected, false);
}

void smooth_l1_backward(Tensor pred, Tensor target, OptionalTensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                        int64_t num_scopes, double lambda, double beta, std::vector<double> box_weights, bool normalize,
                        double w_loc, double, OptionalTensor, double, double, OptionalTensor grad_scale_tensor,
                        double grad_scale, bool filled, Tensor sums, Tensor grad_output, Tensor grad,
                        TensorList workspace) {
  SmoothL1Loss op(pred, target, iou, weight, scope_ids, num_scopes, lambda, beta, box_weights, normalize, w_loc, sums,
                  false, workspace);
  op.table().out = float_out(grad);
  op.fill(number_ref(grad_output, 0.0), number_ref(grad_scale_tensor, grad_scale), filled);
}

// reduction = "none": the rows' losses (P,), or with grad_output (P,) the gradient.
void smooth_l1_elementwise(Tensor pred, Tensor target, OptionalTensor iou, OptionalTensor weight,
                           OptionalTensor scope_ids, int64_t num_scopes, double lambda, double beta,
                           std::vector<double> box_weights, bool normalize, double w_loc, double eps,
                           OptionalTensor grad_output, bool compute_sums, Tensor sums, Tensor out,
                           TensorList workspace) {
  SmoothL1Loss op(pred, target, iou, weight, scope_ids, num_scopes, lambda, beta, box_weights, normalize, w_loc, sums,
                  compute_sums, workspace);
  op.coefficients().table.eps = eps;
  op.find_coefficients();
  if (grad_output) {
    op.table().out = float_out(out);
    op.table().grad_rows = float_ref(grad_output);
  } else {
    op.table().each = float_out(out);
  }
  op.fill(number_ref(1.0), number_ref(1.0), false);
}

}  // namespace
}  // namespace ioubal::cuda

STABLE_TORCH_LIBRARY_IMPL(ioubal, IOUBAL_CUDA_KEY, m) {
  m.impl(IOUBAL_CUDA_OP("smooth_l1_sums"), TORCH_BOX(&ioubal::cuda::smooth_l1_sums));
  m.impl(IOUBAL_CUDA_OP("smooth_l1_fill"), TORCH_BOX(&ioubal::cuda::smooth_l1_fill));
  m.impl(IOUBAL_CUDA_OP("smooth_l1_backward"), TORCH_BOX(&ioubal::cuda::smooth_l1_backward));
  m.impl(IOUBAL_CUDA_OP("smooth_l1_elementwise"), TORCH_BOX(&ioubal::cuda::smooth_l1_elementwise));
}
