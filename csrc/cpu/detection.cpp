// The fused IoU-balanced detection loss: sigmoid focal over the logits of all levels, smooth L1 over the positives'
// deltas.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <string>

#include "cpu/box_tiles.h"
#include "cpu/checks.h"
#include "cpu/classification.h"
#include "cpu/detection_inputs.h"
#include "cpu/dtypes.h"
#include "cpu/large_pages.h"
#include "cpu/power.h"
#include "cpu/scan.h"

namespace ioubal {
namespace {

struct LocParameters {
  double lambda, w_loc, beta, eps;
  bool normalize;  // Eq. 7
  BoxCoder coder;
  Quad<double> weights;
};

struct DetectionPositive {
  PositiveEntry cls;
  Place place;
  double loc_balance;  // iou^lambda
  double loc_loss;     // plain, summed over the coordinates
  Quad<double> loc_grad;
};

class DetectionLoss {
 public:
  DetectionLoss(const TensorList& logits, const TensorList& deltas, const Tensor& anchors, const Tensor& matched_idxs,
                const TensorList& gt_boxes, const TensorList& gt_labels, const std::vector<int64_t>& level_sizes,
                int64_t scope, const FocalParameters& focal, const LocParameters& loc)
      : anchors_(anchors),
        matched_(matched_idxs),
        truth_(gt_boxes, gt_labels),
        images_(matched_idxs.size(0)),
        anchors_per_image_(matched_idxs.size(1)),
        scope_(scope),
        level_sizes_(level_sizes),
        focal_(focal),
        loc_(loc) {
    int64_t first_anchor = 0, first_run = 0;
    for (size_t l = 0; l < logits.size(); ++l) {
      const Tensor& x = logits[l];
      Level level;
      level.logits = static_cast<const char*>(x.const_data_ptr());
      level.dtype = dtype_index(x.scalar_type());
      level.item = x.element_size();
      level.logit_at = FloatReader(x);
      level.delta_at = FloatReader(deltas[l]);
      level.delta_strides = DeltaStrides(deltas[l]);
      if (x.dim() == 3) {
        level.anchors = 1;
        level.locations = x.size(1);
        level.width = 1;
        level.classes = x.size(2);
        level.planes = false;
      } else {
        level.anchors = deltas[l].size(1) / 4;
        level.locations = x.size(2) * x.size(3);
        level.width = x.size(3);
        level.classes = x.size(1) / level.anchors;
        level.planes = !(x.stride(1) == 1 && x.size(1) > 1);
      }
      level.first_anchor = first_anchor;
      level.first_run = first_run;
      first_anchor += level.size();
      first_run += images_ * (level.planes ? level.anchors : 1);
      levels_.push_back(level);
    }
  }

  // Finds the ignored anchors and the positives. Returns the flat index of the first matched index that is out of range
  // or whose box has no class, or -1; such an anchor is left out and poisons the loss.
  int64_t collect() {
    constexpr size_t kAhead = 8;  // positives lie far from each other: without a prefetch each one waits for memory
    const FloatReader anchors(anchors_);
    const bool own_anchors = anchors_.dim() == 3;
    BoxBatch batch;
    const std::vector<Exceptional> found =
        find_exceptional(IntReader(matched_), images_ * anchors_per_image_, kBackground);
    const auto anchor_offset = [&](const Exceptional& e) {
      return (own_anchors ? e.index : e.index % anchors_per_image_) * 4;
    };
    for (size_t i = 0; i < found.size(); ++i) {
      if (i + kAhead < found.size()) {
        const Exceptional& next = found[i + kAhead];
        if (next.value >= 0) {
          anchors.prefetch(anchor_offset(next));
          prefetch_deltas(place_of(next.index));
        }
      }
      const Exceptional& e = found[i];
      const Place place = place_of(e.index);
      if (e.value == kIgnore) {
        ignored_.push_back(place);
        continue;
      }
      const int64_t label = label_of(e, place);
      if (label < 0) {
        if (bad_ < 0) bad_ = e.index;
        continue;
      }
      add_positive(place, label);
      const Level& level = levels_[place.level];
      const DeltaStrides& at = level.delta_strides;
      batch.add(level.delta_at.quad(level.delta_offset(at, place), at.coordinate), anchors.quad(anchor_offset(e), 1),
                truth_.box(place.image, e.value));
      if (batch.rows == kBoxRows) compare_boxes(batch);
    }
    compare_boxes(batch);
    return bad_;
  }

