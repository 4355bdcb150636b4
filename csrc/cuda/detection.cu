// The fused IoU-balanced detection loss on CUDA: positives, coefficients, dense pass.
#include "cuda/detection.cuh"

#include "cuda/focal_fill.h"
#include "cuda/ground_truth.h"

namespace ioubal::cuda {
namespace {

DeltaPlace delta_place(const Tensor& t) {
  DeltaPlace place = {t.stride(0), 0, 0, 0, 0};
  if (t.dim() == 3) {
    place.row = t.stride(1);
    place.coordinate = t.stride(2);
  } else {
    place.coordinate = t.stride(1);
    place.anchor = 4 * place.coordinate;
    place.row = t.stride(2);
    place.column = t.stride(3);
  }
  return place;
}

// The arguments that all three ops share.
struct Arguments {
  const TensorList &logits, &deltas;
  const Tensor &anchors, &matched_idxs;
  const TensorList &gt_boxes, &gt_labels;
  const std::vector<int64_t>& level_sizes;  // of flat heads whose sums are by level; else empty
  int64_t scope;
  FocalNumbers focal;
  LocNumbers loc;

  int64_t images() const { return matched_idxs.size(0); }
  int64_t anchors_per_image() const { return matched_idxs.size(1); }
  bool by_level() const { return scope == 1; }
  int64_t levels() const { return static_cast<int64_t>(std::max(logits.size(), level_sizes.size())); }
  int64_t scopes() const { return scope == 0 ? 1 : by_level() ? levels() : images(); }
  ScopeOf scope_of() const { return {{nullptr, false}, scopes(), by_level() ? 1 : 0, scope == 2 ? 1 : 0}; }
  // iou^lambda needs an array of its own, unless it is iou^eta with the same zeros.
  bool own_loc_weight() const { return loc.lambda != focal.eta || focal.eta == 0; }
};

// A level as tensors give it. Flat tensors are cut into their levels where the sums are.
struct LevelSource {
  size_t tensor;
  int64_t first_row;  // of a flat tensor
  Level level;
  u32 number;  // among all levels, the empty ones too: as the sums, which ranks share, count them
};

class Detection {
 public:
  Detection(const Arguments& arguments, const TensorList& workspace)
      : a_(arguments), device_(arguments.matched_idxs), memory_(workspace) {
    add_levels();
    positives_.levels = static_cast<int>(levels_.size());
    positives_.anchors_per_image = a_.anchors_per_image();
    positives_.slots = 1;
    u32 words = 0;
    positives_.tiles = 0;
    for (size_t l = 0; l < levels_.size(); ++l) {
      Level& level = levels_[l].level;
      level.words = divide_up(level.positions(), kWarp);
      level.word0 = words;
      level.tile0 = positives_.tiles;
      level.tiles = TileShape(level.groups()).tiles(level.words);
      words += level.words * level.groups() * static_cast<u32>(a_.images());
      positives_.tiles += level.tiles * static_cast<u32>(a_.images());
      positives_.level[l] = level;
    }
    const int64_t segments = positives_.levels * a_.images();
    const int64_t all_anchors = a_.images() * a_.anchors_per_image();
    positives_.partial = memory_.take<double>(static_cast<int64_t>(positives_.tiles) * kPartials);
    segment_sums_ = memory_.take<double>(segments * kPartials);
    coefficients_.emplace(memory_, a_.images(), a_.scopes());
    positives_.special = memory_.take<u32>(words);
    weight_ = memory_.take<float>(all_anchors);
    if (a_.own_loc_weight()) loc_weight_ = memory_.take<float>(all_anchors);
    labels_.values = int_ref(a_.matched_idxs);
    labels_.direct = false;
    labels_.classes = classes_;
    labels_.truth = ground_truth(a_.gt_boxes, a_.gt_labels);
    anchors_ = {float_ref(a_.anchors), a_.anchors.dim() == 3, a_.anchors_per_image()};
    plan_logits(words);
    const StripMemory strips(memory_, dense_);
    positives_.ignored = strips.ignored;
    positives_.clear = strips.clear;
    positives_.clear_words = strips.clear_words;
  }

