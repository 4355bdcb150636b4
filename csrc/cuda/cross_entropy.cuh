// Softmax cross entropy over rows of logits (R, K): half a warp a row, a warp where they are long.
#pragma once

#include "cuda/coefficients.cuh"
#include "math/softmax.h"

namespace ioubal::cuda {

constexpr u32 kRowsPerTile = kThreads;  // 32 per warp

struct CrossEntropyTable {
  const void* logits;
  int64_t rows, background;
  u32 columns;
  u32 tiles;
  IntRef labels;
  FloatRef iou, weight;
  ScopeOf scope;
  double eta;
  int64_t slots;
  double* positives;  // of the positives' kernel: (tiles, slots, kPartials)

  Coefficients coefficients;
  void* out;           // gradient, or nullptr
  FloatOut each;       // the rows' losses, or none
  FloatRef grad_rows;  // per row, or none: `scale`
  NumberRef scale, expected;
  bool skip_expected;
  float* partial;  // per tile: its loss; nullptr: not wanted
  LossSum finish;
};

// Logits of a row that a lane keeps, and lanes of a row: half a warp for up to 96 logits, so that a warp waits for the
// sums of two rows at once; a warp for up to 128, and for longer rows, which are read again.
constexpr int kShortRow = 6, kMiddleRow = 4, kLongRow = 0;
template <int kCached>
constexpr u32 kRowLanes = kCached == kShortRow ? kWarp / 2 : kWarp;

// A row's logits: in registers where they fit, so that the row is read once, else read again from the cache.
template <class T, int kCached>
struct Row {
  static constexpr u32 kLanes = kRowLanes<kCached>;
  const T* x;
  u32 columns;
  float cached[kCached > 0 ? kCached : 1];
  float top, logit, at_target, others;  // the largest logit; the target's; exp(x - top) of the target, and of the rest