  // The sums but for the classification losses', which need the logits.
  Sums begin_sums(const Tensor& sums_tensor) const {
    const Sums sums = sums_of(sums_tensor);
    std::fill(sums.data, sums.data + sums_tensor.numel(), 0.0);
    sums.shared(Sums::kCount) = static_cast<double>(positives_.size());
    sums.shared(Sums::kIou) = iou_sum_;
    sums.shared(Sums::kBad) = bad_ >= 0;
    for (const DetectionPositive& p : positives_) {
      sums.add(p.cls.scope, Sums::kLocPlain, p.loc_loss, p.loc_balance);
    }
    return sums;
  }

  void add_up(const Tensor& sums_tensor) {
    const Sums sums = begin_sums(sums_tensor);
    for (DetectionPositive& p : positives_) {
      const Level& level = levels_[p.place.level];
      p.cls.meet(level.logit_at[level.entry_of(p.cls)], focal_);
      p.cls.add_to(sums);
    }
  }

  // The classification loss, and its gradient times grad_scale when there are buffers. factor: cls_weight / divisor by
  // image. compute_sums: completes the sums.
  template <class Factor>
  double classification(const Sums& sums, bool compute_sums, const TensorList& grads, const Factor& factor,
                        double grad_scale) {
    if (levels_.empty()) return 0;
    DensePass pass;
    for (size_t l = 0; l < levels_.size(); ++l)
      add_runs(levels_[l], grads.empty() ? nullptr : &grads[l], factor, grad_scale, pass);
    for (const DetectionPositive& p : positives_) pass.skip_positive(p.cls.run, p.cls.entry);
    for (const Place& place : ignored_) {
      const Level& level = levels_[place.level];
      const int64_t run = level.run(place.image, place.anchor);
      if (level.planes) {
        pass.mask_anchor(run, place.location, level.locations);
      } else {
        pass.skip(run, (place.location * level.anchors + place.anchor) * level.classes, level.classes);
      }
    }
    const Output output = grads.empty() ? Output::kNone : Output::kGradient;
    double total = pass(levels_[0].dtype, focal_.gamma, output);
    for (size_t i = 0; i < positives_.size(); ++i) {
      positives_[i].cls.meet(pass.positives()[i], focal_);
      if (compute_sums) positives_[i].cls.add_to(sums);
    }
    std::vector<FloatWriter> writers(grads.begin(), grads.end());
    for (const DetectionPositive& p : positives_) {
      const double w = factor(p.cls.image) * sums.cls_normalizer(p.cls.scope, focal_.eps) * p.cls.balance;
      total += weighted_loss(w, p.cls.term.loss);
      if (grads.empty()) continue;
      writers[p.place.level].set(levels_[p.place.level].entry_of(p.cls), w * grad_scale * p.cls.term.grad);
    }
    return sums.shared(Sums::kBad) != 0 ? NAN : total;
  }

  // The localisation loss likewise. zero_fill: the buffers are fresh.
  template <class Factor>
  double localization(const Sums& sums, const TensorList& grads, const Factor& factor, double grad_scale,
                      bool zero_fill) const {
    std::vector<FloatWriter> writers;
    std::vector<DeltaStrides> strides;
    for (const Tensor& grad : grads) {
      if (zero_fill) fill_zero(grad);
      writers.emplace_back(grad);
      strides.emplace_back(grad);
    }
    double total = 0;
    for (const DetectionPositive& p : positives_) {
      const double normalizer = loc_.normalize ? sums.loc_normalizer(p.cls.scope, loc_.eps) : 1.0;
      const double w = loc_.w_loc * factor(p.cls.image) * normalizer * p.loc_balance;
      total += weighted_loss(w, p.loc_loss);
      if (grads.empty()) continue;
      const DeltaStrides& at = strides[p.place.level];
      const int64_t offset = levels_[p.place.level].delta_offset(at, p.place);
      for (int j = 0; j < 4; ++j) {
        writers[p.place.level].set(offset + j * at.coordinate, w * grad_scale * p.loc_grad.v[j]);
      }
    }
    return sums.shared(Sums::kBad) != 0 ? NAN : total;
  }

