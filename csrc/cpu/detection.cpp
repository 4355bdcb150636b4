// The fused IoU-balanced detection loss: sigmoid focal over the logits of all levels, smooth L1 over the positives'
// deltas.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <string>

#include "cpu/checks.h"
#include "cpu/classification.h"
#include "cpu/large_pages.h"
#include "cpu/scan.h"
#include "math/iou.h"
#include "math/smooth_l1.h"

namespace ioubal {
namespace {

struct LocParameters {
  double lambda, w_loc, beta, eps;
  bool normalize;  // Eq. 7
  BoxCoder coder;
  Quad<double> weights;
};

// Where the coordinates of an anchor's deltas lie, whatever the strides: flat (N, R, 4) or maps (N, A * 4, H, W).
struct DeltaStrides {
  int64_t image = 0, anchor = 0, row = 0, column = 0, coordinate = 0;
  DeltaStrides() = default;
  explicit DeltaStrides(const Tensor& t) : image(t.stride(0)) {
    if (t.dim() == 3) {
      row = t.stride(1);
      coordinate = t.stride(2);
    } else {
      coordinate = t.stride(1);
      anchor = 4 * coordinate;
      row = t.stride(2);
      column = t.stride(3);
    }
  }
};

struct Place {
  int64_t level, image, location, anchor;
};

// One level of the heads' outputs: rows of K logits (flat, channels_last) or planes of H * W (NCHW).
struct Level {
  const Tensor* logits;
  FloatReader logit_at, delta_at;  // kept: every question to a stable-ABI tensor is a call
  DeltaStrides delta_strides;
  int64_t anchors, locations, width, classes, first_anchor, first_run;
  bool planes;

  int64_t size() const { return anchors * locations; }
  int64_t run(int64_t image, int64_t a) const { return first_run + (planes ? image * anchors + a : image); }
  int64_t run_entries() const { return classes * locations * (planes ? 1 : anchors); }
  // Offset of the first coordinate of an anchor's deltas.
  int64_t delta_offset(const DeltaStrides& s, const Place& p) const {
    return p.image * s.image + p.anchor * s.anchor + p.location / width * s.row + p.location % width * s.column;
  }
};

struct DetectionPositive {
  PositiveEntry cls;
  Place place;
  double loc_balance;  // iou^lambda
  double loc_loss;     // plain, summed over the coordinates
  Quad<double> loc_grad;
};

class GroundTruth {
 public:
  GroundTruth(const TensorList& boxes, const TensorList& labels)
      : padded_(boxes.size() == 1 && boxes[0].dim() == 3), padding_(padded_ ? boxes[0].size(1) : 0) {
    for (size_t i = 0; i < boxes.size(); ++i) {
      boxes_.emplace_back(boxes[i]);
      labels_.emplace_back(labels[i]);
      counts_.push_back(boxes[i].size(0));
    }
  }
  int64_t count(int64_t image) const { return padded_ ? padding_ : counts_[image]; }
  int64_t label(int64_t image, int64_t i) const {
    return padded_ ? labels_[0][image * padding_ + i] : labels_[image][i];
  }
  Quad<double> box(int64_t image, int64_t i) const {
    return padded_ ? boxes_[0].quad((image * padding_ + i) * 4, 1) : boxes_[image].quad(i * 4, 1);
  }

 private:
  bool padded_;
  int64_t padding_;
  std::vector<FloatReader> boxes_;
  std::vector<IntReader> labels_;
  std::vector<int64_t> counts_;
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
      level.logits = &x;
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

  void collect() {
    const IntReader matched(matched_);
    const FloatReader anchors(anchors_);
    const bool own_anchors = anchors_.dim() == 3;
    for (const Exceptional& e :
         find_exceptional(matched.data(), matched.wide(), images_ * anchors_per_image_, kBackground)) {
      const int64_t image = e.index / anchors_per_image_, r = e.index % anchors_per_image_;
      const Place place = locate(image, r);
      if (e.value == kIgnore) {
        ignored_.push_back(place);
        continue;
      }
      const Level& level = levels_[place.level];
      const bool in_range = e.value >= 0 && e.value < truth_.count(image);
      const int64_t label = in_range ? truth_.label(image, e.value) : -1;
      if (label < 0 || label >= level.classes) {
        bad_ = true;  // never used as an index; poisons the loss
        continue;
      }
      const Quad<double> anchor = anchors.quad((own_anchors ? e.index : r) * 4, 1);
      add_positive(place, label, anchor, truth_.box(image, e.value));
    }
  }

  void add_up(const Tensor& sums_tensor) const {
    const Sums sums = sums_of(sums_tensor);
    std::fill(sums.data, sums.data + sums_tensor.numel(), 0.0);
    sums.shared(Sums::kCount) = static_cast<double>(positives_.size());
    sums.shared(Sums::kIou) = iou_sum_;
    sums.shared(Sums::kBad) = bad_;
    for (const DetectionPositive& p : positives_) {
      sums.add(p.cls.scope, Sums::kClsPlain, p.cls.term.loss, p.cls.balance);
      sums.add(p.cls.scope, Sums::kLocPlain, p.loc_loss, p.loc_balance);
    }
  }

