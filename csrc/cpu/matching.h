// Kernels of anchor matching over one block of anchors. In float they exist once per instruction set, in double once.
#pragma once

#include <vector>

#include "math/matching.h"

namespace ioubal {

// Anchors that are culled together. Smaller blocks overlap fewer boxes, larger ones cost fewer tests.
constexpr int64_t kMatchBlock = 128;
constexpr int64_t kMatchLanes = 16;  // a block is padded to a multiple of the widest vector

// The smallest box around a block of anchors. Not regular: an anchor without an area, whose pairs are all computed.
template <class T>
struct MatchBounds {
  T x1, y1, x2, y2;
  bool regular;
};

// A block's anchors coordinate by coordinate.
template <class T>
struct MatchBlock {
  alignas(64) T x1[kMatchBlock], y1[kMatchBlock], x2[kMatchBlock], y2[kMatchBlock], area[kMatchBlock];
  int64_t count;  // a multiple of kMatchLanes
  Quad<T> anchor(int64_t i) const { return {{x1[i], y1[i], x2[i], y2[i]}}; }
};

// The best box so far of each anchor of a block.
template <class T>
struct MatchBest {
  alignas(64) T iou[kMatchBlock];
  alignas(64) int32_t index[kMatchBlock];
};

// The boxes of one image without the padded places.
template <class T>
struct MatchBoxes {
  std::vector<Quad<T>> box;
  std::vector<T> area;
  std::vector<int32_t> index;  // within the image
  // What decides about culling: the box, or the whole plane for a box whose pairs must be computed. Padded to a
  // multiple of kMatchLanes by boxes that overlap nothing.
  std::vector<T> x1, y1, x2, y2;
  int64_t count() const { return static_cast<int64_t>(index.size()); }
  bool overlaps(int64_t g, const MatchBounds<T>& bounds) const {
    return x2[g] > bounds.x1 && bounds.x2 > x1[g] && y2[g] > bounds.y1 && bounds.y2 > y1[g];
  }
};

// All take anchors as they lie in memory, x1 y1 x2 y2, `count` of them, a multiple of kMatchLanes.
template <class T>
struct MatchKernels {
  MatchBounds<T> (*bounds)(const T* anchors, int64_t count);
  // The boxes that overlap the bounds, ascending, into list (room for the padded number of boxes); returns how many.
  int64_t (*overlapping)(const MatchBoxes<T>& boxes, const MatchBounds<T>& bounds, int32_t* list);
  void (*load)(const T* anchors, int64_t count, MatchBlock<T>& block);
  // A regular box with a regular block: updates `best`, whose IoUs are numbers >= 0; returns the largest IoU, or 0.
  T (*pairs)(const MatchBlock<T>& block, const Quad<T>& box, T area, int32_t index, MatchBest<T>& best);
  // The same pairs: sets hit[i] where the IoU equals `iou` > 0; returns whether there is one.
  bool (*equal)(const MatchBlock<T>& block, const Quad<T>& box, T area, T iou, uint8_t* hit);
  // matched_index of the first `count` anchors.
  void (*write32)(const MatchBest<T>& best, int64_t count, T high, T low, int32_t* out);
  void (*write64)(const MatchBest<T>& best, int64_t count, T high, T low, int64_t* out);
};

const MatchKernels<float>& portable_match_kernels();
#if defined(__x86_64__)
const MatchKernels<float>& avx2_match_kernels();
const MatchKernels<float>& avx512_match_kernels();
#endif

}  // namespace ioubal