 private:
  Place place_of(int64_t index) const {
    const int64_t image = index / anchors_per_image_, r = index % anchors_per_image_;
    size_t l = levels_.size() - 1;
    while (r < levels_[l].first_anchor) --l;
    const int64_t local = r - levels_[l].first_anchor;
    return {static_cast<int64_t>(l), image, local / levels_[l].anchors, local % levels_[l].anchors};
  }

  // -1 for an anchor that is ignored or out of range.
  int64_t label_of(const Exceptional& e, const Place& place) const {
    if (e.value < 0 || e.value >= truth_.count(place.image)) return -1;
    const int64_t label = truth_.label(place.image, e.value);
    return label >= 0 && label < levels_[place.level].classes ? label : -1;
  }

  // Of a positive, in its run.
  static int64_t run_entry(const Level& level, const Place& place, int64_t label) {
    return level.planes ? label * level.locations + place.location
                        : (place.location * level.anchors + place.anchor) * level.classes + label;
  }

  IOUBAL_PREFETCHES void prefetch_deltas(const Place& place) const {
    const Level& level = levels_[place.level];
    const int64_t offset = level.delta_offset(level.delta_strides, place);
    for (int j = 0; j < 4; ++j) level.delta_at.prefetch(offset + j * level.delta_strides.coordinate);
  }

  int64_t scope_of(const Place& place, int64_t r) const {
    if (scope_ == 2) return place.image;
    if (scope_ == 0) return 0;
    if (level_sizes_.empty()) return place.level;
    int64_t level = 0;
    for (int64_t end = level_sizes_[0]; r >= end; end += level_sizes_[level]) ++level;
    return level;
  }

  // What its boxes say of it follows in compare_boxes.
  void add_positive(const Place& place, int64_t label) {
    const Level& level = levels_[place.level];
    const int64_t scope = scope_of(place, level.first_anchor + place.location * level.anchors + place.anchor);
    DetectionPositive p;
    p.place = place;
    p.cls = {level.run(place.image, place.anchor), run_entry(level, place, label), scope, place.image, 0.0, 1.0};
    positives_.push_back(p);
  }

  // Deltas, anchors and ground truth of positives, a tile at a time.
  struct BoxBatch {
    BoxTile pred, anchor, truth;
    bool degenerate[kBoxRows];
    int64_t rows = 0;

    void add(const Quad<double>& deltas, const Quad<double>& anchor_box, const Quad<double>& truth_box) {
      for (int j = 0; j < 4; ++j) {
        pred.v[4 * rows + j] = deltas.v[j];
        anchor.v[4 * rows + j] = anchor_box.v[j];
        truth.v[4 * rows + j] = truth_box.v[j];
      }
      degenerate[rows++] = is_degenerate(anchor_box) || is_degenerate(truth_box);
    }
  };

  // IoU, balances and localisation loss of the batch's positives, the last ones added; empties the batch.
  void compare_boxes(BoxBatch& batch) {
    if (batch.rows == 0) return;
    for (BoxTile* tile : {&batch.pred, &batch.anchor, &batch.truth}) tile->pad(batch.rows, 4);
    BoxTile target, iou, loss, balance, grad;
    const BoxKernels& compute = box_kernels();
    compute.encode(batch.truth.v, batch.anchor.v, batch.rows, loc_.weights, loc_.coder, target.v);
    compute.delta_iou(batch.pred.v, target.v, batch.rows, loc_.weights, loc_.coder, iou.v);
    for (int64_t i = 0; i < batch.rows; ++i) {
      if (batch.degenerate[i]) iou.v[i] = 0;
    }
    compute.smooth_l1({batch.pred.v, target.v, nullptr, 0, iou.v, loc_.beta, loc_.lambda, loss.v, balance.v, grad.v},
                      batch.rows, loc_.weights);
    DetectionPositive* p = positives_.data() + positives_.size() - batch.rows;
    for (int64_t i = 0; i < batch.rows; ++i, ++p) {
      p->loc_balance = balance.v[i];
      p->cls.balance = loc_.lambda == focal_.eta ? balance.v[i] : fast_iou_power(iou.v[i], focal_.eta);
      p->loc_loss = batch.degenerate[i] ? 0.0 : loss.v[i];
      for (int j = 0; j < 4; ++j) p->loc_grad.v[j] = batch.degenerate[i] ? 0.0 : grad.v[4 * i + j];
      iou_sum_ += iou.v[i];
    }
    batch.rows = 0;
  }