  void find_positives() {
    if (levels_.empty()) return;
    DetectionProblem problem;
    problem.truth = labels_.truth;
    problem.values = labels_.values;
    problem.anchors = anchors_;
    problem.logit_type = dtype_of(a_.logits[0]);
    problem.delta_type = dtype_of(a_.deltas[0]);
    problem.classes = classes_;
    problem.focal = a_.focal;
    problem.loc = a_.loc;
    problem.weight = weight_;
    problem.loc_weight = loc_weight_;
    device_.launch<kPositiveThreads>(detection_positives_kernel, positives_.tiles, positives_, problem);
  }

  // What is asked of the coefficients beyond the arguments.
  CoefficientsTable coefficients(const Tensor& sums, bool compute_sums) const {
    CoefficientsTable tb{};
    for (int l = 0; l < positives_.levels; ++l) {
      tb.tile0[l] = positives_.level[l].tile0;
      tb.tiles[l] = positives_.level[l].tiles;
      tb.scope_level[l] = levels_[l].number;
    }
    tb.levels = positives_.levels;
    tb.images = a_.images();
    tb.scope = a_.scope_of();
    tb.scopes = a_.scopes();
    tb.partial = positives_.partial;
    tb.segment_sums = segment_sums_;
    tb.sums = data_of<double>(sums);
    tb.compute_sums = compute_sums;
    tb.focal = a_.focal;
    tb.cls_weight = tb.w_loc = tb.world_size = 1;
    coefficients_->fill(tb);
    return tb;
  }

  // found: find_positives has just been called. zeros: gradients of deltas that are to be 0.
  void find_coefficients(const CoefficientsTable& tb, bool found, const TensorList& zeros = {}) {
    if (levels_.empty()) return launch_coefficients(device_, tb);
    zeros_ = plan_zeros(zeros);
    launch_coefficients_and_strips(device_, tb, dense_, found, zeros_);
  }

  // The pass over logits and deltas. Empty lists: no gradient. loss: where the classification loss goes, or nullptr.
  void fill(const TensorList& grad_logits, const TensorList& grad_deltas, const NumberRef& cls_scale,
            const NumberRef& loc_scale, const NumberRef& expected, bool may_skip, float* loss) {
    FillTable tb{};
    tb.anchors = anchors_;
    tb.loc = a_.loc;
    tb.dense = dense_;
    tb.dense.set_scale(cls_scale, expected, may_skip);
    plan_deltas(tb.deltas, grad_deltas, may_skip || zeros_.tiles > 0 ? DeltaTiles::kPositives : DeltaTiles::kAll);
    if (zeros_.tiles > 0) tb.deltas.tiles = 0;  // the last launch puts the positives there
    tb.deltas.scale = loc_scale;
    tb.deltas.expected = expected;
    tb.deltas.skip_expected = may_skip;
    for (int l = 0; l < tb.dense.levels && !grad_logits.empty(); ++l) {
      const Tensor& grad = grad_logits[levels_[l].tensor];
      tb.dense.level[l].write_to(data_of<char>(grad) + levels_[l].first_row * classes_ * grad.element_size());
    }
    if (loss == nullptr && grad_logits.empty()) tb.dense.tiles = tb.dense.positive_tiles = 0;
    if (tb.dense.all_tiles() + tb.deltas.tiles == 0) return;
    if (loss) tb.dense.partial = memory_.take<float>(tb.dense.all_tiles());
    launch_focal_fill(
        device_, tb,
        {dtype_of(a_.logits[0]), a_.focal.gamma, grad_logits.empty() ? kNone : kGradient, layout(), may_skip});
    const LossSum losses = {tb.dense.partial, tb.dense.all_tiles(), nullptr, coefficients_->positives_loss, loss};
    if (loss && losses.tiles > 0) launch_focal_finish(device_, tb, losses, zeros_.tiles > 0);
  }

