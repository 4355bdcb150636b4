// The dense pass of the sigmoid focal loss: one read of the logits, one write of their gradient, sums in a fixed order.
//
// The logits of a level and image, rows of K (flat, channels_last) or planes of H * W (NCHW), are one stream of aligned
// vectors. All are negatives to the fast loop: ignored entries are masked in place, as memory written in pieces costs
// more than is saved by leaving something out. Whole strips of 32 vectors with a positive entry are left to tiles of
// their own, whose warps ask the labels; to the end of the tile, vector by vector, what is rare: a loss that is not
// finite, a warp's share that lies partly outside, rows with weights, unusual scales, an output that lies differently.
#pragma once

#include "cuda/focal_exact.cuh"

namespace ioubal::cuda {

// The ignored entries of the vector at entry e, as bits.
template <u32 kCount>
IOUBAL_DEVICE u32 ignored_of_row(const DenseTable& tb, const u32* ignored, u32 e) {
  const u32 classes = tb.classes.divisor;
  u32 row = tb.classes.div(e), column = e - row * classes, off = 0;
#pragma unroll 1
  for (u32 j = 0; j < kCount; ++row, column = 0) {
    const u32 width = classes - column < kCount - j ? classes - column : kCount - j;
    if (ignored[row / kWarp] >> row % kWarp & 1) off |= ((1u << width) - 1) << j;
    j += width;
  }
  return off;
}
template <u32 kCount>
IOUBAL_DEVICE u32 ignored_of_plane(const DenseTable& tb, const DenseLevel& level, const u32* ignored, u32 e) {
  u32 plane = level.plane.div(e), location = e - plane * level.locations, off = 0;
#pragma unroll 1
  for (u32 j = 0; j < kCount; ++plane, location = 0) {
    const u32 width = level.locations - location < kCount - j ? level.locations - location : kCount - j;
    // The word after a plane's last is the next plane's first, or one more at the end of all.
    const u32* const word = ignored + tb.classes.div(plane) * level.words + location / kWarp;
    off |= (__funnelshift_r(word[0], word[1], location % kWarp) & ((1u << width) - 1)) << j;
    j += width;
  }
  return off;
}

// Those of a thread's vectors, kCount bits of each; e: the first one's entry, the others kStep entries apart.
template <u32 kCount, u32 kStep>
IOUBAL_DEVICE u32 ignored_of_planes(const DenseTable& tb, const DenseLevel& level, const u32* ignored, u32 e) {
  static_assert(kStep % kWarp == 0 && kStripsPerWarp * kCount <= 32);
  const u32 plane = level.plane.div(e), location = e - plane * level.locations;
  u32 off = 0;
  if (location + (kStripsPerWarp - 1) * kStep + kCount <= level.locations) {  // all in one plane
    const u32* const word = ignored + tb.classes.div(plane) * level.words + location / kWarp;
#pragma unroll
    for (u32 u = 0; u < kStripsPerWarp; ++u) {
      const u32* const at = word + u * kStep / kWarp;
      off |= (__funnelshift_r(at[0], at[1], location % kWarp) & ((1u << kCount) - 1)) << u * kCount;
    }
    return off;
  }
#pragma unroll 1
  for (u32 u = 0; u < kStripsPerWarp; ++u) {
    off |= ignored_of_plane<kCount>(tb, level, ignored, e + u * kStep) << u * kCount;
  }
  return off;
}

// Whether any element of a vector has no sign bit.
template <class T>
IOUBAL_DEVICE bool any_above(const Vec<T, kVector<T>>& v) {
  constexpr u32 kSigns = sizeof(T) == 2 ? 0x80008000u : 0x80000000u;
  return (~(v.words[0] & v.words[1] & v.words[2] & v.words[3]) & kSigns) != 0;
}

// What a run's negatives take as their gradient's factor, and what is left to multiply them by. In 16 bits arithmetic
// binds, and the factor is folded in; in float32 memory does, and the gradient is a few 1e-7 closer.
template <class T, int kGamma, Output kOutput>
struct EntryFactor {
  static constexpr Scaling kScaling =
      kGamma == 2 && kOutput == kGradient && sizeof(T) == 2 ? Scaling::kFolded : Scaling::kTimes;
  float s, rest = 1.f;

