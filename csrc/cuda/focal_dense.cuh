// The dense pass of the sigmoid focal loss: one read of the logits, one write of their gradient, sums in a fixed order.
// Every entry is computed as a negative, branch-free. An ignored or positive one is replaced by kOff, which contributes
// nothing; the positive's own gradient is then stored over the 0 by the same thread, in program order.
#pragma once

#include "cuda/focal_math.cuh"
#include "cuda/tables.cuh"
#include "math/balance.h"

namespace ioubal::cuda {

// What the pass writes.
enum Output : int { kNone = 0, kGradient = 1, kLoss = 2 };

// The logits of a level: of every image, rows of K (flat, channels_last) or planes of H * W (NCHW).
struct DenseLevel {
  const void* x;
  void* out;
  int64_t image_stride;   // elements
  u32 tile0, tiles;       // first tile; tiles per image (rows) or of all images (planes)
  u32 rows;               // rows: rows per image; rows * K < 2^31
  u32 locations, vector;  // planes: H * W, and elements per access, which divides it
  u32 columns;            // planes: N * A * locations / vector
  u32 anchors;            // planes: A
  u32 first_anchor;
  u32 scope_level;    // number of the level among all of them
  u32 word0, words;   // of `special`; words per image (rows) or plane
  FastDiv per_plane;  // planes: by locations / vector
};

struct DenseTable {
  DenseLevel level[kMaxLevels];
  int levels;
  u32 tiles;  // of all levels
  int64_t anchors_per_image;
  FastDiv classes;
  u32 iterations;   // rows: groups of vectors per thread and tile
  FastDiv apart;    // rows: a tile's groups lie so many groups apart, between them those of the tiles beside it
  u32 class_chunk;  // planes: classes per tile
  FastDiv chunks;   // planes: class chunks of a level
  const u32* special;
  Labels labels;
  ScopeOf scope;
  Coefficients coefficients;
  const float* weight;  // per anchor: iou^eta, times the sample's weight; read at positives only
  FloatRef row_weight;  // per row, or none: of the negatives too
  float gamma;
  NumberRef scale;     // the gradient's factor: grad_output, or in the forward what is expected of it
  NumberRef expected;  // backward: nothing to do if the scale is this
  bool skip_expected;
  float* partial;  // per tile: the negatives' loss; nullptr: not wanted

  // Whether the buffers hold what is asked for already.
  IOUBAL_DEVICE bool filled() const { return skip_expected && scale.get() == expected.get(); }
};

template <class T, int kGamma>
constexpr bool kFold = sizeof(T) == 2 && kGamma == 2;

// One level and image of the pass, as a thread sees it. What the usual path does not need is not kept: registers.
template <class T>
struct DenseRun {
  const T* x;
  T* out;
  const DenseLevel& level;
  u32 image;
  Scale scale;  // of the negatives' gradient

