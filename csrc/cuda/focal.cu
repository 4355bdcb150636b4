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
    plan();
    const StripMemory strips(memory_, dense_);
    tb_.ignored = strips.ignored;
    tb_.clear = strips.clear;
    tb_.clear_words = strips.clear_words;
  }

  FlatCoefficients& coefficients() { return *coefficients_; }

  void find_coefficients() {
    if (!compute_sums_ || tb_.tiles == 0) return coefficients_->launch(device_);
    device_.launch<kPositiveThreads>(focal_positives_kernel, tb_.tiles, tb_, problem_);
    launch_coefficients_and_strips(device_, coefficients_->table, dense_);
  }

  void fill(const Tensor* out, Output output, const NumberRef& scale, const NumberRef& expected, bool may_skip,
            float* loss) {
    FillTable tb{};
    tb.dense = dense_;
    tb.dense.set_scale(scale, expected, may_skip);
    for (int l = 0; out && l < tb.dense.levels; ++l) {
      DenseLevel& level = tb.dense.level[l];
      level.write_to(data_of<char>(*out) + (static_cast<const char*>(level.x) - first_logit()));
    }
    if (loss) tb.dense.partial = memory_.take<float>(tb.dense.all_tiles());
    launch_focal_fill(device_, tb, {dtype_of(logits_), focal_.gamma, output, Layout::kRows, may_skip});
    const LossSum losses = {tb.dense.partial, tb.dense.all_tiles(), nullptr, coefficients_->memory.positives_loss,
                            loss};
    if (loss && losses.tiles > 0) launch_focal_finish(device_, tb, losses);
  }

 private:
  const char* first_logit() const { return static_cast<const char*>(logits_.const_data_ptr()); }

  // Of the dense pass, but for the output.
  void plan() {
    dense_.labels.values = problem_.values;
    dense_.labels.direct = true;
    dense_.labels.classes = problem_.classes;
    dense_.scope = problem_.scope;
    dense_.coefficients = coefficients_->memory.refs();
    dense_.anchors_per_image = logits_.size(0);
    dense_.classes = FastDiv::make(static_cast<u32>(std::max<int64_t>(problem_.classes, 1)));
    dense_.special = tb_.special;
    dense_.words = words_;
    dense_.weight = problem_.weight;
    dense_.row_weight = problem_.row_weight;
    dense_.gamma = static_cast<float>(focal_.gamma);
    dense_.levels = tb_.levels;
    for (int l = 0; l < tb_.levels; ++l) {
      const Level& level = tb_.level[l];
      DenseLevel& dense = dense_.level[l];
      dense.x = first_logit() + level.first_anchor * problem_.classes * static_cast<int64_t>(logits_.element_size());
      dense.size = count32(level.locations * problem_.classes, "a run's logits");
      dense.locations = level.locations;
      dense.anchors = 1;
      dense.first_anchor = level.first_anchor;
      dense.word0 = level.word0;
      dense.words = level.words;
    }
    plan_dense(dense_, dtype_of(logits_), 1);
  }

  const Tensor& logits_;
  OnDevice device_;
  Workspace memory_;
  FocalNumbers focal_;
  bool compute_sums_;
  PositivesTable tb_{};
  FlatFocalProblem problem_{};
  DenseTable dense_{};
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