  // The classification loss, and its gradient times grad_scale when there are buffers. factor: cls_weight / divisor by
  // image.
  template <class Factor>
  double classification(const Sums& sums, const TensorList& grads, const Factor& factor, double grad_scale) const {
    if (levels_.empty()) return 0;
    DensePass pass;
    for (size_t l = 0; l < levels_.size(); ++l)
      add_runs(levels_[l], grads.empty() ? nullptr : &grads[l], factor, grad_scale, pass);
    for (const DetectionPositive& p : positives_) pass.skip(p.cls.run, p.cls.entry, 1);
    for (const Place& place : ignored_) {
      const Level& level = levels_[place.level];
      const int64_t run = level.run(place.image, place.anchor);
      if (level.planes) {
        pass.mask_anchor(run, place.location, level.locations);
      } else {
        pass.skip(run, (place.location * level.anchors + place.anchor) * level.classes, level.classes);
      }
    }
    const Tensor& first = *levels_[0].logits;
    const Output output = grads.empty() ? Output::kNone : Output::kGradient;
    double total = pass(dtype_index(first), focal_.gamma, output);
    std::vector<FloatWriter> writers(grads.begin(), grads.end());
    for (const DetectionPositive& p : positives_) {
      const double w = factor(p.cls.image) * sums.cls_normalizer(p.cls.scope, focal_.eps) * p.cls.balance;
      total += weighted_loss(w, p.cls.term.loss);
      if (grads.empty()) continue;
      const Level& level = levels_[p.place.level];
      const int64_t group = p.cls.run - level.first_run;  // runs of a level follow each other in memory
      writers[p.place.level].set(group * level.run_entries() + p.cls.entry, w * grad_scale * p.cls.term.grad);
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
  Place locate(int64_t image, int64_t r) const {
    size_t l = levels_.size() - 1;
    while (r < levels_[l].first_anchor) --l;
    const int64_t local = r - levels_[l].first_anchor;
    return {static_cast<int64_t>(l), image, local / levels_[l].anchors, local % levels_[l].anchors};
  }

  int64_t scope_of(const Place& place, int64_t r) const {
    if (scope_ == 2) return place.image;
    if (scope_ == 0) return 0;
    if (levels_.size() > 1) return place.level;
    int64_t level = 0;
    for (int64_t end = level_sizes_[0]; r >= end; end += level_sizes_[level]) ++level;
    return level;
  }

  void add_positive(const Place& place, int64_t label, const Quad<double>& anchor, const Quad<double>& gt) {
    const Level& level = levels_[place.level];
    const int64_t entry = level.planes ? label * level.locations + place.location
                                       : (place.location * level.anchors + place.anchor) * level.classes + label;
    const int64_t scope = scope_of(place, level.first_anchor + place.location * level.anchors + place.anchor);
    const DeltaStrides& at = level.delta_strides;
    const Quad<double> pred = level.delta_at.quad(level.delta_offset(at, place), at.coordinate);
    const bool degenerate = is_degenerate(anchor) || is_degenerate(gt);
    DetectionPositive p;
    p.place = place;
    p.loc_loss = 0;
    p.loc_grad = {{0, 0, 0, 0}};
    double iou = 0;
    if (!degenerate) {
      const Quad<double> target = encode_box(gt, anchor, loc_.weights, loc_.coder);
      iou = delta_iou(pred, target, loc_.weights, loc_.coder);
      for (int j = 0; j < 4; ++j) {
        const Term<double> term = smooth_l1(pred.v[j] - target.v[j], loc_.beta);
        p.loc_loss += term.loss;
        p.loc_grad.v[j] = term.grad;
      }
    }
    const int64_t run = level.run(place.image, place.anchor);
    const double logit = level.logit_at[(run - level.first_run) * level.run_entries() + entry];
    p.cls = make_positive(run, entry, scope, place.image, logit, iou, 1.0, focal_);
    p.loc_balance = iou_power(iou, loc_.lambda);
    iou_sum_ += iou;
    positives_.push_back(p);
  }

  template <class Factor>
  void add_runs(const Level& level, const Tensor* grad, const Factor& factor, double grad_scale,
                DensePass& pass) const {
    const int64_t per_image = level.planes ? level.anchors : 1, size = level.logits->element_size();
    const int64_t entries = level.run_entries();
    const char* x = static_cast<const char*>(level.logits->const_data_ptr());
    char* out = grad ? static_cast<char*>(grad->mutable_data_ptr()) : nullptr;
    if (grad) ask_for_large_pages(*grad);
    for (int64_t i = 0; i < images_ * per_image; ++i) {
      Run run;
      run.x = x + i * entries * size;
      run.out = out ? out + i * entries * size : nullptr;
      run.count = entries;
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
  const std::vector<int64_t>& level_sizes_;
  FocalParameters focal_;
  LocParameters loc_;
  std::vector<Level> levels_;
  std::vector<DetectionPositive> positives_;
  std::vector<Place> ignored_;
  double iou_sum_ = 0;
  bool bad_ = false;
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

// outputs: classification, localisation, number of positives (int64), mean IoU. compute_sums false: `sums` holds those
// of all ranks already. Lists of gradients may be empty: not wanted.
void detection_fill(TensorList logits, TensorList deltas, Tensor anchors, Tensor matched_idxs, TensorList gt_boxes,
                    TensorList gt_labels, std::vector<int64_t> level_sizes, int64_t scope, double eta, double alpha,
                    double gamma, double lambda, double beta, int64_t coder, std::vector<double> box_weights,
                    double eps, double w_loc, bool normalize_loc, double cls_weight, OptionalTensor cls_avg_factor,
                    double cls_divisor, OptionalTensor loc_avg_factor, double loc_divisor, double world_size,
                    OptionalTensor grad_scale_tensor, double grad_scale, bool compute_sums, Tensor sums_tensor,
                    TensorList outputs, TensorList grad_logits, TensorList grad_deltas, TensorList) {
  DetectionLoss op(logits, deltas, anchors, matched_idxs, gt_boxes, gt_labels, level_sizes, scope,
                   {eta, alpha, gamma, eps},
                   loc_parameters(lambda, w_loc, beta, eps, normalize_loc, coder, box_weights));
  op.collect();
  if (compute_sums) op.add_up(sums_tensor);
  const Sums sums = sums_of(sums_tensor);
  const double expected = Number(grad_scale_tensor, grad_scale).get();
  const LossFactor cls(cls_avg_factor, cls_divisor, cls_weight, sums, world_size);
  const LossFactor loc(loc_avg_factor, loc_divisor, 1.0, sums, world_size);
  FloatWriter(outputs[1]).set(0, op.localization(sums, grad_deltas, loc, expected, true));
  FloatWriter(outputs[0]).set(0, op.classification(sums, grad_logits, cls, expected));
  const double count = sums.shared(Sums::kCount);
  *static_cast<int64_t*>(outputs[2].mutable_data_ptr()) = static_cast<int64_t>(count);
  FloatWriter(outputs[3]).set(0, count > 0 ? sums.shared(Sums::kIou) / count : 0.0);
}

// check_matched_idxs and, if it finds nothing, detection_fill for one process, whose arguments come packed. Returns the
// position it found, -1 for none.
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
  if (i[kCheck]) {
    const Tensor& first = logits[0];
    const int64_t classes = first.dim() == 3 ? first.size(2) : first.size(1) / (deltas[0].size(1) / 4);
    const int64_t position = check_matched_idxs(matched_idxs, gt_labels, classes);
    if (position >= 0) return position;
  }
  const OptionalTensor cls_avg = from.optional(i[kHasClsAvg]), loc_avg = from.optional(i[kHasLocAvg]);
  const OptionalTensor grad_scale_tensor = from.optional(i[kHasScale]);
  const Tensor& sums = to.one();
  TensorList outputs = to.list(4), grad_logits = to.list(i[kGradLogits]), grad_deltas = to.list(i[kGradDeltas]);
  detection_fill(std::move(logits), std::move(deltas), anchors, matched_idxs, std::move(gt_boxes), std::move(gt_labels),
                 {i.begin() + kLevelSizes, i.end()}, i[kScope], n[kEta], n[kAlpha], n[kGamma], n[kLambda], n[kBeta],
                 i[kCoder], {n.begin() + kBoxWeights, n.begin() + kEps}, n[kEps], n[kWLoc], i[kNormalizeLoc] != 0,
                 n[kClsWeight], cls_avg, n[kClsDivisor], loc_avg, n[kLocDivisor], 1.0, grad_scale_tensor, n[kGradScale],
                 true, sums, std::move(outputs), std::move(grad_logits), std::move(grad_deltas), {});
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
  const LossFactor cls(cls_avg_factor, cls_divisor, cls_weight, sums, world_size);
  const LossFactor loc(loc_avg_factor, loc_divisor, 1.0, sums, world_size);
  if (redo_cls) op.classification(sums, grad_logits, cls, cls_scale);
  if (redo_loc) op.localization(sums, grad_deltas, loc, loc_scale, !filled);
}

}  // namespace
}  // namespace ioubal

STABLE_TORCH_LIBRARY_IMPL(ioubal, CPU, m) {
  m.impl("detection_sums.cpp", TORCH_BOX(&ioubal::detection_sums));
  m.impl("detection_fill.cpp", TORCH_BOX(&ioubal::detection_fill));
  m.impl("detection_checked_fill.cpp", TORCH_BOX(&ioubal::detection_checked_fill));
  m.impl("detection_backward.cpp", TORCH_BOX(&ioubal::detection_backward));
}
