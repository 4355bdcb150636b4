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

// kCount negatives, but for the ignored ones of the bits `ignored`, whose vector's loss is added to `sum`. False, with
// nothing written, where a loss is not finite: there the fast form's derivative may be NaN, and any_entry has to do it.
// (The sum is lost either way.)
template <class T, int kCount, int kGamma, bool kFolded, Output kOutput>
IOUBAL_DEVICE bool negative_vector(const Scale& scale, float gamma, const Vec<T, kCount>& in, T* out, u32 ignored,
                                   float& sum) {
  float v[kCount];
  in.unpack(v);
  if (ignored) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) v[j] = ignored >> j & 1 ? kOff : v[j];
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
  if constexpr (kOutput == kNone) return true;
  const bool good = kOutput == kLoss || sum < 1e35f;
  if (good) Vec<T, kCount>::store(out, v);
  return good;
}

// Whether a row in [first, last] (at most 31 apart) is not plain background.
IOUBAL_DEVICE bool any_special(const u32* special, u32 first, u32 last) {
  const u32 low = special[first / 32], high = special[last / 32];
  return (__funnelshift_r(low, high, first % 32) & ((2u << (last - first)) - 1)) != 0;
}

constexpr int kVectorsInFlight = 4;
constexpr u32 kAllVectors = (1u << kVectorsInFlight) - 1;

// What is special in a thread's group of vectors, as bits u * kCount + j. The values of positives are computed before
// anything is stored, since in place a store takes the logit away, and kept in shared memory, a column a thread.
struct Marks {
  u32 masked = 0;    // no negative: ignored or positive
  u32 positive = 0;  // a value is kept
};
constexpr u32 kKept = 8;
IOUBAL_DEVICE float& kept_value(float* kept, u32 i) { return kept[i * kThreads + threadIdx.x]; }

// Marks the entries of the vectors `any` of the group at `e0`. False where they have to be done one by one.
template <class T, int kCount, int kGamma, Output kOutput>
IOUBAL_DEVICE bool mark_rows(const DenseTable& tb, const DenseRun<T>& run, u32 e0, u32 any, float* kept, Marks& marks) {
  const u32 classes = tb.classes.divisor;
  u32 count = 0;
#pragma unroll 1
  for (; any; any &= any - 1) {
    const u32 u = __ffs(static_cast<int>(any)) - 1, e = e0 + u * kThreads * kCount;
    u32 row = tb.classes.div(e), column = e - row * classes;
#pragma unroll 1
    for (u32 j = 0; j < kCount; ++row, column = 0) {  // the part of one row after that of another
      const u32 width = classes - column < kCount - j ? classes - column : kCount - j;
      const int64_t anchor = run.anchor(tb, row), label = tb.labels.get(run.image, anchor);
      if (kOutput == kLoss && (!tb.labels.valid(anchor) || tb.scope.get(0, 0, anchor) < 0)) return false;
      if (label == kIgnore) {
        marks.masked |= ((1u << width) - 1) << (u * kCount + j);
      } else if (label >= column && label < column + width) {
        const u32 at = j + static_cast<u32>(label) - column, bit = 1u << (u * kCount + at);
        marks.masked |= bit;
        if constexpr (kOutput != kNone) {
          if (count == kKept) return false;
          kept_value(kept, count++) = positive_value<T, kGamma, kOutput>(tb, run, load_one(run.x + e + at), anchor);
          marks.positive |= bit;
        }
      }
      j += width;
    }
  }
  return true;
}

