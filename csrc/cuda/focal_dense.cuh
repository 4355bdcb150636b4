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
    const float weight = positive_weight(tb, run, anchor);
    loss = 0.f;
    const float scale = static_cast<float>(tb.scale.get());
    value = positive_entry<kGamma>(logit, weight * scale, tb.gamma, loss);
    if (kOutput == kLoss) value = weighted_loss(weight, loss) * scale;
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

// kCount negatives, but for the ignored ones of the bits `ignored`. False, with nothing written, where a loss is not
// finite: there the fast form's derivative may be NaN, and any_entry has to do it. (The sum is lost either way.)
template <class T, int kCount, int kGamma, Output kOutput>
IOUBAL_DEVICE bool negative_vector(const DenseTable& tb, const DenseRun<T>& run, const Vec<T, kCount>& in, T* out,
                                   u32 ignored, float& sum) {
  float v[kCount];
  in.unpack(v);
  if (ignored) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) v[j] = ignored >> j & 1 ? kOff : v[j];
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    float loss = kOutput == kLoss ? 0.f : sum;
    v[j] = negative_entry<kGamma, kFold<T, kGamma>, false>(v[j], run.scale, tb.gamma, loss);
    if constexpr (kOutput == kLoss) {
      v[j] = loss * run.scale.value;
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

// A tile of rows. kSpan: a vector may touch several rows, and a run may start at an address that is not a multiple of
// 16 (then its first elements come one by one).
template <class T, int kCount, int kGamma, Output kOutput, bool kSpan>
IOUBAL_DEVICE void rows_tile(const DenseTable& tb, const DenseRun<T>& run, u32 tile, float& sum) {
  constexpr u32 kStep = kThreads * kCount;
  const u32 size = run.level.rows * tb.classes.divisor;
  const u32* special = tb.special + run.level.word0 + run.image * run.level.words;
  const bool usual = run.scale.usual && !tb.row_weight.data;
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
      u32 slow = 0;  // vectors to do entry by entry
      if (usual && !any) {
#pragma unroll
        for (int u = 0; u < kVectorsInFlight; ++u) {
          if (!negative_vector<T, kCount, kGamma, kOutput>(tb, run, in[u], out + u * kStep, 0, sum)) slow |= 1u << u;
        }
      } else {
#pragma unroll 1  // short code; what is needed is read again, from L2
        for (int u = 0; u < kVectorsInFlight; ++u) {
          Vec<T, kCount> again;
          again.load(x + u * kStep);
          if (!usual || (any >> u & 1) ||
              !negative_vector<T, kCount, kGamma, kOutput>(tb, run, again, out + u * kStep, 0, sum)) {
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
IOUBAL_DEVICE void planes_tile(const DenseTable& tb, const DenseLevel& level, u32 tile, float& loss) {
  const u32 block = tb.chunks.div(tile), column = block * kThreads + threadIdx.x;
  if (column >= level.columns) return;
  const u32 classes = tb.classes.divisor, first_class = (tile - block * tb.chunks.divisor) * tb.class_chunk;
  const u32 last_class = first_class + tb.class_chunk < classes ? first_class + tb.class_chunk : classes;
  const u32 plane = level.per_plane.div(column), at = (column - plane * level.per_plane.divisor) * kCount;
  const u32 image = plane / level.anchors, a = plane - image * level.anchors;
  const DenseRun<T> run = dense_run<T, kGamma>(tb, level, image);
  const int64_t anchor0 = run.anchor(tb, at * level.anchors + a);
  const auto label = [&](int j) { return tb.labels.get(image, anchor0 + static_cast<int64_t>(j) * level.anchors); };
  const u32 bits = tb.special[level.word0 + plane * level.words + at / 32] >> at % 32 & ((1u << kCount) - 1);
  const bool usual = run.scale.usual;
  constexpr u32 kNever = 1u << 30;
  u32 ignored = 0, next = kNever;  // ignored locations; the next class with a positive
  if (bits) {
#pragma unroll 1
    for (int j = 0; j < kCount; ++j) {
      const int64_t y = label(j);
      if (y == kIgnore) ignored |= 1u << j;
      if (y >= first_class && y < next) next = static_cast<u32>(y);
    }
  }
  const u32 locations = level.locations;
  const int64_t offset = (static_cast<int64_t>(a) * classes + first_class) * locations + at;
  const T* x = run.x + offset;
  T* out = run.out + offset;
  float sum = 0.f;
  // The vector of class k, one location after another.
  const auto special = [&](u32 k, const T* from, T* to) {
    const bool here = k == next;
    if (here) next = kNever;
#pragma unroll 1
    for (int j = 0; j < kCount; ++j) {
      int64_t y = kBackground;
      if (here) {
        y = label(j);
        if (y > k && y < next) next = static_cast<u32>(y);
      }
      any_entry<T, kGamma, kOutput>(tb, run, from + j, to + j, ignored >> j & 1, y == k,
                                    anchor0 + static_cast<int64_t>(j) * level.anchors, sum);
    }
  };
  u32 k = first_class;
#pragma unroll 1
  for (; k + kVectorsInFlight <= last_class; k += kVectorsInFlight) {
    Vec<T, kCount> in[kVectorsInFlight];
#pragma unroll
    for (int u = 0; u < kVectorsInFlight; ++u) in[u].load(x + u * locations);
    u32 slow = 0;  // vectors to do entry by entry
    if (usual && next - k >= kVectorsInFlight) {
#pragma unroll
      for (int u = 0; u < kVectorsInFlight; ++u) {
        T* const to = out + u * locations;
        if (!negative_vector<T, kCount, kGamma, kOutput>(tb, run, in[u], to, ignored, sum)) slow |= 1u << u;
      }
    } else {
#pragma unroll 1
      for (int u = 0; u < kVectorsInFlight; ++u) {
        Vec<T, kCount> again;
        again.load(x + u * locations);
        T* const to = out + u * locations;
        if (!usual || k + u >= next ||  // what follows the next positive may hold another: `next` moves below
            !negative_vector<T, kCount, kGamma, kOutput>(tb, run, again, to, ignored, sum)) {
          slow |= 1u << u;
        }
      }
    }
#pragma unroll 1
    for (; slow; slow &= slow - 1) {
      const u32 u = __ffs(static_cast<int>(slow)) - 1;
      special(k + u, x + u * locations, out + u * locations);
    }
    x += kVectorsInFlight * locations;
    out += kVectorsInFlight * locations;
  }
#pragma unroll 1
  for (; k < last_class; ++k, x += locations, out += locations) special(k, x, out);
  loss = run_loss(tb, run, sum);
}

enum class DenseLayout : int { kRows, kSpanningRows, kSingleRows, kPlanes };

// Tile `tile` of the table, by all threads of the block.
template <class T, int kGamma, Output kOutput, DenseLayout kLayout>
IOUBAL_DEVICE void dense_tile(const DenseTable& tb, u32 tile, float* scratch) {
  constexpr int kFull = 16 / static_cast<int>(sizeof(T));
  int l = 0;
  while (l + 1 < tb.levels && tile >= tb.level[l + 1].tile0) ++l;
  const DenseLevel& level = tb.level[l];
  const u32 local = tile - level.tile0;
  float loss = 0.f;
  if constexpr (kLayout == DenseLayout::kPlanes) {
    if (level.vector == kFull) {
      planes_tile<T, kFull, kGamma, kOutput>(tb, level, local, loss);
    } else if (kFull == 8 && level.vector == 4) {
      planes_tile<T, 4, kGamma, kOutput>(tb, level, local, loss);
    } else if (level.vector == 2) {
      planes_tile<T, 2, kGamma, kOutput>(tb, level, local, loss);
    } else {
      planes_tile<T, 1, kGamma, kOutput>(tb, level, local, loss);
    }
  } else {
    const u32 image = local / level.tiles;
    const DenseRun<T> run = dense_run<T, kGamma>(tb, level, image);
    constexpr int kCount = kLayout == DenseLayout::kSingleRows ? 1 : kFull;
    float sum = 0.f;
    rows_tile<T, kCount, kGamma, kOutput, kLayout != DenseLayout::kRows>(tb, run, local - image * level.tiles, sum);
    loss = run_loss(tb, run, sum);
  }
  if (tb.partial == nullptr) return;
  __syncthreads();  // the scratch of the tile before
  const float total = block_sum(loss, scratch);
  if (threadIdx.x == 0) tb.partial[tile] = total;
}

}  // namespace ioubal::cuda
