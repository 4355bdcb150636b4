// Which gt box each anchor has to predict, for the whole batch in three launches, without the matrix of IoUs:
//
//   prepare   a thread per box: float32 copies of the boxes, NaN where there is none, and their keys
//   match     a warp per 32 anchors and a few images: decisions by the thresholds; each box's best IoU into its key
//   restore   the same warps: anchors that are the best of some box (low quality), and each box's one best (forced)
//
// A warp computes only the boxes that overlap the bounds of its 32 anchors: 32 boxes are tested at a time, a lane each.
// Keys are numbers whose maximum is the same in every order, so integer atomics leave the result deterministic.
#pragma once

#include "cuda/tables.cuh"
#include "math/matching.h"

namespace ioubal::cuda {

// Of shared anchors. More images save loading and bounding them again; fewer leave more warps to share the work.
constexpr u32 kImagesPerWarp = 4;
constexpr u32 kNone = ~0u;

struct IntOut {
  void* data;
  bool wide;  // int64, else int32
  IOUBAL_DEVICE void set(int64_t at, int64_t value) const {
    if (wide) {
      static_cast<int64_t*>(data)[at] = value;
    } else {
      static_cast<int32_t*>(data)[at] = static_cast<int32_t>(value);
    }
  }
};

// ---------------------------------------------------------------------------------------------------------- gt boxes

// A box in float32; one with a NaN coordinate where a place holds none.
IOUBAL_DEVICE Quad<float> gt_box(const GroundTruth& truth, int64_t image, int64_t place) {
  const Quad<float> none = {{NAN, NAN, NAN, NAN}};
  if (place >= truth.count(image)) return none;
  if (truth.labels[truth.padded ? 0 : image] && truth.label(image, place) == kNoLabel) return none;
  return truth.box<float>(image, place);
}

// A box's best anchor as one number: the IoU's rank above the complement of the anchor's index, so that the largest key
// is the largest IoU's, and of equal ones the first anchor's.
using Key = unsigned long long;

// IoUs are -0, 0, positive or NaN: where boxes overlap, no area is negative. The bits of such numbers have their order,
// and a NaN, of whatever bits, comes last.
constexpr u32 kNanRank = ~0u;
IOUBAL_DEVICE u32 rank_of(float iou) { return is_nan(iou) ? kNanRank : float_to_bits(iou) & 0x7fffffffu; }

IOUBAL_DEVICE Key key_of(u32 rank, u32 anchor) { return static_cast<Key>(rank) << 32 | ~anchor; }
IOUBAL_DEVICE u32 key_rank(Key key) { return static_cast<u32>(key >> 32); }
IOUBAL_DEVICE u32 key_anchor(Key key) { return ~static_cast<u32>(key); }
IOUBAL_DEVICE float key_iou(Key key) { return bits_to_float(key_rank(key)); }  // NaN equals nothing

// Largest value of the warp, in every lane.
IOUBAL_DEVICE u32 warp_max(u32 value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_max_sync(~0u, value);
#else
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) {
    const u32 other = __shfl_xor_sync(~0u, value, offset);
    value = other > value ? other : value;
  }
  return value;
#endif
}

// ----------------------------------------------------------------------------------------------------------- problem

struct MatchTable {
  FloatRef anchors;  // (R, 4), or (N, R, 4): `own`
  bool own, aligned;
  u32 rows, units;  // R; warps' worth of anchors
  u32 images, images_per_warp;
  u32 places;     // of boxes per image; those of the batch are less than 2^31
  float4* boxes;  // (N, places)
  Key* keys;      // (N, places), or nullptr: not wanted
  u32* contends;  // (groups of images, units), a bit per image: whether a box's best IoU may be there
  float high, low;
  bool force_best;
  IntOut out;  // (N, R)

  IOUBAL_DEVICE Quad<float> anchor(int64_t row) const {
    switch (anchors.type) {
      case Dtype::kBFloat16: return anchor_of(static_cast<const BFloat16*>(anchors.data) + 4 * row);
      case Dtype::kFloat16: return anchor_of(static_cast<const Float16*>(anchors.data) + 4 * row);
      default: return anchor_of(static_cast<const float*>(anchors.data) + 4 * row);
    }
  }
  IOUBAL_DEVICE Quad<float> box(u32 at) const {
    const float4 b = __ldg(boxes + at);
    return {{b.x, b.y, b.z, b.w}};
  }