// A group of vectors of rows that have weights of their own: unfolded, one after another. Returns those that have to be
// done entry by entry.
template <class T, int kCount, int kGamma, Output kOutput>
IOUBAL_DEVICE u32 weighted_rows(const DenseTable& tb, const DenseRun<T>& run, u32 e0, u32 masked, float& sum) {
  u32 slow = 0;
#pragma unroll 1
  for (u32 u = 0; u < kVectorsInFlight; ++u) {
    const u32 e = e0 + u * kThreads * kCount, row = tb.classes.div(e);
    const float weight = static_cast<float>(tb.row_weight[run.anchor(tb, row)]);
    const Scale scale = make_scale<false>(run.scale.value * weight);
    Vec<T, kCount> in;
    in.load(run.x + e);
    float loss = 0.f;
    if (tb.classes.div(e + kCount - 1) != row || !scale.usual ||
        !negative_vector<T, kCount, kGamma, false, kOutput>(scale, tb.gamma, in, run.out + e,
                                                            masked >> u * kCount & ((1u << kCount) - 1), loss)) {
      slow |= 1u << u;
    } else {
      sum = fmaf(loss, weight * run.scale.root * run.scale.root, sum);
    }
  }
  return slow;
}

// A tile of rows. kSpan: a vector may touch several rows, and a run may start at an address that is not a multiple of
// 16 (then its first elements come one by one).
template <class T, int kCount, int kGamma, Output kOutput, bool kSpan>
IOUBAL_DEVICE void rows_tile(const DenseTable& tb, const DenseRun<T>& run, u32 tile, float* kept, float& sum) {
  constexpr u32 kStep = kThreads * kCount;
  const u32 size = run.level.rows * tb.classes.divisor;
  const u32* special = tb.special + run.level.word0 + run.image * run.level.words;
  u32 head = 0;
  if constexpr (kSpan && kCount > 1) {
    head = static_cast<u32>((16 - reinterpret_cast<uintptr_t>(run.x) % 16) % 16 / sizeof(T));
    head = head < size ? head : size;
    if (tile == 0 && threadIdx.x < head) any_row_entry<T, kGamma, kOutput>(tb, run, threadIdx.x, sum);
  }
  u32 e0 = head + tile * tb.iterations * kVectorsInFlight * kStep + threadIdx.x * kCount;
#pragma unroll 1
  for (u32 it = 0; it < tb.iterations; ++it, e0 += kVectorsInFlight * kStep) {
    if (e0 + (kVectorsInFlight - 1) * kStep + kCount <= size) {
      Vec<T, kCount> in[kVectorsInFlight];
      const T* x = run.x + e0;  // constant distances from one 64-bit pointer
      T* out = run.out + e0;
#pragma unroll
      for (int u = 0; u < kVectorsInFlight; ++u) in[u].load(x + u * kStep);
      u32 any = 0;  // one test for all the vectors in flight
#pragma unroll
      for (int u = 0; u < kVectorsInFlight; ++u) {
        const u32 e = e0 + u * kStep, first = tb.classes.div(e);
        any |= any_special(special, first, kSpan ? tb.classes.div(e + kCount - 1) : first) << u;
      }
      Marks marks;
      u32 slow = 0;  // vectors to do entry by entry
      if (!run.scale.usual || (any && !mark_rows<T, kCount, kGamma, kOutput>(tb, run, e0, any, kept, marks))) {
        slow = kAllVectors;
        marks.positive = 0;
      } else if (tb.row_weight.data) {
        slow = weighted_rows<T, kCount, kGamma, kOutput>(tb, run, e0, marks.masked, sum);
      } else {
        if (marks.masked) {  // rare: read again, from L2
          const T* again = another(x);
#pragma unroll
          for (int u = 0; u < kVectorsInFlight; ++u) {
            in[u].load(again + u * kStep);
            in[u].overwrite(marks.masked >> u * kCount, off_bits(T()));
          }
        }
#pragma unroll
        for (int u = 0; u < kVectorsInFlight; ++u) {
          if (!negative_vector<T, kCount, kGamma, kFold<T, kGamma>, kOutput>(run.scale, tb.gamma, in[u],
                                                                             out + u * kStep, 0, sum)) {
            slow |= 1u << u;
          }
        }
      }
#pragma unroll 1
      for (; slow; slow &= slow - 1) {
        const u32 e1 = e0 + (__ffs(static_cast<int>(slow)) - 1) * kStep;
#pragma unroll 1
        for (u32 e = e1; e < e1 + kCount; ++e) any_row_entry<T, kGamma, kOutput>(tb, run, e, sum);
      }
#pragma unroll 1
      for (u32 i = 0; marks.positive; marks.positive &= marks.positive - 1, ++i) {
        const u32 bit = __ffs(static_cast<int>(marks.positive)) - 1;
        store_one(out + bit / kCount * kStep + bit % kCount, kept_value(kept, i));
      }
    } else {
#pragma unroll 1
      for (int u = 0; u < kVectorsInFlight; ++u) {
        const u32 e1 = e0 + u * kStep;
#pragma unroll 1
        for (u32 e = e1; e < e1 + kCount && e < size; ++e) any_row_entry<T, kGamma, kOutput>(tb, run, e, sum);
      }
    }
  }
}