  IOUBAL_DEVICE int64_t anchor(const DenseTable& tb, u32 local) const {  // in the whole batch
    return image * tb.anchors_per_image + level.first_anchor + local;
  }
};

template <class T, int kGamma>
IOUBAL_DEVICE DenseRun<T> dense_run(const DenseTable& tb, const DenseLevel& level, u32 image) {
  const float scale = tb.coefficients.negative[image] * static_cast<float>(tb.scale.get());
  return {static_cast<const T*>(level.x) + image * level.image_stride,
          static_cast<T*>(level.out) + image * level.image_stride, level, image, make_scale<kFold<T, kGamma>>(scale)};
}

// The loss that `sum` stands for.
template <class T>
IOUBAL_DEVICE float run_loss(const DenseTable& tb, const DenseRun<T>& run, float sum) {
  return tb.coefficients.negative[run.image] * run.scale.inverse * run.scale.inverse * sum;
}

// Factor of a positive's loss: alpha, Eq. 4 and the divisor.
template <class T>
IOUBAL_DEVICE float positive_weight(const DenseTable& tb, const DenseRun<T>& run, int64_t anchor) {
  const int64_t scope = tb.scope.get(run.level.scope_level, run.image, anchor);
  if (scope < 0) return 0.f;
  return tb.coefficients.positive[run.image] * tb.coefficients.cls_norm[scope] * tb.weight[anchor];
}

// What a positive entry leaves in the output.
template <class T, int kGamma, Output kOutput>
IOUBAL_DEVICE float positive_value(const DenseTable& tb, const DenseRun<T>& run, float logit, int64_t anchor) {
  const float weight = positive_weight(tb, run, anchor), scale = static_cast<float>(tb.scale.get());
  float loss = 0.f;
  const float gradient = positive_entry<kGamma>(logit, weight * scale, tb.gamma, loss);
  return kOutput == kLoss ? weighted_loss(weight, loss) * scale : gradient;
}

// One entry by itself, whatever it is: `off` (ignored, positive), weighted, an infinite logit. Slow and short: few come
// here, and registers of the usual path are not to be lost to them.
template <class T, int kGamma, Output kOutput>
IOUBAL_DEVICE void any_entry(const DenseTable& tb, const DenseRun<T>& run, const T* x, T* out, bool ignored,
                             bool positive, int64_t anchor, float& sum) {
  const float logit = load_one(x);  // before it may be overwritten
  const float w = tb.row_weight.data ? static_cast<float>(tb.row_weight[anchor]) : 1.f;
  float loss = 0.f;
  const float gradient =
      negative_entry<kGamma, kFold<T, kGamma>, true>(ignored || positive ? kOff : logit, run.scale, tb.gamma, loss);
  sum = fmaf(loss, w, sum);
  if constexpr (kOutput == kNone) return;
  float value = ignored ? 0.f : w * (kOutput == kLoss ? loss * run.scale.value : gradient);  // also for a scale of inf
  if (positive) {
    value = positive_value<T, kGamma, kOutput>(tb, run, logit, anchor);
  }
  if (kOutput == kLoss && (!tb.labels.valid(anchor) || tb.scope.get(0, 0, anchor) < 0)) value = NAN;
  store_one(out, value);
}

template <class T, int kGamma, Output kOutput>
IOUBAL_DEVICE void any_row_entry(const DenseTable& tb, const DenseRun<T>& run, u32 e, float& sum) {
  const u32 row = tb.classes.div(e);
  const int64_t anchor = run.anchor(tb, row), label = tb.labels.get(run.image, anchor);
  const bool positive = label == static_cast<int64_t>(e - row * tb.classes.divisor);
  any_entry<T, kGamma, kOutput>(tb, run, run.x + e, run.out + e, label == kIgnore, positive, anchor, sum);
}

// kCount negatives, but for those of the bits `off`: in the place of their logits their gradients or losses. Their sum
// is added to `sum`; where it is not finite, the fast form's derivatives may be NaN, and any_entry has to do them all.
template <int kGamma, bool kFolded, Output kOutput, int kCount>
IOUBAL_DEVICE void negative_entries(const Scale& scale, float gamma, float (&v)[kCount], u32 off, float& sum) {
  if (off) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) v[j] = off >> j & 1 ? kOff : v[j];
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    float loss = kOutput == kLoss ? 0.f : sum;
    v[j] = negative_entry<kGamma, kFolded, false>(v[j], scale, gamma, loss);
    if constexpr (kOutput == kLoss) {
      v[j] = loss * scale.value;
      loss += sum;
    }
    sum = loss;
  }
}
template <Output kOutput>
IOUBAL_DEVICE bool all_good(float sum) {
  return kOutput != kGradient || sum < 1e35f;
}

// The usual path: several vectors of negatives, all loaded before the first is used. Returns the bits of those left as
// they were: the ones of `skip`, and from the first whose loss is not finite on all. (The sum is lost in that case.)
constexpr u32 kVectorsInFlight = 4, kAllVectors = (1u << kVectorsInFlight) - 1;
template <class T, int kCount, int kGamma, Output kOutput>
IOUBAL_DEVICE u32 negative_group(const DenseTable& tb, const DenseRun<T>& run,
                                 const Vec<T, kCount> (&in)[kVectorsInFlight], T* out, u32 stride, u32 skip,
                                 u32 ignored, float& sum) {
#pragma unroll
  for (u32 u = 0; u < kVectorsInFlight; ++u) {
    float v[kCount], total = sum;
    in[u].unpack(v);
    negative_entries<kGamma, kFold<T, kGamma>, kOutput>(run.scale, tb.gamma, v, ignored, total);
    if (skip >> u & 1) continue;
    sum = total;
    if (!all_good<kOutput>(sum)) return skip | (kAllVectors & ~((1u << u) - 1));
    if constexpr (kOutput != kNone) Vec<T, kCount>::store(out + u * stride, v);
  }
  return skip;
}