 private:
  void add_levels() {
    int64_t first_anchor = 0;
    const bool cut = a_.by_level() && !a_.level_sizes.empty();
    for (size_t i = 0; i < a_.logits.size(); ++i) {
      const Tensor &x = a_.logits[i], &d = a_.deltas[i];
      Level level{};
      level.logits = x.const_data_ptr();
      level.deltas = d.const_data_ptr();
      level.delta_place = delta_place(d);
      if (x.dim() == 3) {
        classes_ = x.size(2);
        level.image_stride = x.size(1) * classes_;
        const std::vector<int64_t> whole = {x.size(1)};
        int64_t first_row = 0;
        for (const int64_t rows : cut ? a_.level_sizes : whole) {
          Level part = level;
          part.logits = static_cast<const char*>(level.logits) + first_row * classes_ * x.element_size();
          part.deltas = static_cast<const char*>(level.deltas) + first_row * d.stride(1) * d.element_size();
          part.locations = count32(rows, "the anchors of an image");
          part.width = part.anchors = 1;
          part.first_anchor = static_cast<u32>(first_row);
          levels_.push_back({i, first_row, part, static_cast<u32>(levels_.size())});
          first_row += rows;
        }
        continue;
      }
      level.anchors = static_cast<u32>(d.size(1) / 4);
      classes_ = level.anchors ? x.size(1) / level.anchors : 0;
      level.locations = count32(x.size(2) * x.size(3), "a level's locations");
      level.width = static_cast<u32>(x.size(3));
      level.image_stride = x.size(1) * level.locations;
      level.first_anchor = static_cast<u32>(first_anchor);
      level.planes = !(x.stride(1) == 1 && x.size(1) > 1);
      first_anchor += static_cast<int64_t>(level.anchors) * level.locations;
      levels_.push_back({i, 0, level, static_cast<u32>(levels_.size())});
    }
    // A map of one location is rows and planes alike: as the others are, so that no kernel for both is needed.
    bool any_planes = false;
    for (const LevelSource& source : levels_) any_planes |= source.level.planes && source.level.locations > 1;
    for (LevelSource& source : levels_) {
      if (a_.logits[source.tensor].dim() == 4 && source.level.locations == 1) source.level.planes = any_planes;
    }
    levels_.erase(
        std::remove_if(levels_.begin(), levels_.end(), [](const LevelSource& s) { return s.level.positions() == 0; }),
        levels_.end());
    if (a_.images() == 0 || classes_ == 0) levels_.clear();
    STD_TORCH_CHECK(levels_.size() <= kMaxLevels, "ioubal_kernels: at most ", kMaxLevels, " levels, got ",
                    levels_.size());
  }

  // The pass over the logits, but for its output.
  void plan_logits(u32 words) {
    dense_.labels = labels_;
    dense_.scope = a_.scope_of();
    dense_.coefficients = coefficients_->refs();
    dense_.anchors_per_image = a_.anchors_per_image();
    dense_.classes = FastDiv::make(static_cast<u32>(std::max<int64_t>(classes_, 1)));
    dense_.special = positives_.special;
    dense_.words = words;
    dense_.weight = weight_;
    dense_.row_weight = float_ref(OptionalTensor());
    dense_.gamma = static_cast<float>(a_.focal.gamma);
    dense_.levels = positives_.levels;
    for (int l = 0; l < dense_.levels; ++l) {
      const Level& level = positives_.level[l];
      DenseLevel& dense = dense_.level[l];
      dense.x = level.logits;
      dense.image_stride = level.image_stride;
      dense.size = count32(static_cast<int64_t>(level.locations) * level.anchors * classes_, "an image's logits");
      dense.locations = level.locations;
      dense.anchors = level.planes ? level.anchors : 1;
      dense.first_anchor = level.first_anchor;
      dense.word0 = level.word0;
      dense.words = level.words;
      dense.scope_level = levels_[l].number;
      dense.planes = level.planes;
    }
    plan_dense(dense_, levels_.empty() ? Dtype::kFloat32 : dtype_of(a_.logits[0]), static_cast<u32>(a_.images()));
  }