// A tile of planes: a thread owns kCount neighbouring locations of one (image, anchor) and walks a chunk of classes.
template <class T, int kCount, int kGamma, Output kOutput>
IOUBAL_DEVICE void planes_tile(const DenseTable& tb, const DenseLevel& level, u32 tile, float* kept, float& loss) {
  const u32 block = tb.chunks.div(tile), column = block * kThreads + threadIdx.x;
  if (column >= level.columns) return;
  const u32 classes = tb.classes.divisor, first_class = (tile - block * tb.chunks.divisor) * tb.class_chunk;
  const u32 last_class = first_class + tb.class_chunk < classes ? first_class + tb.class_chunk : classes;
  const u32 plane = level.per_plane.div(column), at = (column - plane * level.per_plane.divisor) * kCount;
  const u32 image = plane / level.anchors, a = plane - image * level.anchors;
  const DenseRun<T> run = dense_run<T, kGamma>(tb, level, image);
  const int64_t anchor0 = run.anchor(tb, at * level.anchors + a);
  const auto anchor = [&](u32 j) { return anchor0 + static_cast<int64_t>(j) * level.anchors; };
  const u32 bits = tb.special[level.word0 + plane * level.words + at / 32] >> at % 32 & ((1u << kCount) - 1);
  constexpr u32 kNever = 1u << 30;
  u32 ignored = 0, next = kNever;  // ignored locations; the next class with a positive
#pragma unroll 1
  for (u32 left = bits; left; left &= left - 1) {
    const u32 j = __ffs(static_cast<int>(left)) - 1;
    const int64_t y = tb.labels.get(image, anchor(j));
    if (y == kIgnore) ignored |= 1u << j;
    if (y >= first_class && y < next) next = static_cast<u32>(y);
  }
  const u32 locations = level.locations;
  const int64_t offset = (static_cast<int64_t>(a) * classes + first_class) * locations + at;
  const T* x = run.x + offset;
  T* out = run.out + offset;
  float sum = 0.f;
  // Marks the positives of classes k to k + 3, and finds the next class after them that has one.
  const auto mark = [&](u32 k, Marks& marks) {
    next = kNever;
#pragma unroll 1
    for (u32 left = bits; left; left &= left - 1) {
      const u32 j = __ffs(static_cast<int>(left)) - 1;
      const int64_t y = tb.labels.get(image, anchor(j));
      if (y < k) continue;
      const u32 u = static_cast<u32>(y) - k;
      if (u >= kVectorsInFlight) {
        next = u + k < next ? u + k : next;
        continue;
      }
      marks.masked |= 1u << (u * kCount + j);
      if constexpr (kOutput != kNone) {
        const float logit = load_one(x + u * locations + j);
        kept_value(kept, j) = positive_value<T, kGamma, kOutput>(tb, run, logit, anchor(j));  // one class a location
        marks.positive |= 1u << (u * kCount + j);
      }
    }
  };
  // The vector of class k, one location after another.
  const auto one_by_one = [&](u32 k, const T* from, T* to) {
#pragma unroll 1
    for (u32 j = 0; j < kCount; ++j) {
      const bool positive = (bits >> j & 1) && tb.labels.get(image, anchor(j)) == k;
      any_entry<T, kGamma, kOutput>(tb, run, from + j, to + j, ignored >> j & 1, positive, anchor(j), sum);
    }
  };
  u32 k = first_class;
#pragma unroll 1
  for (; k + kVectorsInFlight <= last_class; k += kVectorsInFlight) {
    Vec<T, kCount> in[kVectorsInFlight];
#pragma unroll
    for (int u = 0; u < kVectorsInFlight; ++u) in[u].load(x + u * locations);
    Marks marks;
    u32 slow = 0;  // vectors to do entry by entry
    if (run.scale.usual) {
      if (next - k < kVectorsInFlight) {
        mark(k, marks);
        const T* again = another(x);
#pragma unroll
        for (int u = 0; u < kVectorsInFlight; ++u) {
          in[u].load(again + u * locations);
          in[u].overwrite(marks.masked >> u * kCount, off_bits(T()));
        }
      }
#pragma unroll
      for (int u = 0; u < kVectorsInFlight; ++u) {
        if (!negative_vector<T, kCount, kGamma, kFold<T, kGamma>, kOutput>(run.scale, tb.gamma, in[u],
                                                                           out + u * locations, ignored, sum)) {
          slow |= 1u << u;
        }
      }
    } else {
      slow = kAllVectors;
    }
#pragma unroll 1
    for (; slow; slow &= slow - 1) {
      const u32 u = __ffs(static_cast<int>(slow)) - 1;
      one_by_one(k + u, x + u * locations, out + u * locations);
    }
#pragma unroll 1
    for (; marks.positive; marks.positive &= marks.positive - 1) {
      const u32 bit = __ffs(static_cast<int>(marks.positive)) - 1, j = bit % kCount;
      store_one(out + bit / kCount * locations + j, kept_value(kept, j));
    }
    x += kVectorsInFlight * locations;
    out += kVectorsInFlight * locations;
  }
#pragma unroll 1
  for (; k < last_class; ++k, x += locations, out += locations) one_by_one(k, x, out);
  loss = run_loss(tb, run, sum);
}