// How the usual path computes, and how a tile is divided: here by arithmetic, a block a tile. The other way is
// TableEntries of focal_table.cuh.
struct ComputedEntries {
  static constexpr u32 kBlock = kThreads, kTile = kThreads;  // threads
  IOUBAL_DEVICE bool serves(const Scale& scale) const { return scale.usual; }
  template <int kGamma, Output kOutput, class T, int kCount>
  IOUBAL_DEVICE u32 group(const DenseTable& tb, const DenseRun<T>& run, const Vec<T, kCount> (&in)[kVectorsInFlight],
                          T* out, u32 stride, u32 skip, u32 ignored, float& sum) const {
    return negative_group<T, kCount, kGamma, kOutput>(tb, run, in, out, stride, skip, ignored, sum);
  }
};

// A thread of its tile.
template <class Entries>
IOUBAL_DEVICE u32 tile_thread() {
  return Entries::kTile == Entries::kBlock ? threadIdx.x : threadIdx.x % Entries::kTile;
}

// A vector with entries that are no negatives, as bits: the values of the positive ones are computed before anything is
// stored, since in place that takes their logits away, and kept in shared memory, a column a thread.
constexpr u32 kKept = 8;
template <u32 kBlock>
struct Marks {
  u32 off = 0, positive = 0;
  float* kept;
  IOUBAL_DEVICE float& value(u32 j) const { return kept[j * kBlock + threadIdx.x]; }

  template <class T, int kGamma, Output kOutput>
  IOUBAL_DEVICE void add_positive(const DenseTable& tb, const DenseRun<T>& run, const T* x, u32 j, int64_t anchor) {
    off |= 1u << j;
    if constexpr (kOutput != kNone) {
      positive |= 1u << j;
      value(j) = positive_value<T, kGamma, kOutput>(tb, run, load_one(x + j), anchor);
    }
  }
};

// Does such a vector; false, with nothing stored, as above. weight: the row's own, or 1.
template <class T, int kCount, int kGamma, Output kOutput, u32 kBlock>
IOUBAL_DEVICE bool marked_vector(const DenseTable& tb, const DenseRun<T>& run, const T* x, T* out,
                                 const Marks<kBlock>& marks, float weight, float& sum) {
  Vec<T, kCount> in;
  in.load(x);
  float v[kCount];
  in.unpack(v);
  if (weight == 1.f) {
    negative_entries<kGamma, kFold<T, kGamma>, kOutput>(run.scale, tb.gamma, v, marks.off, sum);
  } else {
    float loss = 0.f;
    negative_entries<kGamma, false, kOutput>(make_scale<false>(run.scale.value * weight), tb.gamma, v, marks.off, loss);
    sum = fmaf(loss, weight * run.scale.root * run.scale.root, sum);
  }
  if (!all_good<kOutput>(sum)) return false;
  if constexpr (kOutput != kNone) {
    in.set(v);
    in.store(out);
#pragma unroll 1
    for (u32 left = marks.positive; left; left &= left - 1) {
      const u32 j = __ffs(static_cast<int>(left)) - 1;
      store_one(out + j, marks.value(j));
    }
  }
  return true;
}

// Whether a row in [first, last] (at most 31 apart) is not plain background.
IOUBAL_DEVICE bool any_special(const u32* special, u32 first, u32 last) {
  const u32 low = special[first / 32], high = special[last / 32];
  return (__funnelshift_r(low, high, first % 32) & ((2u << (last - first)) - 1)) != 0;
}

