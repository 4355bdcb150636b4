// The second kernel of every loss, one block: from the positives' sums to the coefficients of the dense pass, and to
// what is known of the losses by then.
#pragma once

#include "common/sums.h"
#include "cuda/positives.cuh"

namespace ioubal::cuda {

// Tiles of the positives' kernel whose sums share a scope and an image: `count` slots from `first`, `stride` apart.
struct Segment {
  u32 first, count, stride;
  int64_t scope, image;
};

struct CoefficientsTable {
  // Segments: of a detection problem one per (level, image), else one per scope.
  u32 tile0[kMaxLevels], tiles[kMaxLevels];  // tiles per image
  u32 scope_level[kMaxLevels];               // numbers of the levels among all of them
  int levels;
  int64_t images;
  bool by_slot;  // one segment per slot, over all tiles
  u32 all_tiles;
  ScopeOf scope;  // without ids
  int64_t scopes;
  const double* partial;
  double* segment_sums;  // (segments, kPartials)

  double* sums;       // (1 + scopes, 4), see Sums
  bool compute_sums;  // false: `sums` holds those of all ranks
  FocalNumbers focal;
  double eps, w_loc, cls_weight, world_size;
  bool normalize_loc;
  NumberRef cls_divisor, loc_divisor;  // a value of 0: the default

  float *negative, *positive, *location, *cls_norm, *loc_norm;  // see Coefficients
  u32* ticket;            // of a fill kernel that adds up its losses itself: set to 0
  float* cls_loss;        // the positives' part; NaN for bad labels
  float* loc_loss;        // or nullptr
  int64_t* count;         // or nullptr
  float* mean_iou;        // or nullptr
  float* positives_loss;  // kept for the pass over the rows, which adds it to its own sum
  bool rows_count_all;    // that pass counts the positives too: then this is 0, or NaN for bad labels

