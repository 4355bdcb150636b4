// IoU-balanced sigmoid focal loss and binary cross entropy over flat logits (R, K) on CUDA.
#include "cuda/focal.cuh"

#include "cuda/flat.h"
#include "cuda/focal_fill.h"

namespace ioubal::cuda {
namespace {

// Rows in runs of less than 2^31 logits, each a level of the dense pass.
constexpr int64_t kRunElements = int64_t(1) << 30;

class FlatFocal {
 public:
  FlatFocal(const Tensor& logits, const Tensor& labels, const Tensor& iou, const OptionalTensor& weight,
            const OptionalTensor& scope_ids, int64_t num_scopes, const FocalNumbers& focal, const Tensor& sums,
            bool compute_sums, const TensorList& workspace)
      : logits_(logits), device_(logits), memory_(workspace), focal_(focal), compute_sums_(compute_sums) {
    const int64_t rows = logits.size(0), classes = logits.size(1);
    problem_ = {int_ref(labels),
                float_ref(logits),
                float_ref(iou),
                float_ref(weight),
                flat_scope(scope_ids, num_scopes),
                classes,
                focal,
                nullptr};
    const int64_t step = std::max<int64_t>(kRunElements / std::max<int64_t>(classes, 1) / kWarp, 1) * kWarp;
    STD_TORCH_CHECK(rows <= step * kMaxLevels && rows < (int64_t(1) << 31), "ioubal_kernels: too many rows, ", rows);
    for (int64_t first = 0; first < rows && classes > 0; first += step) {
      Level& level = tb_.level[tb_.levels++];
      level = {};
      level.locations = static_cast<u32>(std::min(step, rows - first));
      level.width = level.anchors = 1;
      level.first_anchor = static_cast<u32>(first);
      level.words = divide_up(level.locations, kWarp);
      level.word0 = words_;
      level.tile0 = tb_.tiles;
      level.tiles = TileShape(1).tiles(level.words);
      words_ += level.words;
      tb_.tiles += level.tiles;
    }
    tb_.slots = num_scopes;
    tb_.anchors_per_image = rows;
    tb_.partial = memory_.take<double>(tb_.tiles * num_scopes * kPartials);
    coefficients_.emplace(memory_, tb_.partial, tb_.tiles, num_scopes, sums, compute_sums);
    coefficients_->table.focal = focal;
    tb_.special = memory_.take<u32>(words_);
    problem_.weight = memory_.take<float>(rows);
  }

  FlatCoefficients& coefficients() { return *coefficients_; }

  void find_coefficients() {
    if (compute_sums_) device_.launch<kPositiveThreads>(focal_positives_kernel, tb_.tiles, tb_, problem_);
    coefficients_->launch(device_);
  }

  void fill(const Tensor* out, Output output, const NumberRef& scale, const NumberRef& expected, bool may_skip,
            float* loss) {
    FillTable tb{};
    tb.dense.labels.values = problem_.values;
    tb.dense.labels.direct = true;
    tb.dense.labels.classes = problem_.classes;
    tb.dense.scope = problem_.scope;
    tb.dense.coefficients = coefficients_->memory.refs();
    tb.dense.anchors_per_image = logits_.size(0);
    tb.dense.classes = FastDiv::make(static_cast<u32>(std::max<int64_t>(problem_.classes, 1)));
    tb.dense.special = tb_.special;
    tb.dense.weight = problem_.weight;
    tb.dense.row_weight = problem_.row_weight;
    tb.dense.gamma = static_cast<float>(focal_.gamma);
    tb.dense.scale = scale;
    tb.dense.expected = expected;
    tb.dense.skip_expected = may_skip;
    tb.dense.levels = tb_.levels;
    for (int l = 0; l < tb_.levels; ++l) {
      const Level& level = tb_.level[l];
      DenseLevel& dense = tb.dense.level[l];
      const int64_t first = level.first_anchor * problem_.classes * static_cast<int64_t>(logits_.element_size());
      dense.x = static_cast<const char*>(logits_.const_data_ptr()) + first;
      if (out) dense.out = data_of<char>(*out) + first;
      dense.rows = level.locations;
      dense.first_anchor = level.first_anchor;
      dense.word0 = level.word0;
      dense.words = level.words;
    }
    FillVariant variant = {dtype_of(logits_), focal_.gamma, output, DenseLayout::kRows, may_skip, true, false, 0};
    plan_rows(device_, tb.dense, variant, 1);
    if (loss) {
      tb.dense.partial = memory_.take<float>(tb.dense.tiles);
      tb.finish = {tb.dense.partial, tb.dense.tiles, coefficients_->memory.ticket, coefficients_->memory.positives_loss,
                   loss};
    }
    launch_focal_fill(device_, tb, variant);
  }