 private:
  template <class T>
  IOUBAL_DEVICE Quad<float> anchor_of(const T* p) const {
    Quad<float> out;
    if (aligned) {
      Vec<T, 4> vector;
      vector.load(p);
      vector.unpack(out.v);
    } else {
      for (int j = 0; j < 4; ++j) out.v[j] = load_one(p + j);
    }
    return out;
  }
};

// A warp's 32 anchors, one in each lane, and their bounds. Lanes past the last anchor repeat it: no maximum changes,
// and of equal ones the first lane counts.
struct Unit {
  u32 index, first, lane;
  bool here;  // the lane has an anchor of its own
  Quad<float> anchor;
  float area;
  Quad<float> bounds;
  bool regular;  // all of them

  IOUBAL_DEVICE u32 row() const { return first + lane; }
  IOUBAL_DEVICE void load(const MatchTable& tb, int64_t image) {
    const int64_t row_or_last = here ? row() : tb.rows - 1;
    anchor = tb.anchor((tb.own ? image * tb.rows : 0) + row_or_last);
    area = matching_area(anchor);
    regular = __all_sync(~0u, is_regular_anchor(anchor));
    bounds = anchor;
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float other = __shfl_xor_sync(~0u, bounds.v[j], offset);
        bounds.v[j] = j < 2 ? fminf(bounds.v[j], other) : fmaxf(bounds.v[j], other);
      }
    }
  }
  IOUBAL_DEVICE bool overlaps(const Quad<float>& box) const {
    return box.v[2] > bounds.v[0] && bounds.v[2] > box.v[0] && box.v[3] > bounds.v[1] && bounds.v[3] > box.v[1];
  }
};

// The images that a warp works on, at most 32.
struct Images {
  u32 group, count, first;
};

// The unit and the images of this warp; false: a warp too many. The last units come first: the anchors of the coarsest
// level, usually, which overlap the most boxes.
IOUBAL_DEVICE bool find_work(const MatchTable& tb, Unit& unit, Images& images) {
  const u32 warp = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp;
  images.group = warp / tb.units;
  images.first = images.group * tb.images_per_warp;
  if (images.first >= tb.images) return false;
  const u32 left = tb.images - images.first;
  images.count = left < tb.images_per_warp ? left : tb.images_per_warp;
  unit.index = tb.units - 1 - (warp - images.group * tb.units);
  unit.lane = threadIdx.x % kWarp;
  unit.first = unit.index * kWarp;
  unit.here = unit.row() < tb.rows;
  return true;
}

// An anchor's best box so far. Boxes that need not be computed have an IoU of 0, as the first box has at least.
struct BestBox {
  float iou = 0.f;
  u32 taken = kNone, first = kNone;
  IOUBAL_DEVICE void take(float other, u32 place) {
    if (takes_over(other, iou)) {
      iou = other;
      taken = place;
    }
  }
  IOUBAL_DEVICE u32 box() const { return taken == kNone ? first : taken; }
};

// Up to 32 boxes of an image, `first` its first one, from place `chunk`: pair(place, iou) for each that an anchor of
// the unit may overlap, in their order and by all lanes; `best` is kept.
template <class F>
IOUBAL_DEVICE void for_pairs(const MatchTable& tb, const Unit& unit, u32 first, u32 chunk, BestBox& best,
                             const F& pair) {
  const u32 place = chunk + unit.lane;
  bool valid = false, wanted = false;
  if (place < tb.places) {
    const Quad<float> box = tb.box(first + place);
    valid = !is_padding(box);
    wanted = valid && (!unit.regular || !is_regular_box(matching_area(box)) || unit.overlaps(box));
  }
  const u32 any = __ballot_sync(~0u, valid);
  if (best.first == kNone && any) best.first = chunk + __ffs(any) - 1;
  for (u32 left = __ballot_sync(~0u, wanted); left; left &= left - 1) {
    const u32 at = chunk + __ffs(left) - 1;
    const Quad<float> box = tb.box(first + at);
    const float area = matching_area(box);
    const float iou = matching_iou(box, area, unit.anchor, unit.area, unit.regular && is_regular_box(area));
    best.take(iou, at);
    pair(at, iou);
  }
}

// ----------------------------------------------------------------------------------------------------------- kernels

