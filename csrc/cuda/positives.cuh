// The first kernel of every loss: finds the positives and adds up what Eq. 4 and 7 need of them, in double.
// A tile is 4,096 anchors. Its positives are first collected, so that all threads work on them side by side: they
// cluster, and in the order of the anchors a few lanes would work through them one after another. A positive is a long
// chain of dependent reads and double arithmetic, as long for one lane of a warp as for all: tiles large enough to fill
// some, and few enough to be all there at once.
#pragma once

#include "cuda/tables.cuh"
#include "math/balance.h"

namespace ioubal::cuda {

constexpr u32 kPositiveThreads = 128, kPositiveWarps = kPositiveThreads / kWarp;
constexpr u32 kUnitsPerTile = kPositiveThreads, kTileAnchors = kUnitsPerTile * kWarp;

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
  int64_t slots;  // sums of a tile: 1, or the number of scopes where ids give them
  u32* special;   // one bit per anchor: not plain background; nullptr: not wanted
  u32* ignored;   // one bit per anchor: ignored
  u32* clear;     // so many words are to be 0 after the launch
  u32 clear_words;
  double* partial;  // (tiles, slots, kPartials)
};

// An anchor of a tile.
struct Place {
  int level;
  int64_t image;
  u32 a, position;
  int64_t anchor;  // in the whole batch
};

// A level's tiles: words of 32 positions, for several of the anchors at each ("groups", planes) a unit each. With up to
// 128 groups a tile's anchors follow each other in memory.
struct TileShape {
  u32 groups, words;  // of a tile
  u32 across;         // tiles beside each other: of the same words, for further groups
  IOUBAL_HD explicit TileShape(u32 level_groups)
      : groups(level_groups < kUnitsPerTile ? level_groups : kUnitsPerTile),
        words(kUnitsPerTile / groups),
        across((level_groups + groups - 1) / groups) {}
  IOUBAL_HD u32 tiles(u32 level_words) const { return (level_words + words - 1) / words * across; }
};

// One tile of a level and image.
struct PositivesTile {
  const Level& level;
  int l;
  u32 image, level_groups;
  u32 group0, groups, word0, words;
  u32 positions;         // of its words; the level's last word may be short
  int64_t first_anchor;  // of its words, in the whole batch

  IOUBAL_DEVICE PositivesTile(const PositivesTable& tb, int l, u32 tile) : level(tb.level[l]), l(l) {
    level_groups = level.groups();
    const TileShape shape(level_groups);
    const u32 local = tile - level.tile0;
    image = local / level.tiles;
    const u32 of_image = local - image * level.tiles, row = of_image / shape.across;
    group0 = (of_image - row * shape.across) * shape.groups;
    word0 = row * shape.words;
    groups = level_groups - group0 < shape.groups ? level_groups - group0 : shape.groups;
    words = level.words - word0 < shape.words ? level.words - word0 : shape.words;
    const u32 all = level.positions() - word0 * kWarp;
    positions = all < words * kWarp ? all : words * kWarp;
    first_anchor = image * tb.anchors_per_image + level.first_anchor + int64_t(word0) * kWarp * level_groups;
  }

  // Its anchors in the order of their groups, then of their positions.
  IOUBAL_DEVICE u32 anchors() const { return positions * groups; }
  IOUBAL_DEVICE int64_t anchor(u32 position, u32 group) const {
    return first_anchor + (int64_t(position) * level_groups + group0 + group);
  }
  // A unit's word of `special`.
  IOUBAL_DEVICE u32 word(u32 unit) const {
    return level.word0 + (image * level_groups + group0 + unit % groups) * level.words + word0 + unit / groups;
  }
  // The anchor of a bit of a unit.
  IOUBAL_DEVICE Place place(u32 unit, u32 bit) const {
    const u32 position = unit / groups * kWarp + bit, group = unit % groups;
    return {l, image, group0 + group, word0 * kWarp + position, anchor(position, group)};
  }
};

// What there is in a tile: a bit for every anchor that is not plain background, and for every one to be computed.
struct TileBits {
  u32 special[kUnitsPerTile], collected[kUnitsPerTile];
};