enum class DenseLayout : int { kRows, kSpanningRows, kSingleRows, kPlanes };

// Tile `tile` of the table, by all threads of the block.
template <class T, int kGamma, Output kOutput, DenseLayout kLayout>
IOUBAL_DEVICE void dense_tile(const DenseTable& tb, u32 tile, float* kept, float* scratch) {
  constexpr int kFull = 16 / static_cast<int>(sizeof(T));
  int l = 0;
  while (l + 1 < tb.levels && tile >= tb.level[l + 1].tile0) ++l;
  const DenseLevel& level = tb.level[l];
  const u32 local = tile - level.tile0;
  float loss = 0.f;
  if constexpr (kLayout == DenseLayout::kPlanes) {
    if (level.vector == kFull) {
      planes_tile<T, kFull, kGamma, kOutput>(tb, level, local, kept, loss);
    } else if (kFull == 8 && level.vector == 4) {
      planes_tile<T, 4, kGamma, kOutput>(tb, level, local, kept, loss);
    } else if (level.vector == 2) {
      planes_tile<T, 2, kGamma, kOutput>(tb, level, local, kept, loss);
    } else {
      planes_tile<T, 1, kGamma, kOutput>(tb, level, local, kept, loss);
    }
  } else {
    const u32 image = local / level.tiles;
    const DenseRun<T> run = dense_run<T, kGamma>(tb, level, image);
    constexpr int kCount = kLayout == DenseLayout::kSingleRows ? 1 : kFull;
    float sum = 0.f;
    rows_tile<T, kCount, kGamma, kOutput, kLayout != DenseLayout::kRows>(tb, run, local - image * level.tiles, kept,
                                                                         sum);
    loss = run_loss(tb, run, sum);
  }
  if (tb.partial == nullptr) return;
  __syncthreads();  // the scratch of the tile before
  const float total = block_sum(loss, scratch);
  if (threadIdx.x == 0) tb.partial[tile] = total;
}

}  // namespace ioubal::cuda