  template <class Factor>
  void add_runs(const Level& level, const Tensor* grad, const Factor& factor, double grad_scale,
                DensePass& pass) const {
    const int64_t per_image = level.planes ? level.anchors : 1, bytes = level.run_entries() * level.item;
    char* out = grad ? static_cast<char*>(grad->mutable_data_ptr()) : nullptr;
    if (grad) ask_for_large_pages(*grad);
    for (int64_t i = 0; i < images_ * per_image; ++i) {
      Run run;
      run.x = level.logits + i * bytes;
      run.out = out ? out + i * bytes : nullptr;
      run.count = level.run_entries();
      run.loss_scale = focal_.negative_factor() * factor(i / per_image);
      run.out_scale = run.loss_scale * grad_scale;
      pass.runs.push_back(run);
    }
  }

  static void fill_zero(const Tensor& t) {
    constexpr int64_t kChunk = 1 << 18;
    const int64_t bytes = t.numel() * t.element_size();
    char* data = static_cast<char*>(t.mutable_data_ptr());
    torch::stable::parallel_for(0, (bytes + kChunk - 1) / kChunk, 1, [&](int64_t begin, int64_t end) {
      std::memset(data + begin * kChunk, 0, std::min(bytes, end * kChunk) - begin * kChunk);
    });
  }