// Looks at anchor i of a tile, whose value it is.
template <class Problem>
IOUBAL_DEVICE void look_at(const PositivesTile& tile, const Problem& problem, u32 i, int64_t value, TileBits& bits) {
  if (problem.plain(value)) return;
  const u32 position = i / tile.groups, group = i - position * tile.groups;
  const bool collect = problem.counts(tile.anchor(position, group), value);
  if (!collect && value == kBackground) return;
  const u32 unit = position / kWarp * tile.groups + group, bit = 1u << position % kWarp;
  atomicOr(&bits.special[unit], bit);
  if (collect) atomicOr(&bits.collected[unit], bit);
}

// Looks at all anchors of a tile, four in a row a thread, 16 of them loaded before the first is used. Value: the type
// of the matched indices or labels.
constexpr u32 kRun = 4, kRuns = 4, kStretch = kRun * kRuns * kPositiveThreads;
template <class Value, class Problem>
IOUBAL_DEVICE void look_at_anchors(const PositivesTile& tile, const Problem& problem, TileBits& bits) {
  const Value* const values = static_cast<const Value*>(problem.values.data);
  const u32 count = tile.anchors();
  if (tile.groups < tile.level_groups) {  // some of many groups: not one behind the other
#pragma unroll 1
    for (u32 i = threadIdx.x; i < count; i += kPositiveThreads) {
      const u32 position = i / tile.groups;
      look_at(tile, problem, i, values[tile.anchor(position, i - position * tile.groups)], bits);
    }
    return;
  }
  constexpr u32 kStep = kRun * kPositiveThreads, kWords = kRun * sizeof(Value) / 4;
#pragma unroll 1
  for (u32 first = kRun * threadIdx.x; first < count; first += kStretch) {
    const Value* const run = values + tile.first_anchor + first;
    const bool aligned = reinterpret_cast<uintptr_t>(run) % 16 == 0;
    u32 loaded[kRuns][kWords];
#pragma unroll
    for (u32 k = 0; k < kRuns; ++k) {
#pragma unroll
      for (u32 w = 0; w < kWords; ++w) loaded[k][w] = ~0u;  // background
      if (aligned && first + k * kStep + kRun <= count) {
#pragma unroll
        for (u32 w = 0; w < kWords; w += 4) load_bytes<16>(run + k * kStep + w * 4 / sizeof(Value), loaded[k] + w);
      } else {
#pragma unroll
        for (u32 j = 0; j < kRun; ++j) {
          if (first + k * kStep + j < count) {
            load_bytes<sizeof(Value)>(run + k * kStep + j, loaded[k] + j * sizeof(Value) / 4);
          }
        }
      }
    }
    u32 rest = 0;  // a bit each of those that are not plain: these are read again
#pragma unroll
    for (u32 k = 0; k < kRuns; ++k) {
#pragma unroll
      for (u32 w = 0; w < kWords; ++w) rest |= (loaded[k][w] != ~0u ? 1u : 0u) << (k * kRun + w * 4 / sizeof(Value));
    }
    if (!problem.plain(kBackground)) rest = (1u << kRuns * kRun) - 1;
#pragma unroll 1
    for (; rest; rest &= rest - 1) {
      const u32 at = __ffs(static_cast<int>(rest)) - 1, i = first + at / kRun * kStep + at % kRun;
      if (i < count) look_at(tile, problem, i, values[tile.first_anchor + i], bits);
    }
  }
}

