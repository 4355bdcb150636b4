// The first kernel of every loss: finds the positives and adds up what Eq. 4 and 7 need of them, in double.
// A tile is 1,024 anchors. Its positives are first collected, so that all threads work on them side by side: they
// cluster, and in the order of the anchors a few lanes would work through them one after another. A positive is a long
// chain of dependent reads and double arithmetic, and most tiles have few or none: small blocks, so that many tiles
// wait side by side.
#pragma once

#include "cuda/tables.cuh"
#include "math/balance.h"

namespace ioubal::cuda {

constexpr u32 kPositiveThreads = 64, kPositiveWarps = kPositiveThreads / kWarp;
constexpr u32 kUnitsPerTile = 32, kUnitsPerWarp = kUnitsPerTile / kPositiveWarps, kUnitsInFlight = 8;
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

// A unit's place; its neighbour's without another division.
struct UnitPlace {
  u32 a, word;
  IOUBAL_DEVICE UnitPlace(u32 unit, u32 groups) : a(unit % groups), word(unit / groups) {}
  IOUBAL_DEVICE void next(u32 groups) {
    const bool wrap = ++a == groups;
    a = wrap ? 0 : a;
    word += wrap ? 1 : 0;
  }
};

IOUBAL_DEVICE Place place_of(const PositivesTable& tb, int l, u32 image, const UnitPlace& unit, u32 lane) {
  const Level& level = tb.level[l];
  const u32 position = unit.word * kWarp + lane;
  const int64_t first = image * tb.anchors_per_image + level.first_anchor;
  return {l, image, unit.a, position, first + (static_cast<int64_t>(position) * level.groups() + unit.a)};
}

// Adds the threads' terms to a tile's sums `out` (slots, kPartials). `scratch`: kPartials numbers a warp. By all
// threads of the block.
template <u32 kBlock>
IOUBAL_DEVICE void add_terms(const PositiveTerms& terms, int64_t slots, double* out, double* scratch) {
  constexpr u32 kWarps = kBlock / kWarp;
  const u32 lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t slot = 0; slot < slots; ++slot) {
    const bool mine = terms.slot == slot || (terms.slot < 0 && slot == 0);
#pragma unroll
    for (int q = 0; q < kPartials; ++q) {
      const double sum = warp_sum(mine ? terms.part[q] : 0.0);
      if (lane == 0) scratch[warp * kPartials + q] = sum;
    }
    __syncthreads();
    if (threadIdx.x < kPartials) {
      double sum = out[slot * kPartials + threadIdx.x];
#pragma unroll
      for (u32 i = 0; i < kWarps; ++i) sum += scratch[i * kPartials + threadIdx.x];
      out[slot * kPartials + threadIdx.x] = sum;
    }
    __syncthreads();
  }
}

template <u32 kBlock>
IOUBAL_DEVICE void clear_terms(int64_t slots, double* out) {
  for (int64_t i = threadIdx.x; i < slots * kPartials; i += kBlock) out[i] = 0;
  __syncthreads();
}

// Problem: `int64_t value(anchor)`, the matched index or label; `bool counts(anchor, value)`, whether to collect it;
// `PositiveTerms terms(const PositivesTable&, const Place&, int64_t value)`.
template <class Problem>
IOUBAL_DEVICE void positives_tile(const PositivesTable& tb, const Problem& problem, u32 tile) {
  __shared__ uint16_t list[kTileAnchors];
  __shared__ u32 counts[kPositiveWarps];
  __shared__ double scratch[kPositiveWarps * kPartials];
  const u32 lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int l = 0;
  while (l + 1 < tb.levels && tile >= tb.level[l + 1].tile0) ++l;
  const Level& level = tb.level[l];
  const u32 local = tile - level.tile0, image = local / level.tiles;
  const u32 first_unit = (local - image * level.tiles) * kUnitsPerTile;
  const u32 groups = level.groups(), units = level.words * groups, positions = level.positions();

  u32 collected[kUnitsPerWarp], total = 0;  // bits of this warp's units
  UnitPlace unit(first_unit + warp * kUnitsPerWarp, groups);
#pragma unroll
  for (u32 i0 = 0; i0 < kUnitsPerWarp; i0 += kUnitsInFlight) {
    const UnitPlace first = unit;
    int64_t values[kUnitsInFlight];
#pragma unroll
    for (u32 i = 0; i < kUnitsInFlight; ++i, unit.next(groups)) {
      const Place place = place_of(tb, l, image, unit, lane);
      values[i] = place.position < positions ? problem.value(place.anchor) : kBackground;
    }
    unit = first;
#pragma unroll
    for (u32 i = 0; i < kUnitsInFlight; ++i, unit.next(groups)) {
      const Place place = place_of(tb, l, image, unit, lane);
      const bool collect = place.position < positions && problem.counts(place.anchor, values[i]);
      const u32 special = __ballot_sync(~0u, collect || values[i] != kBackground);
      collected[i0 + i] = __ballot_sync(~0u, collect);
      total += __popc(collected[i0 + i]);
      if (tb.special && lane == 0 && first_unit + warp * kUnitsPerWarp + i0 + i < units) {
        tb.special[level.word0 + (image * groups + unit.a) * level.words + unit.word] = special;
      }
    }
  }
  if (lane == 0) counts[warp] = total;
  __syncthreads();
  u32 at = 0, count = 0;
#pragma unroll
  for (u32 i = 0; i < kPositiveWarps; ++i) {
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

  double* out = tb.partial + static_cast<int64_t>(tile) * tb.slots * kPartials;
  clear_terms<kPositiveThreads>(tb.slots, out);  // its barrier completes the list, too
  for (u32 first = 0; first < count; first += kPositiveThreads) {
    const u32 item = first + threadIdx.x;
    PositiveTerms terms;
    if (item < count) {
      const Place place =
          place_of(tb, l, image, UnitPlace(first_unit + list[item] / kWarp, groups), list[item] % kWarp);
      terms = problem.terms(tb, place, problem.value(place.anchor));
    }
    add_terms<kPositiveThreads>(terms, tb.slots, out, scratch);
  }
}

}  // namespace ioubal::cuda