  const Tensor &anchors_, &matched_;
  GroundTruth truth_;
  int64_t images_, anchors_per_image_, scope_;
  const std::vector<int64_t>& level_sizes_;  // of flat heads whose sums are by level; else empty
  FocalParameters focal_;
  LocParameters loc_;
  std::vector<Level> levels_;
  std::vector<DetectionPositive> positives_;
  std::vector<Place> ignored_;
  double iou_sum_ = 0;
  int64_t bad_ = -1;
};

LocParameters loc_parameters(double lambda, double w_loc, double beta, double eps, bool normalize, int64_t coder,
                             const std::vector<double>& weights) {
  return {lambda, w_loc, beta, eps, normalize, static_cast<BoxCoder>(coder), to_quad(weights)};
}

// weight / divisor of an image: the divisor is a given number or tensor, or the positives of the batch.
struct LossFactor {
  Number divisor;
  bool given;
  double weight, default_divisor;
  LossFactor(const OptionalTensor& tensor, double number, double weight_, const Sums& sums, double world_size)
      : divisor(tensor, number),
        given(divisor.is_tensor() || number > 0),
        weight(weight_),
        default_divisor(sums.default_divisor(world_size)) {}
  double operator()(int64_t image) const { return weight / (given ? divisor.get(image) : default_divisor); }
};

void detection_sums(TensorList logits, TensorList deltas, Tensor anchors, Tensor matched_idxs, TensorList gt_boxes,
                    TensorList gt_labels, std::vector<int64_t> level_sizes, int64_t scope, double eta, double alpha,
                    double gamma, double lambda, double beta, int64_t coder, std::vector<double> box_weights,
                    Tensor sums, TensorList) {
  DetectionLoss op(logits, deltas, anchors, matched_idxs, gt_boxes, gt_labels, level_sizes, scope,
                   {eta, alpha, gamma, 0}, loc_parameters(lambda, 1.0, beta, 0, true, coder, box_weights));
  op.collect();
  op.add_up(sums);
}

// The losses' scales but for eps, w_loc and normalize_loc. An avg_factor that is a tensor wins over its number.
struct Scaling {
  double cls_weight;
  const OptionalTensor& cls_avg_factor;
  double cls_divisor;
  const OptionalTensor& loc_avg_factor;
  double loc_divisor, world_size;
  LossFactor cls(const Sums& sums) const {
    return LossFactor(cls_avg_factor, cls_divisor, cls_weight, sums, world_size);
  }
  LossFactor loc(const Sums& sums) const { return LossFactor(loc_avg_factor, loc_divisor, 1.0, sums, world_size); }
};

// outputs: classification, localisation, number of positives (int64), mean IoU. compute_sums false: `sums` holds those
// of all ranks already. Lists of gradients may be empty: not wanted.
void fill(DetectionLoss& op, const Scaling& scaling, double grad_scale, bool compute_sums, const Tensor& sums_tensor,
          const TensorList& outputs, const TensorList& grad_logits, const TensorList& grad_deltas) {
  const Sums sums = compute_sums ? op.begin_sums(sums_tensor) : sums_of(sums_tensor);
  FloatWriter(outputs[1]).set(0, op.localization(sums, grad_deltas, scaling.loc(sums), grad_scale, true));
  FloatWriter(outputs[0]).set(0, op.classification(sums, compute_sums, grad_logits, scaling.cls(sums), grad_scale));
  const double count = sums.shared(Sums::kCount);
  *static_cast<int64_t*>(outputs[2].mutable_data_ptr()) = static_cast<int64_t>(count);
  FloatWriter(outputs[3]).set(0, count > 0 ? sums.shared(Sums::kIou) / count : 0.0);
}

void detection_fill(TensorList logits, TensorList deltas, Tensor anchors, Tensor matched_idxs, TensorList gt_boxes,
                    TensorList gt_labels, std::vector<int64_t> level_sizes, int64_t scope, double eta, double alpha,
                    double gamma, double lambda, double beta, int64_t coder, std::vector<double> box_weights,
                    double eps, double w_loc, bool normalize_loc, double cls_weight, OptionalTensor cls_avg_factor,
                    double cls_divisor, OptionalTensor loc_avg_factor, double loc_divisor, double world_size,
                    OptionalTensor grad_scale_tensor, double grad_scale, bool compute_sums, Tensor sums,
                    TensorList outputs, TensorList grad_logits, TensorList grad_deltas, TensorList) {
  DetectionLoss op(logits, deltas, anchors, matched_idxs, gt_boxes, gt_labels, level_sizes, scope,
                   {eta, alpha, gamma, eps},
                   loc_parameters(lambda, w_loc, beta, eps, normalize_loc, coder, box_weights));
  op.collect();
  fill(op, {cls_weight, cls_avg_factor, cls_divisor, loc_avg_factor, loc_divisor, world_size},
       Number(grad_scale_tensor, grad_scale).get(), compute_sums, sums, outputs, grad_logits, grad_deltas);
}

// detection_fill for one process, whose arguments come packed. Returns what check_matched_idxs does, and writes nothing
// unless that is -1.
// read: logits and deltas of the levels, anchors, matched_idxs, gt boxes, gt labels, tensors of divisors and
// grad_scale. written: sums, the outputs, gradients of the logits and of the deltas.
int64_t detection_checked_fill(TensorList read, TensorList written, std::vector<int64_t> integers,
                               std::vector<double> numbers) {
  enum : int { kLevels, kTruths, kScope, kCoder, kNormalizeLoc, kCheck, kHasClsAvg, kHasLocAvg, kHasScale };
  enum : int { kGradLogits = kHasScale + 1, kGradDeltas, kLevelSizes };  // numbers of gradients
  enum : int { kEta, kAlpha, kGamma, kLambda, kBeta, kBoxWeights, kEps = kBoxWeights + 4, kWLoc, kClsWeight };
  enum : int { kClsDivisor = kClsWeight + 1, kLocDivisor, kGradScale };
  const std::vector<int64_t>& i = integers;
  const std::vector<double>& n = numbers;
  Unpacker from(read), to(written);
  TensorList logits = from.list(i[kLevels]), deltas = from.list(i[kLevels]);
  const Tensor &anchors = from.one(), &matched_idxs = from.one();
  TensorList gt_boxes = from.list(i[kTruths]), gt_labels = from.list(i[kTruths]);
  const OptionalTensor cls_avg = from.optional(i[kHasClsAvg]), loc_avg = from.optional(i[kHasLocAvg]);
  const OptionalTensor grad_scale_tensor = from.optional(i[kHasScale]);
  const Tensor& sums = to.one();
  TensorList outputs = to.list(4), grad_logits = to.list(i[kGradLogits]), grad_deltas = to.list(i[kGradDeltas]);
  const std::vector<int64_t> level_sizes = {i.begin() + kLevelSizes, i.end()};
  DetectionLoss op(logits, deltas, anchors, matched_idxs, gt_boxes, gt_labels, level_sizes, i[kScope],
                   {n[kEta], n[kAlpha], n[kGamma], n[kEps]},
                   loc_parameters(n[kLambda], n[kWLoc], n[kBeta], n[kEps], i[kNormalizeLoc] != 0, i[kCoder],
                                  {n.begin() + kBoxWeights, n.begin() + kEps}));
  const int64_t position = op.collect();
  if (i[kCheck] && position >= 0) return position;
  fill(op, {n[kClsWeight], cls_avg, n[kClsDivisor], loc_avg, n[kLocDivisor], 1.0},
       Number(grad_scale_tensor, n[kGradScale]).get(), true, sums, outputs, grad_logits, grad_deltas);
  return -1;
}

// Leaves gradients filled for the expected grad_output as they are, computes the others anew. An empty list: not
// wanted.
void detection_backward(TensorList logits, TensorList deltas, Tensor anchors, Tensor matched_idxs, TensorList gt_boxes,
                        TensorList gt_labels, std::vector<int64_t> level_sizes, int64_t scope, double eta, double alpha,
                        double gamma, double lambda, double beta, int64_t coder, std::vector<double> box_weights,
                        double eps, double w_loc, bool normalize_loc, double cls_weight, OptionalTensor cls_avg_factor,
                        double cls_divisor, OptionalTensor loc_avg_factor, double loc_divisor, double world_size,
                        OptionalTensor grad_scale_tensor, double grad_scale, bool filled, Tensor sums_tensor,
                        OptionalTensor grad_cls, OptionalTensor grad_loc, TensorList grad_logits,
                        TensorList grad_deltas, TensorList) {
  const double expected = Number(grad_scale_tensor, grad_scale).get();
  const double cls_scale = Number(grad_cls, 0.0).get(), loc_scale = Number(grad_loc, 0.0).get();
  const bool redo_cls = !grad_logits.empty() && !(filled && cls_scale == expected);
  const bool redo_loc = !grad_deltas.empty() && !(filled && loc_scale == expected);
  if (!redo_cls && !redo_loc) return;
  DetectionLoss op(logits, deltas, anchors, matched_idxs, gt_boxes, gt_labels, level_sizes, scope,
                   {eta, alpha, gamma, eps},
                   loc_parameters(lambda, w_loc, beta, eps, normalize_loc, coder, box_weights));
  op.collect();
  const Sums sums = sums_of(sums_tensor);
  const Scaling scaling = {cls_weight, cls_avg_factor, cls_divisor, loc_avg_factor, loc_divisor, world_size};
  if (redo_cls) op.classification(sums, false, grad_logits, scaling.cls(sums), cls_scale);
  if (redo_loc) op.localization(sums, grad_deltas, scaling.loc(sums), loc_scale, !filled);
}

}  // namespace
}  // namespace ioubal

STABLE_TORCH_LIBRARY_IMPL(ioubal, CPU, m) {
  m.impl("detection_sums.cpp", TORCH_BOX(&ioubal::detection_sums));
  m.impl("detection_fill.cpp", TORCH_BOX(&ioubal::detection_fill));
  m.impl("detection_checked_fill.cpp", TORCH_BOX(&ioubal::detection_checked_fill));
  m.impl("detection_backward.cpp", TORCH_BOX(&ioubal::detection_backward));
}