// Adds the threads' terms to a tile's sums `out` (slots, kPartials): to the first slot, then to those in turn that any
// thread has. `scratch`: kPartials numbers a warp. By all threads of the block.
template <u32 kBlock>
IOUBAL_DEVICE void add_terms(const PositiveTerms& terms, int64_t slots, double* out, double* scratch) {
  constexpr u32 kWarps = kBlock / kWarp;
  __shared__ u32 next;
  const u32 lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, end = static_cast<u32>(slots);
  const u32 own = terms.slot < 0 ? 0 : static_cast<u32>(terms.slot);
#pragma unroll 1
  for (u32 slot = 0; slot < end;) {
    const bool mine = own == slot;
#pragma unroll
    for (int q = 0; q < kPartials; ++q) {
      const double sum = warp_sum(mine ? terms.part[q] : 0.0);
      if (lane == 0) scratch[warp * kPartials + q] = sum;
    }
    if (threadIdx.x == 0) next = end;
    __syncthreads();
    if (threadIdx.x < kPartials) {
      double* const to = out + static_cast<int64_t>(slot) * kPartials + threadIdx.x;
      double sum = *to;
#pragma unroll
      for (u32 i = 0; i < kWarps; ++i) sum += scratch[i * kPartials + threadIdx.x];
      *to = sum;
    }
    if (own > slot) atomicMin(&next, own);
    __syncthreads();
    if (end == 1) return;
    slot = next;
    __syncthreads();
  }
}

template <u32 kBlock>
IOUBAL_DEVICE void clear_terms(int64_t slots, double* out) {
  for (int64_t i = threadIdx.x; i < slots * kPartials; i += kBlock) out[i] = 0;
  __syncthreads();
}

// Problem: `values`, the matched indices or labels; `bool plain(value)`, whether an anchor of that value is background
// that nothing more is to be asked of; `bool counts(anchor, value)`, whether to collect one;
// `PositiveTerms terms(const PositivesTable&, const Place&, int64_t value)`.
template <class Problem>
IOUBAL_DEVICE void positives_tile(const PositivesTable& tb, const Problem& problem, u32 number) {
  __shared__ TileBits bits;
  __shared__ uint16_t list[kTileAnchors];
  __shared__ double scratch[kPositiveWarps * kPartials];
  __shared__ u32 counts[kPositiveWarps];
  const u32 lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int l = 0;
  while (l + 1 < tb.levels && number >= tb.level[l + 1].tile0) ++l;
  const PositivesTile tile(tb, l, number);
  for (u32 i = threadIdx.x; i < kUnitsPerTile; i += kPositiveThreads) bits.special[i] = bits.collected[i] = 0;
  for (u32 i = number * kPositiveThreads + threadIdx.x; i < tb.clear_words; i += tb.tiles * kPositiveThreads) {
    tb.clear[i] = 0;
  }
  double* out = tb.partial + static_cast<int64_t>(number) * tb.slots * kPartials;
  clear_terms<kPositiveThreads>(tb.slots, out);  // its barrier completes the bits, too
  if (problem.values.wide) {
    look_at_anchors<int64_t>(tile, problem, bits);
  } else {
    look_at_anchors<int32_t>(tile, problem, bits);
  }
  __syncthreads();
  if (tb.special && threadIdx.x < tile.words * tile.groups) {
    const u32 word = tile.word(threadIdx.x), special = bits.special[threadIdx.x];
    tb.special[word] = special;
    tb.ignored[word] = special & ~bits.collected[threadIdx.x];
  }

  // Where the list has a unit's first anchor: a unit a thread.
  const u32 own = bits.collected[threadIdx.x];
  u32 at = warp_scan(__popc(own));
  if (lane == kWarp - 1) counts[warp] = at;
  __syncthreads();
  u32 count = 0;
#pragma unroll
  for (u32 i = 0; i < kPositiveWarps; ++i) {
    at += i < warp ? counts[i] : 0;
    count += counts[i];
  }
  if (count == 0) return;
  at -= __popc(own);
#pragma unroll 1
  for (u32 left = own; left; left &= left - 1) {
    list[at++] = static_cast<uint16_t>(threadIdx.x * kWarp + __ffs(static_cast<int>(left)) - 1);
  }
  __syncthreads();
  for (u32 first = 0; first < count; first += kPositiveThreads) {
    const u32 item = first + threadIdx.x;
    PositiveTerms terms;
    if (item < count) {
      const Place place = tile.place(list[item] / kWarp, list[item] % kWarp);
      terms = problem.terms(tb, place, problem.values[place.anchor]);
    }
    add_terms<kPositiveThreads>(terms, tb.slots, out, scratch);
  }
}

}  // namespace ioubal::cuda
