// The first kernel of every loss: finds the positives and adds up what Eq. 4 and 7 need of them, in double.
// A tile is 1,024 anchors. Its positives are first collected, so that all threads work on them side by side: they
// cluster, and in the order of the anchors a few lanes would work through them one after another.
#pragma once

#include "cuda/tables.cuh"
#include "math/balance.h"

namespace ioubal::cuda {

constexpr u32 kUnitsPerTile = 32, kUnitsPerWarp = kUnitsPerTile / (kThreads / kWarp);
constexpr u32 kTileAnchors = kUnitsPerTile * kWarp;

// One positive's part of the sums, or a tile's.
enum Partial : int {
  kPartCount,
  kPartIou,
  kPartBad,
  kPartClsPlain,
  kPartClsWeighted,
  kPartClsLoss,  // weighted as well, but infinite losses enter as they are
  kPartLocPlain,
  kPartLocWeighted,
  kPartLocLoss,
  kPartials
};

struct PositiveTerms {
  int64_t slot = -1;  // of the tile's sums; -1: the first
  double part[kPartials] = {};

  IOUBAL_DEVICE void add_classification(double loss, double balance) {
    const BalanceShare<double> share = balance_share(loss, balance);
    part[kPartClsPlain] = share.plain;
    part[kPartClsWeighted] = share.weighted;
    part[kPartClsLoss] = weighted_loss(balance, loss);
  }
  IOUBAL_DEVICE void add_localization(double loss, double balance) {
    const BalanceShare<double> share = balance_share(loss, balance);
    part[kPartLocPlain] = share.plain;
    part[kPartLocWeighted] = share.weighted;
    part[kPartLocLoss] = weighted_loss(balance, loss);
  }
};

struct PositivesTable {
  Level level[kMaxLevels];
  int levels;
  u32 tiles;  // of all levels
  int64_t anchors_per_image;
  int64_t slots;    // sums of a tile: 1, or the number of scopes where ids give them
  u32* special;     // one bit per anchor: not plain background; nullptr: not wanted
  double* partial;  // (tiles, slots, kPartials)
};

// An anchor of a tile.
struct Place {
  int level;
  int64_t image;
  u32 a, position;
  int64_t anchor;  // in the whole batch
};

IOUBAL_DEVICE Place place_of(const PositivesTable& tb, int l, u32 image, u32 first_unit, u32 entry) {
  const Level& level = tb.level[l];
  const u32 groups = level.groups(), unit = first_unit + entry / kWarp;
  Place place;
  place.level = l;
  place.image = image;
  place.a = unit % groups;
  place.position = unit / groups * kWarp + entry % kWarp;
  place.anchor =
      image * tb.anchors_per_image + level.first_anchor + static_cast<int64_t>(place.position) * groups + place.a;
  return place;
}

// Adds the threads' terms to a tile's sums `out` (slots, kPartials). By all threads of the block, after a barrier.
IOUBAL_DEVICE void add_terms(const PositiveTerms& terms, int64_t slots, double* out, double* scratch) {
  for (int64_t slot = 0; slot < slots; ++slot) {
    const bool mine = terms.slot == slot || (terms.slot < 0 && slot == 0);
#pragma unroll
    for (int q = 0; q < kPartials; ++q) {
      const double sum = block_sum(mine ? terms.part[q] : 0.0, scratch);
      if (threadIdx.x == 0) out[slot * kPartials + q] += sum;
      __syncthreads();
    }
  }
}

IOUBAL_DEVICE void clear_terms(int64_t slots, double* out) {
  for (int64_t i = threadIdx.x; i < slots * kPartials; i += kThreads) out[i] = 0;
  __syncthreads();
}

// Problem: `int64_t value(anchor)`, the matched index or label; `bool counts(anchor, value)`, whether to collect it;
// `PositiveTerms terms(const PositivesTable&, const Place&, int64_t value)`.
template <class Problem>
IOUBAL_DEVICE void positives_tile(const PositivesTable& tb, const Problem& problem, u32 tile) {
  __shared__ uint16_t list[kTileAnchors];
  __shared__ u32 counts[kThreads / kWarp];
  __shared__ double scratch[kThreads / kWarp];
  const u32 lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int l = 0;
  while (l + 1 < tb.levels && tile >= tb.level[l + 1].tile0) ++l;
  const Level& level = tb.level[l];
  const u32 local = tile - level.tile0, image = local / level.tiles;
  const u32 first_unit = (local - image * level.tiles) * kUnitsPerTile;
  const u32 groups = level.groups(), units = level.words * groups, positions = level.positions();

  u32 collected[kUnitsPerWarp], total = 0;  // bits of this warp's units
#pragma unroll
  for (u32 i = 0; i < kUnitsPerWarp; ++i) {
    const u32 entry = (warp * kUnitsPerWarp + i) * kWarp + lane, unit = first_unit + entry / kWarp;
    const Place place = place_of(tb, l, image, first_unit, entry);
    const bool here = unit < units && place.position < positions;
    const int64_t value = here ? problem.value(place.anchor) : kBackground;
    const bool collect = here && problem.counts(place.anchor, value);
    const u32 special = __ballot_sync(~0u, collect || value != kBackground);
    collected[i] = __ballot_sync(~0u, collect);
    total += __popc(collected[i]);
    if (tb.special && lane == 0 && unit < units) {
      tb.special[level.word0 + (image * groups + place.a) * level.words + place.position / kWarp] = special;
    }
  }
  if (lane == 0) counts[warp] = total;
  __syncthreads();
  u32 at = 0, count = 0;
  for (u32 i = 0; i < kThreads / kWarp; ++i) {
    at += i < warp ? counts[i] : 0;
    count += counts[i];
  }
#pragma unroll
  for (u32 i = 0; i < kUnitsPerWarp; ++i) {
    if (collected[i] >> lane & 1) {
      list[at + __popc(collected[i] & ((1u << lane) - 1))] =
          static_cast<uint16_t>((warp * kUnitsPerWarp + i) * kWarp + lane);
    }
    at += __popc(collected[i]);
  }
  __syncthreads();

  double* out = tb.partial + static_cast<int64_t>(tile) * tb.slots * kPartials;
  clear_terms(tb.slots, out);
  for (u32 first = 0; first < count; first += kThreads) {
    const u32 item = first + threadIdx.x;
    PositiveTerms terms;
    if (item < count) {
      const Place place = place_of(tb, l, image, first_unit, list[item]);
      terms = problem.terms(tb, place, problem.value(place.anchor));
    }
    add_terms(terms, tb.slots, out, scratch);
  }
}

}  // namespace ioubal::cuda
