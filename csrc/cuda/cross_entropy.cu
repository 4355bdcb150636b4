// IoU-balanced softmax cross entropy over logits (R, K) on CUDA.
#include "cuda/cross_entropy.cuh"

#include "cuda/flat.h"

namespace ioubal::cuda {
namespace {

template <class T>
void launch_rows(const OnDevice& device, const CrossEntropyTable& tb, bool positives, bool may_skip) {
  const auto launch = [&](auto* sums, auto* fill) {
    positives ? device.launch(sums, tb.tiles, tb) : launch_pass(device, fill, tb.tiles, may_skip, tb);
  };
  if (tb.columns <= kShortRow * kRowLanes<kShortRow>) {
    launch(cross_entropy_positives_kernel<T, kShortRow>, cross_entropy_fill_kernel<T, kShortRow>);
  } else if (tb.columns <= kMiddleRow * kRowLanes<kMiddleRow>) {
    launch(cross_entropy_positives_kernel<T, kMiddleRow>, cross_entropy_fill_kernel<T, kMiddleRow>);
  } else {
    launch(cross_entropy_positives_kernel<T, kLongRow>, cross_entropy_fill_kernel<T, kLongRow>);
  }
}

class SoftmaxLoss {
 public:
  SoftmaxLoss(const Tensor& logits, const Tensor& labels, const Tensor& iou, const OptionalTensor& weight,
              const OptionalTensor& scope_ids, int64_t num_scopes, int64_t background, double eta, const Tensor& sums,
              bool compute_sums, const TensorList& workspace)
      : type_(dtype_of(logits)), device_(logits), memory_(workspace), compute_sums_(compute_sums) {
    tb_.logits = logits.const_data_ptr();
    tb_.rows = logits.size(0);
    tb_.columns = count32(logits.size(1), "a row's logits");
    tb_.background = background;
    tb_.tiles = tb_.columns > 0 ? divide_up(tb_.rows, kRowsPerTile) : 0;
    tb_.labels = int_ref(labels);
    tb_.iou = float_ref(iou);
    tb_.weight = float_ref(weight);
    tb_.scope = flat_scope(scope_ids, num_scopes);
    tb_.eta = eta;
    tb_.slots = num_scopes;
    tb_.positives = memory_.take<double>(tb_.tiles * num_scopes * kPartials);
    coefficients_.emplace(memory_, tb_.positives, tb_.tiles, num_scopes, sums, compute_sums);
    coefficients_->table.rows_count_all = true;
    tb_.coefficients = coefficients_->memory.refs();
  }

  FlatCoefficients& coefficients() { return *coefficients_; }
  CrossEntropyTable& table() { return tb_; }

  void find_coefficients() {
    if (compute_sums_) launch(true, false);
    coefficients_->launch(device_);
  }

  void fill(const NumberRef& scale, const NumberRef& expected, bool may_skip, float* loss) {
    tb_.scale = scale;
    tb_.expected = expected;
    tb_.skip_expected = may_skip;
    if (loss) {
      tb_.partial = memory_.take<float>(tb_.tiles);
      tb_.finish = {tb_.partial, tb_.tiles, coefficients_->memory.ticket, coefficients_->memory.positives_loss, loss};
    }
    launch(false, may_skip);
  }

 private:
  void launch(bool positives, bool may_skip) const {
    switch (type_) {
      case Dtype::kFloat32: return launch_rows<float>(device_, tb_, positives, may_skip);
      case Dtype::kBFloat16: return launch_rows<BFloat16>(device_, tb_, positives, may_skip);
      default: return launch_rows<Float16>(device_, tb_, positives, may_skip);
    }
  }

  Dtype type_;
  OnDevice device_;
  Workspace memory_;
  bool compute_sums_;
  CrossEntropyTable tb_{};
  std::optional<FlatCoefficients> coefficients_;
};

void cross_entropy_sums(Tensor logits, Tensor labels, Tensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                        int64_t num_scopes, int64_t background, double eta, Tensor sums, TensorList workspace) {
  SoftmaxLoss op(logits, labels, iou, weight, scope_ids, num_scopes, background, eta, sums, true, workspace);
  op.find_coefficients();
}

void cross_entropy_fill(Tensor logits, Tensor labels, Tensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                        int64_t num_scopes, int64_t background, double eta, double eps, OptionalTensor avg_factor,
                        double divisor, double world_size, OptionalTensor grad_scale_tensor, double grad_scale,
                        bool compute_sums, Tensor sums, Tensor loss, TensorList grads, TensorList workspace) {
  SoftmaxLoss op(logits, labels, iou, weight, scope_ids, num_scopes, background, eta, sums, compute_sums, workspace);
  op.coefficients().divide_by(avg_factor, divisor, world_size);
  op.coefficients().table.eps = eps;
  op.coefficients().table.cls_loss = data_of<float>(loss);
  op.find_coefficients();
  if (!grads.empty()) op.table().out = grads[0].mutable_data_ptr();
  const NumberRef expected = number_ref(grad_scale_tensor, grad_scale);
  op.fill(expected, expected, false, data_of<float>(loss));
}

void cross_entropy_backward(Tensor logits, Tensor labels, Tensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                            int64_t num_scopes, int64_t background, double eta, double, OptionalTensor, double, double,
                            OptionalTensor grad_scale_tensor, double grad_scale, bool filled, Tensor sums,
                            Tensor grad_output, Tensor grad, TensorList workspace) {
  SoftmaxLoss op(logits, labels, iou, weight, scope_ids, num_scopes, background, eta, sums, false, workspace);
  op.table().out = grad.mutable_data_ptr();
  op.fill(number_ref(grad_output, 0.0), number_ref(grad_scale_tensor, grad_scale), filled, nullptr);
}

// reduction = "none": the rows' losses, or with grad_output (R,) the gradient.
void cross_entropy_elementwise(Tensor logits, Tensor labels, Tensor iou, OptionalTensor weight,
                               OptionalTensor scope_ids, int64_t num_scopes, int64_t background, double eta, double eps,
                               OptionalTensor grad_output, bool compute_sums, Tensor sums, Tensor out,
                               TensorList workspace) {
  SoftmaxLoss op(logits, labels, iou, weight, scope_ids, num_scopes, background, eta, sums, compute_sums, workspace);
  op.coefficients().table.eps = eps;
  op.find_coefficients();
  if (grad_output) {
    op.table().out = out.mutable_data_ptr();
    op.table().grad_rows = float_ref(grad_output);
  } else {
    op.table().each = float_out(out);
  }
  op.fill(number_ref(1.0), number_ref(1.0), false, nullptr);
}

}  // namespace
}  // namespace ioubal::cuda

STABLE_TORCH_LIBRARY_IMPL(ioubal, IOUBAL_CUDA_KEY, m) {
  m.impl(IOUBAL_CUDA_OP("cross_entropy_sums"), TORCH_BOX(&ioubal::cuda::cross_entropy_sums));
  m.impl(IOUBAL_CUDA_OP("cross_entropy_fill"), TORCH_BOX(&ioubal::cuda::cross_entropy_fill));
  m.impl(IOUBAL_CUDA_OP("cross_entropy_backward"), TORCH_BOX(&ioubal::cuda::cross_entropy_backward));
  m.impl(IOUBAL_CUDA_OP("cross_entropy_elementwise"), TORCH_BOX(&ioubal::cuda::cross_entropy_elementwise));
}