  Layout layout() const {
    bool rows = false, planes = false;
    for (const LevelSource& source : levels_) (source.level.planes ? planes : rows) = true;
    return rows && planes ? Layout::kMixed : planes ? Layout::kPlanes : Layout::kRows;
  }

  // None where one lies so that 16 bytes of it cannot be written at once.
  static ZerosTable plan_zeros(const TensorList& tensors) {
    ZerosTable tb{};
    for (const Tensor& t : tensors) {
      if (t.numel() == 0) continue;
      tb.out[tb.count] = data_of<char>(t);
      tb.bytes[tb.count] = t.numel() * static_cast<int64_t>(t.element_size());
      tb.tile0[tb.count] = tb.tiles;
      if (reinterpret_cast<uintptr_t>(tb.out[tb.count]) % 16 != 0) return {};
      tb.tiles += divide_up(tb.bytes[tb.count++], 16 * kZeroVectors * kCoefficientThreads);
    }
    return tb;
  }

  void plan_deltas(LocTable& tb, const TensorList& grads, DeltaTiles kind) const {
    tb.levels = 0;
    tb.tiles = 0;
    if (grads.empty()) return;
    tb.kind = kind;
    tb.type = dtype_of(grads[0]);
    tb.weight = loc_weight_ ? loc_weight_ : weight_;
    for (const LevelSource& source : levels_) {
      const Tensor& grad = grads[source.tensor];
      LocLevel& level = tb.level[tb.levels++];
      level = {};
      level.deltas = source.level.deltas;
      level.place = source.level.delta_place;
      level.out_place = delta_place(grad);
      level.out = data_of<char>(grad) + source.first_row * grad.stride(1) * grad.element_size();
      level.locations = source.level.locations;
      level.width = source.level.width;
      level.anchors = source.level.anchors;
      level.first_anchor = source.level.first_anchor;
      level.word0 = source.level.word0;
      level.words = source.level.words;
      level.special_planes = source.level.planes;
      const DeltaPlace& place = level.out_place;
      level.planes = place.coordinate != 1 && level.anchors > 0 && grad.dim() == 4;
      level.vector = place.coordinate == 1 && (place.image | place.anchor | place.row | place.column) % 4 == 0 &&
                     reinterpret_cast<uintptr_t>(level.out) % (4 * grad.element_size()) == 0;
      level.tile0 = tb.tiles;
      level.tiles = level.planes
                        ? divide_up(level.locations, kFillThreads)
                        : divide_up(static_cast<int64_t>(level.locations) * level.anchors, kLocRepeat * kFillThreads);
      tb.tiles += level.tiles * static_cast<u32>(a_.images());
    }
    if (kind == DeltaTiles::kPositives) tb.tiles = divide_up(dense_.words, kFillThreads);
  }

