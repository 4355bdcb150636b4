// Entries of the dense pass one by one, and vectors that may hold anything: what the fast loop leaves
// (focal_dense.cuh), and strips with a positive entry, whose labels are asked.
#pragma once

#include "cuda/focal_math.cuh"
#include "cuda/strips.cuh"
#include "math/balance.h"

namespace ioubal::cuda {

// What the pass writes.
enum Output : int { kNone = 0, kGradient = 1, kLoss = 2 };
// How the logits lie, at all levels.
enum class Layout : int { kRows, kPlanes, kMixed };

template <class T>
constexpr u32 kVector = 16 / sizeof(T);

// One level and image of the pass, as a thread sees it.
template <class T>
struct DenseRun {
  const DenseLevel* level;
  u32 image;
  const T* x;
  T* out;
  u32 missing;  // of the first vector: how many of its elements lie before the run
  float scale;  // of the negatives' gradient

  IOUBAL_DEVICE DenseRun(const DenseTable& tb, const DenseLevel& of, u32 number)
      : level(&of),
        image(number),
        x(static_cast<const T*>(of.x) + number * of.image_stride),
        out(static_cast<T*>(of.out) + number * of.image_stride),
        missing(of.missing(number, sizeof(T))),
        scale(tb.coefficients.negative[number] * tb.scale_now()) {}

  IOUBAL_DEVICE int64_t anchor(const DenseTable& tb, u32 local) const {  // in the whole batch
    return image * tb.anchors_per_image + level->first_anchor + local;
  }
  // The part in the whole loss of the sum over some entries.
  IOUBAL_DEVICE float loss(const DenseTable& tb, float sum) const { return tb.coefficients.negative[image] * sum; }
};

// Factor of a positive's loss: alpha, Eq. 4 and the divisor.
template <class T>
IOUBAL_DEVICE float positive_weight(const DenseTable& tb, const DenseRun<T>& run, int64_t anchor) {
  const int64_t scope = tb.scope.get(run.level->scope_level, run.image, anchor);
  if (scope < 0) return 0.f;
  return tb.coefficients.positive[run.image] * tb.coefficients.cls_norm[scope] * tb.weight[anchor];
}

// What a positive entry leaves in the output.
template <class T, int kGamma, Output kOutput>
IOUBAL_DEVICE float positive_value(const DenseTable& tb, const DenseRun<T>& run, float logit, int64_t anchor) {
  const float weight = positive_weight(tb, run, anchor), scale = tb.scale_now();
  float loss = 0.f;
  const float gradient = positive_entry<kGamma>(logit, weight * scale, tb.gamma, loss);
  return kOutput == kLoss ? weighted_loss(weight, loss) * scale : gradient;
}

// One entry by itself, whatever it is: ignored, positive, weighted, an infinite logit.
template <class T, int kGamma, Output kOutput>
IOUBAL_DEVICE void any_entry(const DenseTable& tb, const DenseRun<T>& run, u32 e, float& sum) {
  u32 position, k;
  if (run.level->planes) {
    const u32 plane = run.level->plane.div(e), a = tb.classes.div(plane);
    position = (e - plane * run.level->locations) * run.level->anchors + a;
    k = plane - a * tb.classes.divisor;
  } else {
    position = tb.classes.div(e);
    k = e - position * tb.classes.divisor;
  }
  const int64_t anchor = run.anchor(tb, position), label = tb.labels.get(run.image, anchor);
  const bool ignored = label == kIgnore, positive = label == k;
  const float logit = load_one(run.x + e);  // before it may be overwritten
  const float w = tb.row_weight.data ? static_cast<float>(tb.row_weight[anchor]) : 1.f;
  float loss = 0.f;
  const float gradient =
      negative_entry<kGamma, false, true>(ignored || positive ? kOff : logit, run.scale, tb.gamma, loss);
  if (!ignored) sum = fmaf(loss, w, sum);  // whose weight may be NaN
  if constexpr (kOutput == kNone) return;
  float value = ignored ? 0.f : w * (kOutput == kLoss ? loss * run.scale : gradient);  // also for a scale of inf
  if (positive) {
    value = positive_value<T, kGamma, kOutput>(tb, run, logit, anchor);
  }
  if (kOutput == kLoss && (!tb.labels.valid(anchor) || tb.scope.get(0, 0, anchor) < 0)) value = NAN;
  store_one(run.out + e, value);
}

// kCount negatives: in the place of their logits their gradients or losses, and twice the sum of the losses added.
// Where that is not good, infinite or NaN, so may the others be, and any_entry has to do them all.
template <int kGamma, bool kBelow, Output kOutput, Scaling kScaling = Scaling::kTimes, int kCount>
IOUBAL_DEVICE void negative_entries(float scale, float gamma, float (&v)[kCount], float& doubled) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    float loss = kOutput == kLoss ? 0.f : doubled;
    v[j] = negative_entry<kGamma, kBelow, false, kScaling>(v[j], scale, gamma, loss);
    if constexpr (kOutput == kLoss) {
      v[j] = kHalf * loss * scale;
      loss += doubled;
    }
    doubled = loss;
  }
}
template <int kCount>
IOUBAL_DEVICE void switch_off(float (&v)[kCount], u32 off) {
  if (off == 0) return;
#pragma unroll
  for (int j = 0; j < kCount; ++j) v[j] = off >> j & 1 ? kOff : v[j];
}
IOUBAL_DEVICE bool all_good(float doubled) { return doubled < 1e35f; }