// Whether the vector at entry e of the run's rows could be done as one; what is not plain background is marked.
template <class T, int kCount, int kGamma, Output kOutput, u32 kBlock>
IOUBAL_DEVICE bool mark_rows(const DenseTable& tb, const DenseRun<T>& run, const u32* special, u32 e,
                             Marks<kBlock>& marks, float& weight) {
  const u32 classes = tb.classes.divisor;
  u32 row = tb.classes.div(e), column = e - row * classes;
  if (tb.row_weight.data) {
    if (column + kCount > classes) return false;
    weight = static_cast<float>(tb.row_weight[run.anchor(tb, row)]);
    if (!(fabsf(run.scale.value * weight) < 1e30f)) return false;
  }
#pragma unroll 1
  for (u32 j = 0; j < kCount; ++row, column = 0) {  // the part of one row after that of another
    const u32 width = classes - column < kCount - j ? classes - column : kCount - j;
    if (special[row / 32] >> row % 32 & 1) {
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

// A tile of rows. kSpan: a vector may touch several rows, and a run may start at an address that is not a multiple of
// 16 (then its first elements come one by one). Vectors with something special are done later: the loop of the usual
// ones needs few registers then, and no warp waits within it.
constexpr u32 kMostIterations = 32 / kVectorsInFlight;  // a bit each for the vectors done later
template <class T, int kCount, int kGamma, Output kOutput, bool kSpan, class Entries>
IOUBAL_DEVICE void rows_tile(const DenseTable& tb, const DenseRun<T>& run, const Entries& entries, u32 tile,
                             float* kept, float& sum) {
  constexpr u32 kStep = Entries::kTile * kCount, kGroup = kVectorsInFlight * kStep;
  const u32 size = run.level.rows * tb.classes.divisor, thread = tile_thread<Entries>();
  const u32* special = tb.special + run.level.word0 + run.image * run.level.words;
  u32 head = 0;
  if constexpr (kSpan && kCount > 1) {
    head = static_cast<u32>((16 - reinterpret_cast<uintptr_t>(run.x) % 16) % 16 / sizeof(T));
    head = head < size ? head : size;
    if (tile == 0 && thread < head) any_row_entry<T, kGamma, kOutput>(tb, run, thread, sum);
  }
  const u32 apart = tb.apart.divisor, step = apart * kGroup;
  const u32 first = head + (tb.apart.div(tile) * (tb.iterations - 1) * apart + tile) * kGroup + thread * kCount;
  const u32 usual_size = entries.serves(run.scale) && !tb.row_weight.data ? size : 0;
  u32 later = 0;
#pragma unroll 1
  for (u32 e0 = first; e0 - first < tb.iterations * step; e0 += step) {
    u32 left = kAllVectors;
    if (e0 + (kGroup - kStep) + kCount <= usual_size) {
      Vec<T, kCount> in[kVectorsInFlight];
      const T* x = run.x + e0;  // constant distances from one 64-bit pointer
#pragma unroll
      for (u32 u = 0; u < kVectorsInFlight; ++u) in[u].load(x + u * kStep);
      left = 0;
#pragma unroll
      for (u32 u = 0; u < kVectorsInFlight; ++u) {
        const u32 e = e0 + u * kStep, row = tb.classes.div(e);
        left |= any_special(special, row, kSpan ? tb.classes.div(e + kCount - 1) : row) << u;
      }
      left = entries.template group<kGamma, kOutput>(tb, run, in, run.out + e0, kStep, left, 0, sum);
    }
    later = later >> kVectorsInFlight | left << (32 - kVectorsInFlight);
  }
  later >>= (kMostIterations - tb.iterations) * kVectorsInFlight;
#pragma unroll 1
  for (; later; later &= later - 1) {
    const u32 vector = __ffs(static_cast<int>(later)) - 1;
    const u32 e = first + vector / kVectorsInFlight * step + vector % kVectorsInFlight * kStep;
    if (e >= size) return;
    Marks<Entries::kBlock> marks;
    marks.kept = kept;
    float weight = 1.f;
    if (run.scale.usual && e + kCount <= size &&
        mark_rows<T, kCount, kGamma, kOutput>(tb, run, special, e, marks, weight) &&
        marked_vector<T, kCount, kGamma, kOutput>(tb, run, run.x + e, run.out + e, marks, weight, sum)) {
      continue;
    }
#pragma unroll 1
    for (u32 i = e; i < e + kCount && i < size; ++i) any_row_entry<T, kGamma, kOutput>(tb, run, i, sum);
  }
}

// A tile of planes: a thread owns kCount neighbouring locations of one (image, anchor) and walks a chunk of classes.
template <class T, int kCount, int kGamma, Output kOutput, class Entries>
IOUBAL_DEVICE void planes_tile(const DenseTable& tb, const DenseLevel& level, const Entries& entries, u32 tile,
                               float* kept, float& loss) {
  const u32 block = tb.chunks.div(tile), column = block * Entries::kTile + tile_thread<Entries>();
  if (column >= level.columns) return;
  const u32 classes = tb.classes.divisor, first_class = (tile - block * tb.chunks.divisor) * tb.class_chunk;
  const u32 last_class = first_class + tb.class_chunk < classes ? first_class + tb.class_chunk : classes;
  const u32 plane = level.per_plane.div(column), at = (column - plane * level.per_plane.divisor) * kCount;
  const u32 image = plane / level.anchors, a = plane - image * level.anchors;
  const DenseRun<T> run = dense_run<T, kGamma>(tb, level, image);
  const int64_t anchor0 = run.anchor(tb, at * level.anchors + a);
  const auto anchor = [&](u32 j) { return anchor0 + static_cast<int64_t>(j) * level.anchors; };
  // Locations that are not plain background; those ignored; classes that are done later, as for rows.
  const u32 special = tb.special[level.word0 + plane * level.words + at / 32] >> at % 32 & ((1u << kCount) - 1);
  u32 ignored = 0, later = entries.serves(run.scale) ? 0 : ~0u;
#pragma unroll 1
  for (u32 left = special; left; left &= left - 1) {
    const u32 j = __ffs(static_cast<int>(left)) - 1;
    const int64_t y = tb.labels.get(image, anchor(j));
    if (y == kIgnore) ignored |= 1u << j;
    if (y >= first_class && y < last_class) later |= 1u << (static_cast<u32>(y) - first_class);
  }
  const u32 locations = level.locations;
  const int64_t offset = (static_cast<int64_t>(a) * classes + first_class) * locations + at;
  const T* x = run.x + offset;
  T* out = run.out + offset;
  const u32 count = last_class - first_class;
  float sum = 0.f;
  u32 k = 0;
#pragma unroll 1
  for (; k + kVectorsInFlight <= count; k += kVectorsInFlight) {
    const u32 skip = later >> k & kAllVectors;
    if (skip != kAllVectors) {
      Vec<T, kCount> in[kVectorsInFlight];
#pragma unroll
      for (u32 u = 0; u < kVectorsInFlight; ++u) in[u].load(x + u * locations);
      later |= entries.template group<kGamma, kOutput>(tb, run, in, out, locations, skip, ignored, sum) << k;
    }
    x += kVectorsInFlight * locations;
    out += kVectorsInFlight * locations;
  }
  if (count < 32) later = (later | ~0u << k) & ((1u << count) - 1);  // what is left of the classes comes later, too
#pragma unroll 1
  for (; later; later &= later - 1) {
    k = __ffs(static_cast<int>(later)) - 1;
    const int64_t from = offset + static_cast<int64_t>(k) * locations;
    Marks<Entries::kBlock> marks;
    marks.kept = kept;
    marks.off = ignored;
#pragma unroll 1
    for (u32 left = special & ~ignored; left && run.scale.usual; left &= left - 1) {
      const u32 j = __ffs(static_cast<int>(left)) - 1;
      if (tb.labels.get(image, anchor(j)) == first_class + k) {
        marks.template add_positive<T, kGamma, kOutput>(tb, run, run.x + from, j, anchor(j));
      }
    }
    if (run.scale.usual &&
        marked_vector<T, kCount, kGamma, kOutput>(tb, run, run.x + from, run.out + from, marks, 1.f, sum)) {
      continue;
    }
#pragma unroll 1
    for (u32 j = 0; j < kCount; ++j) {
      const bool positive = (special >> j & 1) && tb.labels.get(image, anchor(j)) == first_class + k;
      any_entry<T, kGamma, kOutput>(tb, run, run.x + from + j, run.out + from + j, ignored >> j & 1, positive,
                                    anchor(j), sum);
    }
  }
  loss = run_loss(tb, run, sum);
}

enum class DenseLayout : int { kRows, kSpanningRows, kSingleRows, kPlanes };

// Tile `tile` of the table, by the threads that it has; the loss it stands for, of each.
template <class T, int kGamma, Output kOutput, DenseLayout kLayout, class Entries>
IOUBAL_DEVICE float dense_tile(const DenseTable& tb, const Entries& entries, u32 tile, float* kept) {
  constexpr int kFull = 16 / static_cast<int>(sizeof(T));
  int l = 0;
  while (l + 1 < tb.levels && tile >= tb.level[l + 1].tile0) ++l;
  const DenseLevel& level = tb.level[l];
  const u32 local = tile - level.tile0;
  float loss = 0.f;
  if constexpr (kLayout == DenseLayout::kPlanes) {
    if (level.vector == kFull) {
      planes_tile<T, kFull, kGamma, kOutput>(tb, level, entries, local, kept, loss);
    } else if (kFull == 8 && level.vector == 4) {
      planes_tile<T, 4, kGamma, kOutput>(tb, level, entries, local, kept, loss);
    } else if (level.vector == 2) {
      planes_tile<T, 2, kGamma, kOutput>(tb, level, entries, local, kept, loss);
    } else {
      planes_tile<T, 1, kGamma, kOutput>(tb, level, entries, local, kept, loss);
    }
  } else {
    const u32 image = local / level.tiles;
    const DenseRun<T> run = dense_run<T, kGamma>(tb, level, image);
    constexpr int kCount = kLayout == DenseLayout::kSingleRows ? 1 : kFull;
    float sum = 0.f;
    rows_tile<T, kCount, kGamma, kOutput, kLayout != DenseLayout::kRows>(tb, run, entries, local - image * level.tiles,
                                                                         kept, sum);
    loss = run_loss(tb, run, sum);
  }
  return loss;
}

}  // namespace ioubal::cuda