  IOUBAL_DEVICE explicit EntryFactor(float scale) : s(scale) {
    if constexpr (kScaling == Scaling::kFolded) {
      if (has_cube_root(scale)) {
        s = rcbrt(scale);
      } else {
        s = 1.f;
        rest = scale;
      }
    }
  }
  // Of the sum over entries.
  IOUBAL_DEVICE float doubled(float sum) const { return kScaling == Scaling::kFolded ? sum * s * s : sum; }
};

// The vectors of a strip as negatives, but for the entries `off`; `times`: what is left to multiply gradients by. By
// whole warps. Where a loss is not finite nothing is stored, but its bit in `later`; a result would be tested once
// more.
template <class T, int kGamma, Output kOutput>
IOUBAL_DEVICE void strip_vector(const DenseTable& tb, const EntryFactor<T, kGamma, kOutput>& factor, float times,
                                u32 off, Vec<T, kVector<T>>& in, T* out, float& sum, u32& later, u32 bit) {
  constexpr Scaling kScaling = EntryFactor<T, kGamma, kOutput>::kScaling;
  const bool above = __any_sync(~0u, any_above<T>(in)) != 0;  // one way for all lanes
  float v[kVector<T>];
  in.unpack(v);
  switch_off(v, off);
  if (!above) {
    negative_entries<kGamma, true, kOutput, kScaling>(factor.s, tb.gamma, v, sum);
  } else {
    float total = sum;
    negative_entries<kGamma, false, kOutput, kScaling>(factor.s, tb.gamma, v, total);
    if (!all_good(total)) {
      later |= bit;
      return;
    }
    sum = total;
  }
  if (times != 1.f) {  // known to be 1 in the fast loop
#pragma unroll
    for (float& value : v) value *= times;
  }
  if constexpr (kOutput != kNone) Vec<T, kVector<T>>::store(out, v);
}

// The same of vectors that lie in two rows with weights: the entries from `split` on are the second's.
template <class T, int kGamma, Output kOutput>
IOUBAL_DEVICE void weighted_vector(const DenseTable& tb, const EntryFactor<T, kGamma, kOutput>& factor, float first,
                                   float second, u32 split, u32 off, Vec<T, kVector<T>>& in, T* out, float& sum,
                                   u32& later, u32 bit) {
  float v[kVector<T>], total = 0.f, weighted = 0.f;
  in.unpack(v);
  switch_off(v, off);
#pragma unroll
  for (u32 j = 0; j < kVector<T>; ++j) {
    const float weight = j < split ? first : second;
    float loss = 0.f;
    const float slope =
        negative_entry<kGamma, false, false, EntryFactor<T, kGamma, kOutput>::kScaling>(v[j], factor.s, tb.gamma, loss);
    v[j] = (kOutput == kLoss ? kHalf * loss * factor.s : slope) * (factor.rest * weight);
    weighted = fmaf(loss, weight, weighted);
    total += loss;
  }
  if (!all_good(total)) {
    later |= bit;
    return;
  }
  sum += weighted;
  if constexpr (kOutput != kNone) Vec<T, kVector<T>>::store(out, v);
}

// The groups of a tile, each warp its share of them: four vectors a thread, all loaded before the first is used.
// Returns the bits of those left to exact_vector, four for each group.
template <class T, int kGamma, Output kOutput, bool kPlanes>
IOUBAL_DEVICE u32 dense_groups(const DenseTable& tb, const DenseRun<T>& run, u32 first_group, float& doubled) {
  constexpr u32 kCount = kVector<T>, kStep = kWarp * kCount, kReach = kStripsPerWarp * kStep;
  constexpr u32 kGroup = kGroupVectors * kCount;
  const DenseLevel& level = *run.level;
  const u32 shift = threadIdx.x / kWarp * kStripsPerWarp, lane = threadIdx.x % kWarp;
  const u32 rest = level.groups - first_group, groups = rest < tb.iterations ? rest : tb.iterations;
  u32 marks = 0;  // lane i has group i's: the warp's strips with a positive, then those with an ignored row
  if (lane < groups) {
    const u32 at = level.strips(run.image) + first_group + lane;
    marks = tb.positive_strips[at] >> shift & kWarpStrips;
    if constexpr (!kPlanes) marks |= (tb.ignored_strips[at] >> shift & kWarpStrips) << kStripsPerWarp;
  }
  // Shares [begin, end) lie wholly inside the run. One that begins before it has a large number.
  u32 start = (first_group * kGroupVectors + shift * kWarp) * kCount - run.missing;
  const u32 begin = start >= 0u - kCount ? 1 : 0;
  start += begin * kGroup;
  u32 end = begin;
  // Weights of rows: a vector is to lie in two of them at most.
  const bool weighted = !kPlanes && tb.row_weight.data;
  const bool whole = !weighted || tb.classes.divisor + 1 >= kCount;
  if (level.size >= kReach && start <= level.size - kReach && !level.narrow && whole && usual_scale(run.scale)) {
    end += (level.size - kReach - start) / kGroup + 1;
    if (end > groups) end = groups;
  }
  u32 later = 0;
  const auto leave = [&](u32 from, u32 to) {
#pragma unroll 1
    for (u32 i = from; i < to; ++i) later |= (~__shfl_sync(~0u, marks, i) & kWarpStrips) << i * kStripsPerWarp;
  };
  leave(0, begin);
  leave(end, groups);

  const EntryFactor<T, kGamma, kOutput> factor(run.scale);
  const u32* const ignored = tb.ignored + level.word(run.image);
  const bool plain = factor.rest == 1.f && !weighted;
  float sum = 0.f;
  u32 e = start + lane * kCount;
#pragma unroll 1
  for (u32 i = begin; i < end; ++i, e += kGroup) {
    const T* const x = run.x + e;
    T* const out = run.out + e;
    const u32 mark = __shfl_sync(~0u, marks, i);
    const u32 bit = 1u << i * kStripsPerWarp;
    if (mark == 0 && plain) {
      Vec<T, kCount> in[kStripsPerWarp];
#pragma unroll
      for (u32 u = 0; u < kStripsPerWarp; ++u) in[u].load(x + u * kStep);
      u32 off = 0;
      if constexpr (kPlanes) off = ignored_of_planes<kCount, kStep>(tb, level, ignored, e);
#pragma unroll
      for (u32 u = 0; u < kStripsPerWarp; ++u) {
        const u32 own = off >> u * kCount & ((1u << kCount) - 1);
        strip_vector(tb, factor, 1.f, own, in[u], out + u * kStep, sum, later, bit << u);
      }
    } else {  // rarer, and short: the fast way has no room for another test
#pragma unroll 1
      for (u32 u = 0; u < kStripsPerWarp; ++u) {
        if (mark >> u & 1) continue;
        const u32 at = e + u * kStep;
        Vec<T, kCount> in;
        in.load(run.x + at);
        u32 own = 0;
        if constexpr (kPlanes) {
          own = ignored_of_plane<kCount>(tb, level, ignored, at);
        } else if (mark >> kStripsPerWarp >> u & 1) {
          own = ignored_of_row<kCount>(tb, ignored, at);
        }
        if (!weighted) {
          strip_vector(tb, factor, factor.rest, own, in, run.out + at, sum, later, bit << u);
          continue;
        }
        const u32 row = tb.classes.div(at), split = (row + 1) * tb.classes.divisor - at;
        const int64_t anchor = run.anchor(tb, row);
        const float first = static_cast<float>(tb.row_weight[anchor]);
        const float second = split < kCount ? static_cast<float>(tb.row_weight[anchor + 1]) : first;
        if (__any_sync(~0u, !usual_scale(run.scale * first) || !usual_scale(run.scale * second))) {
          later |= bit << u;
        } else {
          weighted_vector(tb, factor, first, second, split, own, in, run.out + at, sum, later, bit << u);
        }
      }
    }
  }
  doubled = factor.doubled(sum);
  return later;
}

// ---- tiles

// The strips with a positive entry of `positive_groups` groups, up to four words a lane; one a warp at a time. Many
// groups where there are many, as few have any: a block waits as long for one strip as for several.
constexpr u32 kWordsPerLane = 4, kMostPositiveGroups = kWarp * kWordsPerLane;
struct PositiveStrips {
  u32 first_group, own[kWordsPerLane], end, count, next;