 private:
  const Tensor& logits_;
  OnDevice device_;
  Workspace memory_;
  FocalNumbers focal_;
  bool compute_sums_;
  PositivesTable tb_{};
  FlatFocalProblem problem_{};
  std::optional<FlatCoefficients> coefficients_;
  u32 words_ = 0;
};

void focal_sums(Tensor logits, Tensor labels, Tensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                int64_t num_scopes, double eta, double alpha, double gamma, Tensor sums, TensorList workspace) {
  FlatFocal op(logits, labels, iou, weight, scope_ids, num_scopes, {eta, alpha, gamma}, sums, true, workspace);
  op.find_coefficients();
}

// compute_sums false: `workspace` is as focal_sums left it, and `sums` holds those of all ranks.
void focal_fill(Tensor logits, Tensor labels, Tensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                int64_t num_scopes, double eta, double alpha, double gamma, double eps, OptionalTensor avg_factor,
                double divisor, double world_size, OptionalTensor grad_scale_tensor, double grad_scale,
                bool compute_sums, Tensor sums, Tensor loss, TensorList grads, TensorList workspace) {
  FlatFocal op(logits, labels, iou, weight, scope_ids, num_scopes, {eta, alpha, gamma}, sums, compute_sums, workspace);
  op.coefficients().divide_by(avg_factor, divisor, world_size);
  op.coefficients().table.eps = eps;
  op.coefficients().table.cls_loss = data_of<float>(loss);
  op.find_coefficients();
  const NumberRef expected = number_ref(grad_scale_tensor, grad_scale);
  op.fill(grads.empty() ? nullptr : &grads[0], grads.empty() ? kNone : kGradient, expected, expected, false,
          data_of<float>(loss));
}

// Leaves a gradient filled for the expected grad_output as it is, else computes it anew; `workspace` is as focal_fill
// left it.
void focal_backward(Tensor logits, Tensor labels, Tensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                    int64_t num_scopes, double eta, double alpha, double gamma, double, OptionalTensor, double, double,
                    OptionalTensor grad_scale_tensor, double grad_scale, bool filled, Tensor sums, Tensor grad_output,
                    Tensor grad, TensorList workspace) {
  FlatFocal op(logits, labels, iou, weight, scope_ids, num_scopes, {eta, alpha, gamma}, sums, false, workspace);
  op.fill(&grad, kGradient, number_ref(grad_output, 0.0), number_ref(grad_scale_tensor, grad_scale), filled, nullptr);
}

// reduction = "none": the loss of every entry (`gradient` false) or its derivative.
void focal_elementwise(Tensor logits, Tensor labels, Tensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                       int64_t num_scopes, double eta, double alpha, double gamma, double eps, bool gradient,
                       bool compute_sums, Tensor sums, Tensor out, TensorList workspace) {
  FlatFocal op(logits, labels, iou, weight, scope_ids, num_scopes, {eta, alpha, gamma}, sums, compute_sums, workspace);
  op.coefficients().table.eps = eps;
  op.find_coefficients();
  op.fill(&out, gradient ? kGradient : kLoss, number_ref(1.0), number_ref(1.0), false, nullptr);
}

}  // namespace
}  // namespace ioubal::cuda

STABLE_TORCH_LIBRARY_IMPL(ioubal, IOUBAL_CUDA_KEY, m) {
  m.impl(IOUBAL_CUDA_OP("focal_sums"), TORCH_BOX(&ioubal::cuda::focal_sums));
  m.impl(IOUBAL_CUDA_OP("focal_fill"), TORCH_BOX(&ioubal::cuda::focal_fill));
  m.impl(IOUBAL_CUDA_OP("focal_backward"), TORCH_BOX(&ioubal::cuda::focal_backward));
  m.impl(IOUBAL_CUDA_OP("focal_elementwise"), TORCH_BOX(&ioubal::cuda::focal_elementwise));
}