  Arguments a_;
  OnDevice device_;
  Workspace memory_;
  std::vector<LevelSource> levels_;
  int64_t classes_ = 0;
  PositivesTable positives_{};
  double* segment_sums_ = nullptr;
  std::optional<CoefficientMemory> coefficients_;
  float *weight_ = nullptr, *loc_weight_ = nullptr;
  Labels labels_{};
  AnchorRef anchors_{};
  DenseTable dense_{};
  ZerosTable zeros_{};
};

FocalNumbers focal_numbers(double eta, double alpha, double gamma) { return {eta, alpha, gamma}; }

LocNumbers loc_numbers(double lambda, double beta, int64_t coder, const std::vector<double>& weights) {
  return {lambda, beta, to_quad(weights), static_cast<BoxCoder>(coder)};
}

void detection_sums(TensorList logits, TensorList deltas, Tensor anchors, Tensor matched_idxs, TensorList gt_boxes,
                    TensorList gt_labels, std::vector<int64_t> level_sizes, int64_t scope, double eta, double alpha,
                    double gamma, double lambda, double beta, int64_t coder, std::vector<double> box_weights,
                    Tensor sums, TensorList workspace) {
  Detection op({logits, deltas, anchors, matched_idxs, gt_boxes, gt_labels, level_sizes, scope,
                focal_numbers(eta, alpha, gamma), loc_numbers(lambda, beta, coder, box_weights)},
               workspace);
  op.find_positives();
  op.find_coefficients(op.coefficients(sums, true), true);
}

// compute_sums false: `workspace` is as detection_sums left it, and `sums` holds those of all ranks.
void detection_fill(TensorList logits, TensorList deltas, Tensor anchors, Tensor matched_idxs, TensorList gt_boxes,
                    TensorList gt_labels, std::vector<int64_t> level_sizes, int64_t scope, double eta, double alpha,
                    double gamma, double lambda, double beta, int64_t coder, std::vector<double> box_weights,
                    double eps, double w_loc, bool normalize_loc, double cls_weight, OptionalTensor cls_avg_factor,
                    double cls_divisor, OptionalTensor loc_avg_factor, double loc_divisor, double world_size,
                    OptionalTensor grad_scale_tensor, double grad_scale, bool compute_sums, Tensor sums,
                    TensorList outputs, TensorList grad_logits, TensorList grad_deltas, TensorList workspace) {
  Detection op({logits, deltas, anchors, matched_idxs, gt_boxes, gt_labels, level_sizes, scope,
                focal_numbers(eta, alpha, gamma), loc_numbers(lambda, beta, coder, box_weights)},
               workspace);
  if (compute_sums) op.find_positives();
  CoefficientsTable tb = op.coefficients(sums, compute_sums);
  tb.eps = eps;
  tb.w_loc = w_loc;
  tb.normalize_loc = normalize_loc;
  tb.cls_weight = cls_weight;
  tb.world_size = world_size;
  tb.cls_divisor = number_ref(cls_avg_factor, cls_divisor);
  tb.loc_divisor = number_ref(loc_avg_factor, loc_divisor);
  tb.cls_loss = data_of<float>(outputs[0]);
  tb.loc_loss = data_of<float>(outputs[1]);
  tb.count = data_of<int64_t>(outputs[2]);
  tb.mean_iou = data_of<float>(outputs[3]);
  op.find_coefficients(tb, compute_sums, grad_deltas);
  const NumberRef expected = number_ref(grad_scale_tensor, grad_scale);
  op.fill(grad_logits, grad_deltas, expected, expected, expected, false, tb.cls_loss);
}

// Leaves gradients filled for the expected grad_output as they are, computes the others anew. An empty list: not
// wanted. `workspace` is as detection_fill left it.
void detection_backward(TensorList logits, TensorList deltas, Tensor anchors, Tensor matched_idxs, TensorList gt_boxes,
                        TensorList gt_labels, std::vector<int64_t> level_sizes, int64_t scope, double eta, double alpha,
                        double gamma, double lambda, double beta, int64_t coder, std::vector<double> box_weights,
                        double, double, bool, double, OptionalTensor, double, OptionalTensor, double, double,
                        OptionalTensor grad_scale_tensor, double grad_scale, bool filled, Tensor,
                        OptionalTensor grad_cls, OptionalTensor grad_loc, TensorList grad_logits,
                        TensorList grad_deltas, TensorList workspace) {
  Detection op({logits, deltas, anchors, matched_idxs, gt_boxes, gt_labels, level_sizes, scope,
                focal_numbers(eta, alpha, gamma), loc_numbers(lambda, beta, coder, box_weights)},
               workspace);
  op.fill(grad_logits, grad_deltas, number_ref(grad_cls, 0.0), number_ref(grad_loc, 0.0),
          number_ref(grad_scale_tensor, grad_scale), filled, nullptr);
}

}  // namespace
}  // namespace ioubal::cuda

STABLE_TORCH_LIBRARY_IMPL(ioubal, IOUBAL_CUDA_KEY, m) {
  m.impl(IOUBAL_CUDA_OP("detection_sums"), TORCH_BOX(&ioubal::cuda::detection_sums));
  m.impl(IOUBAL_CUDA_OP("detection_fill"), TORCH_BOX(&ioubal::cuda::detection_fill));
  m.impl(IOUBAL_CUDA_OP("detection_backward"), TORCH_BOX(&ioubal::cuda::detection_backward));
}