  IOUBAL_DEVICE int64_t segments() const { return by_slot ? scopes : levels * images; }
  IOUBAL_DEVICE Segment segment(int64_t i) const {
    if (by_slot) return {static_cast<u32>(i), all_tiles, static_cast<u32>(scopes), i, 0};
    const u32 per_level = static_cast<u32>(images), level = static_cast<u32>(i) / per_level;  // 32 bits: a division
    const u32 image = static_cast<u32>(i) - level * per_level;
    return {tile0[level] + image * tiles[level], tiles[level], 1, scope.get(scope_level[level], image, 0), image};
  }
  IOUBAL_DEVICE double divisor(const NumberRef& given, int64_t image, double standard) const {
    return given.tensor.data || given.value > 0 ? given.get(image) : standard;
  }
};

// Which part a number of Sums adds up; -1: none.
IOUBAL_DEVICE int partial_of_sum(int64_t row, int64_t column) {
  if (row == 0)
    return column == Sums::kCount ? kPartCount : column == Sums::kIou ? kPartIou : column == Sums::kBad ? kPartBad : -1;
  return column == Sums::kClsPlain      ? kPartClsPlain
         : column == Sums::kClsWeighted ? kPartClsWeighted
         : column == Sums::kLocPlain    ? kPartLocPlain
                                        : kPartLocWeighted;
}

// One block, and everything waits for it: as many threads as there can be.
constexpr u32 kCoefficientThreads = 1024, kCoefficientWarps = kCoefficientThreads / kWarp;

IOUBAL_DEVICE void coefficients_block(const CoefficientsTable& tb) {
  __shared__ double scratch[2 * kCoefficientWarps], pieces[kCoefficientWarps * kPartials];
  const u32 lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t segments = tb.segments();
  // A warp for every segment, or several where there are few. Lanes read side by side what lies side by side: the
  // numbers of three tiles at a time; what the last five read is left out.
  const u32 share = segments > 0 && segments < kCoefficientWarps ? kCoefficientWarps / static_cast<u32>(segments) : 1;
  constexpr u32 kTogether = kWarp / kPartials;
  const u32 row = lane / kPartials, number = lane - row * kPartials;
  for (u32 i = warp; i < segments * share; i += kCoefficientWarps) {
    const u32 s = i / share;
    const Segment segment = tb.segment(s);
    const auto load = [&](u32 tile) {
      return tb.partial[(static_cast<int64_t>(tile) * segment.stride + segment.first) * kPartials + number];
    };
    const double sum = strided_sum<double>((i - s * share) * kTogether + row, segment.count, share * kTogether, load);
    double all = sum;
#pragma unroll
    for (u32 k = 1; k < kTogether; ++k) all += __shfl_down_sync(~0u, sum, k * kPartials);
    double* const to = share > 1 ? pieces + i * kPartials : tb.segment_sums + static_cast<int64_t>(s) * kPartials;
    if (lane < kPartials) to[lane] = all;
  }
  __syncthreads();
  if (share > 1) {
    for (u32 i = threadIdx.x; i < segments * kPartials; i += kCoefficientThreads) {
      const u32 s = i / kPartials, q = i - s * kPartials;
      double sum = 0;
      for (u32 k = 0; k < share; ++k) sum += pieces[(s * share + k) * kPartials + q];
      tb.segment_sums[i] = sum;
    }
    __syncthreads();
  }
  const Sums sums = {tb.sums};
  if (tb.compute_sums) {
    // A warp per number: row 0, then four of each scope.
    for (int64_t i = warp; i < 4 * (1 + tb.scopes); i += kCoefficientWarps) {
      const int64_t row = i / 4;
      const int q = partial_of_sum(row, i % 4);
      double sum = 0;
      if (q >= 0 && row > 0 && tb.by_slot) {  // a scope is a segment
        sum = lane == 0 ? tb.segment_sums[(row - 1) * kPartials + q] : 0.0;
      } else if (q >= 0) {
        for (int64_t s = lane; s < segments; s += kWarp) {
          if (row == 0 || tb.segment(s).scope == row - 1) sum += tb.segment_sums[s * kPartials + q];
        }
      }
      sum = warp_sum(sum);
      if (lane == 0) sums.data[i] = sum;
    }
    __syncthreads();
  }

  const double standard = sums.default_divisor(tb.world_size);
  for (int64_t i = threadIdx.x; i < tb.images; i += kCoefficientThreads) {
    const double cls = tb.cls_weight / tb.divisor(tb.cls_divisor, i, standard);
    tb.negative[i] = static_cast<float>(tb.focal.negative_factor() * cls);
    tb.positive[i] = static_cast<float>(tb.focal.positive_factor() * cls);
    tb.location[i] = static_cast<float>(tb.w_loc / tb.divisor(tb.loc_divisor, i, standard));
  }
  for (int64_t i = threadIdx.x; i < tb.scopes; i += kCoefficientThreads) {
    tb.cls_norm[i] = static_cast<float>(sums.cls_normalizer(i, tb.eps));
    tb.loc_norm[i] = static_cast<float>(tb.normalize_loc ? sums.loc_normalizer(i, tb.eps) : 1.0);
  }
  double cls_loss = 0, loc_loss = 0;
  for (int64_t i = threadIdx.x; i < segments; i += kCoefficientThreads) {
    const Segment segment = tb.segment(i);
    const double* part = tb.segment_sums + i * kPartials;
    const double cls = tb.cls_weight / tb.divisor(tb.cls_divisor, segment.image, standard);
    cls_loss += weighted_loss(cls * sums.cls_normalizer(segment.scope, tb.eps), part[kPartClsLoss]);
    const double loc = tb.w_loc / tb.divisor(tb.loc_divisor, segment.image, standard);
    const double norm = tb.normalize_loc ? sums.loc_normalizer(segment.scope, tb.eps) : 1.0;
    loc_loss += weighted_loss(loc * norm, part[kPartLocLoss]);
  }
  cls_loss = block_sum<kCoefficientThreads>(cls_loss, scratch);
  loc_loss = block_sum<kCoefficientThreads>(loc_loss, scratch + kCoefficientWarps);
  if (threadIdx.x != 0) return;
  const bool bad = sums.shared(Sums::kBad) != 0;
  const double count = sums.shared(Sums::kCount);
  *tb.ticket = 0;
  *tb.positives_loss = bad ? NAN : tb.rows_count_all ? 0.f : static_cast<float>(cls_loss);
  if (tb.cls_loss) *tb.cls_loss = *tb.positives_loss;
  if (tb.loc_loss) *tb.loc_loss = bad ? NAN : static_cast<float>(loc_loss);
  if (tb.count) *tb.count = static_cast<int64_t>(count);
  if (tb.mean_iou) *tb.mean_iou = count > 0 ? static_cast<float>(sums.shared(Sums::kIou) / count) : 0.f;
}

// Memory that is to be 0, in whole pieces of 16 bytes but for the ends: the deltas' gradient, before the positives' is
// put there.
constexpr u32 kZeroVectors = 8;  // of a thread
struct ZerosTable {
  char* out[kMaxLevels];      // multiples of 16
  int64_t bytes[kMaxLevels];  // even
  u32 tile0[kMaxLevels];
  int count;
  u32 tiles;
};
IOUBAL_DEVICE void zeros_tile(const ZerosTable& tb, u32 tile) {
  int i = 0;
  while (i + 1 < tb.count && tile >= tb.tile0[i + 1]) ++i;
  const u32 zero[4] = {0, 0, 0, 0};
  constexpr int64_t kStep = 16 * kCoefficientThreads;
  const int64_t bytes = tb.bytes[i], first = (tile - tb.tile0[i]) * (kZeroVectors * kStep) + 16 * threadIdx.x;
#pragma unroll
  for (u32 k = 0; k < kZeroVectors; ++k) {
    const int64_t at = first + k * kStep;
    if (at + 16 <= bytes) {
      store_bytes<16>(tb.out[i] + at, zero);
    } else {
      for (int64_t rest = at; rest < bytes; rest += 2) store_bytes<2>(tb.out[i] + rest, zero);
    }
  }
}

// Ends a pass that left a loss per tile: the block that finishes last adds them up, in their order; or, where there
// are so many blocks that their tickets take time, a block of a launch after them.
struct LossSum {
  const float* partial;
  u32 tiles;
  u32* ticket;
  const float* positives_loss;
  float* loss;  // nullptr: not wanted
};

template <u32 kBlock, u32 kBatch = 8>
IOUBAL_DEVICE void add_losses(const LossSum& tb, double* scratch) {
  const auto load = [&](u32 tile) { return load_shared_by_blocks(tb.partial + tile); };
  const double sum = block_sum<kBlock>(strided_sum<double, kBatch>(threadIdx.x, tb.tiles, kBlock, load), scratch);
  if (threadIdx.x == 0) *tb.loss = static_cast<float>(sum + *tb.positives_loss);
}

// At the end of every block of such a pass.
template <u32 kBlock = kThreads>
IOUBAL_DEVICE void finish_loss(const LossSum& tb) {
  __shared__ double scratch[kBlock / kWarp];
  __shared__ bool last;
  if (tb.loss == nullptr) return;
  __syncthreads();
  if (threadIdx.x == 0) last = count_up(tb.ticket) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  add_losses<kBlock>(tb, scratch);
}

}  // namespace ioubal::cuda