  IOUBAL_DEVICE static u32 lane() { return threadIdx.x % kLanes; }
  IOUBAL_DEVICE float exponential(float x_k) const { return ex2((x_k - top) * 1.44269504f); }
  IOUBAL_DEVICE float sum() const { return at_target + others; }
  // f(column, logit) for this lane's columns.
  template <class F>
  IOUBAL_DEVICE void each(const F& f) const {
    if constexpr (kCached > 0) {
#pragma unroll
      for (int i = 0; i < kCached; ++i) {
        if (lane() + i * kLanes < columns) f(lane() + i * kLanes, cached[i]);
      }
    } else {
      constexpr u32 kBatch = 8;  // all loaded before the first is used
#pragma unroll 1
      for (u32 k = lane(); k < columns; k += kBatch * kLanes) {
        float loaded[kBatch];
#pragma unroll
        for (u32 j = 0; j < kBatch; ++j) loaded[j] = k + j * kLanes < columns ? load_one(x + k + j * kLanes) : 0.f;
#pragma unroll
        for (u32 j = 0; j < kBatch; ++j) {
          if (k + j * kLanes < columns) f(k + j * kLanes, loaded[j]);
        }
      }
    }
  }
  IOUBAL_DEVICE void load(const T* row, u32 count) {
    x = row;
    columns = count;
#pragma unroll
    for (int i = 0; i < kCached; ++i) {
      cached[i] = lane() + i * kLanes < count ? load_one(x + lane() + i * kLanes) : 0.f;
    }
  }
  IOUBAL_DEVICE void prepare(u32 target) {
    float largest = -INFINITY, total = 0.f, own = 0.f;
    each([&](u32, float x_k) { largest = fmaxf(largest, x_k); });
#pragma unroll
    for (u32 offset = kLanes / 2; offset; offset >>= 1) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
    top = largest;
    each([&](u32 k, float x_k) {
      own = k == target ? x_k : own;
      total += k == target ? 0.f : exponential(x_k);
    });
#pragma unroll
    for (u32 offset = kLanes / 2; offset; offset >>= 1) total += __shfl_xor_sync(~0u, total, offset);
    others = total;
    logit = __shfl_sync(~0u, own, target % kLanes, kLanes);
    at_target = exponential(logit);
  }
  // logsumexp(x) - x[target], without cancellation where the target has nearly all; not finite where a logit is not.
  IOUBAL_DEVICE float loss() const {
    return at_target > 0.5f ? log1pf(others / at_target) : logf(sum()) + (top - logit);
  }
};

// A row with a logit that is not finite, by one lane: loss, and `factor` times the gradient if `out` is there.
template <class T>
IOUBAL_DEVICE float limit_row(const T* x, T* out, int64_t columns, int64_t target, float factor) {
  return softmax_limit<float>([&](int64_t k) { return load_one(x + k); }, columns, target,
                              [&](int64_t k, float slope) {
                                if (out) store_one(out + k, slope != slope ? slope : factor * slope);
                              });
}

// The loss of a loaded row, in every lane of it, and its gradient if `out` is there. By all lanes of the warp.
template <class T, int kCached>
IOUBAL_DEVICE float row_loss(Row<T, kCached>& row, T* out, u32 target, float factor) {
  row.prepare(target);
  const float loss = row.loss();
  const bool finite = loss - loss == 0;
  if (out && finite) {
    const float p_factor = factor / row.sum();
    row.each([&](u32 k, float x_k) {
      store_one(out + k, (k == target ? -row.others : row.exponential(x_k)) * p_factor);  // p - 1 = -others / sum
    });
  }
  if (__all_sync(~0u, finite)) return loss;
  float limit = loss;
  if (!finite && row.lane() == 0) limit = limit_row(row.x, out, row.columns, target, factor);
  return __shfl_sync(~0u, limit, 0, row.kLanes);
}

// f(i, last, row) for the rows `which` of the warp's 32, from x on, in turn, as many at a time as a warp has lanes for;
// the next ones are loaded before f. last: no row is left for these lanes, and i is one that others have.
template <class T, int kCached, class F>
IOUBAL_DEVICE void each_row(u32 which, const T* x, u32 columns, const F& f) {
  constexpr u32 kTogether = kWarp / kRowLanes<kCached>;
  const u32 place = threadIdx.x % kWarp / kRowLanes<kCached>;
  if (!which) return;
  // The row at this lane's place among those left, or the first of them.
  const auto pick = [&](u32 left, bool& none) {
    u32 mine = left;
    for (u32 k = 0; k < place; ++k) mine &= mine - 1;
    none = mine == 0;
    return __ffs(static_cast<int>(none ? left : mine)) - 1;
  };
  bool none;
  u32 i = pick(which, none);
  Row<T, kCached> row;
  row.load(x + static_cast<int64_t>(i) * columns, columns);
#pragma unroll 1
  while (which) {
#pragma unroll
    for (u32 k = 0; k < kTogether; ++k) which &= which - 1;
    bool none_after = true;
    const u32 next = which ? pick(which, none_after) : i;
    Row<T, kCached> after;
    after.load(x + static_cast<int64_t>(next) * columns, columns);
    f(i, none, row);
    row = after;
    i = next;
    none = none_after;
  }
}

// Sums of the positives of a tile: rows of a class other than the background.
template <class T, int kCached>
__global__ void __launch_bounds__(kThreads, 3)
    cross_entropy_positives_kernel(const IOUBAL_GRID_CONSTANT CrossEntropyTable tb) {
  __shared__ double scratch[kThreads / kWarp * kPartials];
  __shared__ float losses[kThreads];
  double* out = tb.positives + static_cast<int64_t>(blockIdx.x) * tb.slots * kPartials;
  clear_terms<kThreads>(tb.slots, out);
  const u32 lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerTile + threadIdx.x, row0 = row - lane;
  PositiveTerms terms;
  int64_t label = -1;
  bool positive = false;
  if (row < tb.rows) {
    label = tb.labels[row];
    const int64_t scope = tb.scope.get(0, 0, row);
    if (label >= 0) terms.part[kPartCount] = 1;
    const bool bad = label >= tb.columns || scope < 0;
    if (bad) terms.part[kPartBad] = 1;
    positive = !bad && label >= 0 && label != tb.background;
    if (positive) terms.slot = scope;
  }
  const T* logits = static_cast<const T*>(tb.logits);
  each_row<T, kCached>(__ballot_sync(~0u, positive), logits + row0 * tb.columns, tb.columns,
                       [&](u32 i, bool none, Row<T, kCached>& each) {
                         const u32 target = __shfl_sync(~0u, static_cast<u32>(label), static_cast<int>(i));
                         const float loss = row_loss<T, kCached>(each, nullptr, target, 1.f);
                         if (!none && each.lane() == 0) losses[threadIdx.x - lane + i] = loss;
                       });
  __syncwarp();
  if (positive) {
    terms.add_classification(tb.weight.get(row, 1.0) * losses[threadIdx.x], iou_power(tb.iou[row], tb.eta));
  }
  // The count is the whole batch's, not a scope's: it goes to the first slot.
  PositiveTerms counts;
  counts.part[kPartCount] = terms.part[kPartCount];
  counts.part[kPartBad] = terms.part[kPartBad];
  terms.part[kPartCount] = terms.part[kPartBad] = 0;
  add_terms<kThreads>(counts, 1, out, scratch);
  add_terms<kThreads>(terms, tb.slots, out, scratch);
}

// Every row: loss and gradient.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
#define IOUBAL_ROWS_BLOCKS 2  // it takes 90 registers there
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define IOUBAL_ROWS_BLOCKS 3
#else
#define IOUBAL_ROWS_BLOCKS 4
#endif
template <class T, int kCached>
__global__ void __launch_bounds__(kThreads, IOUBAL_ROWS_BLOCKS)
    cross_entropy_fill_kernel(const IOUBAL_GRID_CONSTANT CrossEntropyTable tb) {
  __shared__ double scratch[kThreads / kWarp];
  __shared__ float losses[kThreads];
  const bool skip = tb.skip_expected && tb.scale.get() == tb.expected.get();
  const u32 lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const double scale = tb.scale.get();
  for (u32 tile = blockIdx.x; !skip && tile < tb.tiles; tile += gridDim.x) {
    // A lane knows of one row: what it counts, and in the end its loss.
    const int64_t first = static_cast<int64_t>(tile) * kRowsPerTile + warp * kWarp, row = first + lane;
    const bool here = row < tb.rows;
    const int64_t label = here ? tb.labels[row] : -1, scope = here ? tb.scope.get(0, 0, row) : 0;
    const bool bad = label >= tb.columns || scope < 0, counts = label >= 0 && !bad;
    double balance = 1.0, sample = 1.0;
    float factor = 0;
    if (counts) {
      if (label != tb.background) balance = tb.coefficients.cls_norm[scope] * iou_power(tb.iou[row], tb.eta);
      sample = tb.weight.get(row, 1.0);
      factor = static_cast<float>(sample * balance *
                                  (tb.grad_rows.data ? tb.grad_rows[row] : scale * tb.coefficients.negative[0]));
    }
    const T* x = static_cast<const T*>(tb.logits) + first * tb.columns;
    T* const out = tb.out ? static_cast<T*>(tb.out) + first * tb.columns : nullptr;
    const u32 counting = __ballot_sync(~0u, counts);
    for (u32 others = out ? __ballot_sync(~0u, here) & ~counting : 0; others; others &= others - 1) {
      T* const to = out + (__ffs(static_cast<int>(others)) - 1) * tb.columns;
      for (u32 k = lane; k < tb.columns; k += kWarp) store_one(to + k, 0.f);
    }
    each_row<T, kCached>(counting, x, tb.columns, [&](u32 i, bool none, Row<T, kCached>& each) {
      const u32 target = __shfl_sync(~0u, static_cast<u32>(label), static_cast<int>(i));
      const float mine = __shfl_sync(~0u, factor, static_cast<int>(i));
      const float loss = row_loss<T, kCached>(each, out && !none ? out + i * tb.columns : nullptr, target, mine);
      if (!none && each.lane() == 0) losses[threadIdx.x - lane + i] = loss;
    });
    __syncwarp();
    const double loss = counts ? weighted_loss(balance, sample * losses[threadIdx.x]) : bad ? NAN : 0.0;
    if (tb.each.data && here) tb.each.set(row, static_cast<float>(loss));
    double sum = loss;
    if (tb.partial) {
      __syncthreads();
      sum = block_sum(sum * tb.coefficients.negative[0], scratch);
      if (threadIdx.x == 0) tb.partial[tile] = static_cast<float>(sum);
    }
  }
  finish_loss(tb.finish);
}

}  // namespace ioubal::cuda