// A vector's entries that are no negatives, as bits: the values of the positive ones are computed before anything is
// stored, since in place that takes their logits away, and kept in shared memory, a column a thread.
constexpr u32 kKept = 8;
struct Marks {
  u32 off = 0, positive = 0;
  float weight = 1.f;  // of the row
  float* kept;
  IOUBAL_DEVICE float& value(u32 j) const { return kept[j * kFillThreads + threadIdx.x]; }

  template <class T, int kGamma, Output kOutput>
  IOUBAL_DEVICE void add_positive(const DenseTable& tb, const DenseRun<T>& run, const T* x, u32 j, int64_t anchor) {
    off |= 1u << j;
    if constexpr (kOutput != kNone) {
      positive |= 1u << j;
      value(j) = positive_value<T, kGamma, kOutput>(tb, run, load_one(x + j), anchor);
    }
  }
};

// Whether the vector at entry e could be done as one; what is not plain background in it is marked.
template <class T, int kGamma, Output kOutput>
IOUBAL_DEVICE bool mark_rows(const DenseTable& tb, const DenseRun<T>& run, const u32* special, u32 e, Marks& marks) {
  constexpr u32 kCount = kVector<T>;
  const u32 classes = tb.classes.divisor;
  u32 row = tb.classes.div(e), column = e - row * classes;
  if (tb.row_weight.data) {
    if (column + kCount > classes) return false;
    marks.weight = static_cast<float>(tb.row_weight[run.anchor(tb, row)]);
    if (!usual_scale(run.scale * marks.weight)) return false;
  }
#pragma unroll 1
  for (u32 j = 0; j < kCount; ++row, column = 0) {  // the part of one row after that of another
    const u32 width = classes - column < kCount - j ? classes - column : kCount - j;
    if (special[row / kWarp] >> row % kWarp & 1) {
      const int64_t anchor = run.anchor(tb, row), label = tb.labels.get(run.image, anchor);
      if (kOutput == kLoss && (!tb.labels.valid(anchor) || tb.scope.get(0, 0, anchor) < 0)) return false;
      if (label == kIgnore) {
        marks.off |= ((1u << width) - 1) << j;
      } else if (label >= column && label < column + width) {
        const u32 at = j + static_cast<u32>(label) - column;
        marks.template add_positive<T, kGamma, kOutput>(tb, run, run.x + e, at, anchor);
      }
    }
    j += width;
  }
  return true;
}

template <class T, int kGamma, Output kOutput>
IOUBAL_DEVICE void mark_planes(const DenseTable& tb, const DenseRun<T>& run, const u32* special, u32 e, Marks& marks) {
  u32 plane = run.level->plane.div(e), location = e - plane * run.level->locations;
#pragma unroll 1
  for (u32 j = 0; j < kVector<T>; ++j, ++location) {
    if (location == run.level->locations) {
      location = 0;
      ++plane;
    }
    const u32 a = tb.classes.div(plane);
    if (special[a * run.level->words + location / kWarp] >> location % kWarp & 1) {
      const int64_t anchor = run.anchor(tb, location * run.level->anchors + a);
      const int64_t label = tb.labels.get(run.image, anchor);
      if (label == kIgnore) {
        marks.off |= 1u << j;
      } else if (label == plane - a * tb.classes.divisor) {
        marks.template add_positive<T, kGamma, kOutput>(tb, run, run.x + e, j, anchor);
      }
    }
  }
}

// Does such a vector; false, with nothing stored, where any_entry has to.
template <class T, int kGamma, Output kOutput>
IOUBAL_DEVICE bool marked_vector(const DenseTable& tb, const DenseRun<T>& run, u32 e, const Marks& marks, float& sum) {
  constexpr int kCount = kVector<T>;
  Vec<T, kCount> in;
  in.load(run.x + e);
  float v[kCount], doubled = 0.f;
  in.unpack(v);
  switch_off(v, marks.off);
  negative_entries<kGamma, false, kOutput>(run.scale * marks.weight, tb.gamma, v, doubled);
  if (!all_good(doubled)) return false;
  sum = fmaf(kHalf * doubled, marks.weight, sum);
  if constexpr (kOutput != kNone) {
    T* const out = run.out + e;
    in.set(v);
    if (run.level->narrow) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) store_one(out + j, v[j]);
    } else {
      in.store(out);
    }
#pragma unroll 1
    for (u32 left = marks.positive; left; left &= left - 1) {
      const u32 j = __ffs(static_cast<int>(left)) - 1;
      store_one(out + j, marks.value(j));
    }
  }
  return true;
}

// Does vector number `vector` of the run, whatever is in it; it may lie partly or wholly outside.
template <class T, int kGamma, Output kOutput>
IOUBAL_DEVICE void exact_vector(const DenseTable& tb, const DenseRun<T>& run, u32 vector, float* kept, float& sum) {
  const u32 size = run.level->size, begin = vector * kVector<T>, end = begin + kVector<T>;
  const u32 first = begin < run.missing ? 0 : begin - run.missing;
  const u32 last = end < size + run.missing ? end - run.missing : size;  // vector 0 has entries, so end > missing
  if (last - first == kVector<T> && first < size && usual_scale(run.scale)) {
    const u32* special = tb.special + run.level->word(run.image);
    Marks marks;
    marks.kept = kept;
    bool could = true;
    if (run.level->planes) {
      mark_planes<T, kGamma, kOutput>(tb, run, special, first, marks);
    } else {
      could = mark_rows<T, kGamma, kOutput>(tb, run, special, first, marks);
    }
    if (could && marked_vector<T, kGamma, kOutput>(tb, run, first, marks, sum)) return;
  }
#pragma unroll 1
  for (u32 e = first; e < last; ++e) any_entry<T, kGamma, kOutput>(tb, run, e, sum);
}

}  // namespace ioubal::cuda