__global__ void __launch_bounds__(kThreads)
    prepare_boxes_kernel(const IOUBAL_GRID_CONSTANT MatchTable tb, const IOUBAL_GRID_CONSTANT GroundTruth truth) {
  const u32 i = blockIdx.x * kThreads + threadIdx.x, image = i / tb.places;
  if (image >= tb.images) return;
  const Quad<float> box = gt_box(truth, image, i - image * tb.places);
  tb.boxes[i] = make_float4(box.v[0], box.v[1], box.v[2], box.v[3]);
  // Anchor 0 has an IoU of 0 at least. A place without a box: equal to nothing, the best anchor's of none.
  if (tb.keys) tb.keys[i] = is_padding(box) ? key_of(kNanRank, kNone) : key_of(0, 0);
}

__global__ void __launch_bounds__(kThreads) match_anchors_kernel(const IOUBAL_GRID_CONSTANT MatchTable tb) {
  Unit unit;
  Images images;
  if (!find_work(tb, unit, images)) return;
  unit.load(tb, images.first);
  u32 contends = 0;
  for (u32 n = 0; n < images.count; ++n) {
    const u32 image = images.first + n, boxes = image * tb.places;
    BestBox best;
    bool may_hold = false;
    for (u32 chunk = 0; chunk < tb.places; chunk += kWarp) {
      Key key = 0;  // of the lane's box, among these anchors
      for_pairs(tb, unit, boxes, chunk, best, [&](u32 place, float iou) {
        if (!tb.keys) return;
        const u32 rank = rank_of(iou), top = warp_max(rank);
        const u32 holders = __ballot_sync(~0u, rank == top);
        if (place == chunk + unit.lane) key = key_of(top, unit.first + __ffs(holders) - 1);
      });
      if (key_rank(key) > 0) {
        const Key before = atomicMax(tb.keys + (boxes + chunk + unit.lane), key);
        may_hold |= key_rank(before) <= key_rank(key);
      }
    }
    if (unit.here) {
      const bool none = best.first == kNone;
      tb.out.set(static_cast<int64_t>(image) * tb.rows + unit.row(),
                 none ? kUnmatched : matched_index(best.iou, int64_t{best.box()}, tb.high, tb.low));
    }
    contends |= __any_sync(~0u, may_hold) ? 1u << n : 0;
  }
  if (tb.contends && unit.lane == 0) tb.contends[static_cast<int64_t>(images.group) * tb.units + unit.index] = contends;
}

__global__ void __launch_bounds__(kThreads) restore_matches_kernel(const IOUBAL_GRID_CONSTANT MatchTable tb) {
  Unit unit;
  Images images;
  if (!find_work(tb, unit, images)) return;
  const u32 contends = tb.contends ? tb.contends[static_cast<int64_t>(images.group) * tb.units + unit.index] : 0;
  for (u32 n = 0; n < images.count; ++n) {
    const u32 image = images.first + n, boxes = image * tb.places;
    // A box that no anchor overlaps has all of them for its best.
    bool all = false;
    u32 forced = kNone;
    for (u32 chunk = 0; chunk < tb.places; chunk += kWarp) {
      const u32 place = chunk + unit.lane;
      const Key key = place < tb.places ? tb.keys[boxes + place] : key_of(kNanRank, kNone);
      all |= __any_sync(~0u, key_rank(key) == 0) != 0;
      if (!tb.force_best) continue;
      const u32 at = key_anchor(key) - unit.first;
      for (u32 left = __ballot_sync(~0u, at < kWarp); left; left &= left - 1) {
        const u32 owner = __ffs(left) - 1;
        if (__shfl_sync(~0u, at, owner) == unit.lane) forced = chunk + owner;  // the last of them has it
      }
    }
    bool restored = false;
    BestBox best;
    if (tb.contends && (all || contends >> n & 1)) {
      unit.load(tb, image);
      restored = all;
      for (u32 chunk = 0; chunk < tb.places; chunk += kWarp) {
        for_pairs(tb, unit, boxes, chunk, best,
                  [&](u32 place, float iou) { restored |= iou == key_iou(tb.keys[boxes + place]); });
      }
    }
    const u32 index = forced == kNone ? best.box() : forced;
    if (unit.here && (restored || forced != kNone))
      tb.out.set(static_cast<int64_t>(image) * tb.rows + unit.row(), index);
  }
}

}  // namespace ioubal::cuda