  IOUBAL_DEVICE void begin(const DenseTable& tb, u32 tile) {
    const u32 lane = threadIdx.x % kWarp;
    first_group = tile * tb.positive_groups;
    next = threadIdx.x / kWarp;
    end = 0;
#pragma unroll
    for (u32 j = 0; j < kWordsPerLane; ++j) {
      const u32 at = lane * kWordsPerLane + j, group = first_group + at;
      own[j] = at < tb.positive_groups && group < tb.groups ? tb.positive_strips[group] : 0;
      end += __popc(own[j]);
    }
    end = warp_scan(end);
    count = __shfl_sync(~0u, end, kWarp - 1);
  }
  // Group and strip of the warp's next one; false: there is none.
  IOUBAL_DEVICE bool take(u32& group, u32& strip) {
    if (next >= count) return false;
    const u32 owner = __ffs(static_cast<int>(__ballot_sync(~0u, end > next))) - 1;
    u32 words[kWordsPerLane], left = next - __shfl_sync(~0u, end, owner);
#pragma unroll
    for (u32 j = 0; j < kWordsPerLane; ++j) {
      words[j] = __shfl_sync(~0u, own[j], owner);
      left += __popc(words[j]);
    }
    u32 bits = words[0], at = 0;
#pragma unroll
    for (u32 j = 1; j < kWordsPerLane; ++j) {
      if (at == j - 1 && left >= static_cast<u32>(__popc(bits))) {
        left -= __popc(bits);
        bits = words[j];
        at = j;
      }
    }
#pragma unroll 1
    for (; left; --left) bits &= bits - 1;
    group = first_group + owner * kWordsPerLane + at;
    strip = __ffs(static_cast<int>(bits)) - 1;
    next += kFillWarps;
    return true;
  }
};

// Tile `tile` of the table, the positives' first; the thread's loss. exact_vector stands here once for both kinds: it
// is long.
template <class T, int kGamma, Output kOutput, Layout kLayout>
IOUBAL_DEVICE float dense_tile(const DenseTable& tb, u32 tile, float* kept) {
  const bool positives = tile < tb.positive_tiles;
  const u32 warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float loss = 0.f;
  u32 later = 0, first_group = 0;
  int l = 0;
  u32 image = 0;
  if (!positives) {
    const u32 number = tile - tb.positive_tiles;
    while (l + 1 < tb.levels && number >= tb.level[l + 1].tile0) ++l;
    const DenseLevel& level = tb.level[l];
    const u32 local = number - level.tile0;
    image = level.per_image.div(local);
    first_group = (local - image * level.tiles) * tb.iterations;
    const DenseRun<T> run(tb, level, image);
    float doubled = 0.f;
    if (kLayout == Layout::kPlanes || (kLayout == Layout::kMixed && level.planes)) {
      later = dense_groups<T, kGamma, kOutput, true>(tb, run, first_group, doubled);
    } else {
      later = dense_groups<T, kGamma, kOutput, false>(tb, run, first_group, doubled);
    }
    loss = run.loss(tb, kHalf * doubled);
  }
  PositiveStrips strips = {};
  if (positives) strips.begin(tb, tile);
#pragma unroll 1
  for (;;) {
    u32 group, strip;
    if (positives) {
      if (!strips.take(group, strip)) break;
      l = 0;
      while (l + 1 < tb.levels && group >= tb.level[l + 1].group0) ++l;
      group -= tb.level[l].group0;
      image = group / tb.level[l].groups;
      group -= image * tb.level[l].groups;
    } else {
      if (later == 0) break;
      const u32 bit = __ffs(static_cast<int>(later)) - 1;
      later &= later - 1;
      group = first_group + bit / kStripsPerWarp;
      strip = warp * kStripsPerWarp + bit % kStripsPerWarp;
    }
    const DenseRun<T> run(tb, tb.level[l], image);
    float sum = 0.f;
    exact_vector<T, kGamma, kOutput>(tb, run, group * kGroupVectors + strip * kWarp + lane, kept, sum);
    loss += run.loss(tb, sum);
  }
  return loss;
}

}  // namespace ioubal::cuda
