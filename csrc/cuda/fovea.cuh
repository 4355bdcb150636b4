// Which gt box each cell of FoveaBox's levels has to predict: one launch, a thread per cell. A block's boxes, those of
// its level's scale whose cells reach into its 256 ones, are collected first.
#pragma once

#include "cuda/matching.cuh"

namespace ioubal::cuda {

struct FoveaLevel {
  u32 width, height;
  u32 first_cell;    // of the level in (N, R)
  u32 tile0, tiles;  // first tile; tiles per image
  float stride, smallest_squared, largest_squared;
};

struct FoveaTable {
  FoveaLevel level[kMaxLevels];
  int levels;
  int64_t cells_per_image;
  int64_t places;  // of boxes per image
  float from, to;  // 1 - sigma, 1 + sigma
  IntOut out;      // (N, R)
};

// A box's cells of one level, bounds included; none if left > right or top > bottom.
struct FoveaBox {
  u32 left, top, right, bottom, place;
  float area;
};

// Whether a box of the level has cells in rows first_row .. last_row.
IOUBAL_DEVICE bool find_cells(const FoveaTable& tb, const FoveaLevel& level, const Quad<float>& box, u32 first_row,
                              u32 last_row, FoveaBox& out) {
  out.area = matching_area(box);
  if (!is_in_scale(out.area, level.smallest_squared, level.largest_squared)) return false;  // nor is a NaN
  const float width = static_cast<float>(level.width), height = static_cast<float>(level.height);
  const FoveaCells<float> x = fovea_cells(box.v[0], box.v[2], level.stride, tb.from, tb.to, width);
  const FoveaCells<float> y = fovea_cells(box.v[1], box.v[3], level.stride, tb.from, tb.to, height);
  out.left = static_cast<u32>(x.first);
  out.right = static_cast<u32>(x.last);
  out.top = static_cast<u32>(y.first);
  out.bottom = static_cast<u32>(y.last);
  return out.top <= last_row && first_row <= out.bottom;
}

__global__ void __launch_bounds__(kThreads)
    match_fovea_kernel(const IOUBAL_GRID_CONSTANT FoveaTable tb, const IOUBAL_GRID_CONSTANT GroundTruth truth) {
  __shared__ FoveaBox list[kThreads];
  __shared__ u32 counts[kThreads / kWarp];
  const u32 lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int l = 0;
  while (l + 1 < tb.levels && blockIdx.x >= tb.level[l + 1].tile0) ++l;
  const FoveaLevel& level = tb.level[l];
  const u32 local = blockIdx.x - level.tile0, image = local / level.tiles;
  const u32 first = (local - image * level.tiles) * kThreads, cells = level.width * level.height;
  const u32 last = first + kThreads < cells ? first + kThreads - 1 : cells - 1;
  const u32 cell = first + threadIdx.x, row = cell / level.width, column = cell - row * level.width;
  const u32 first_row = first / level.width, last_row = last / level.width;

  u32 best = kNone;
  float area = INFINITY;
  for (int64_t chunk = 0; chunk < tb.places; chunk += kThreads) {
    const int64_t place = chunk + threadIdx.x;
    FoveaBox box;
    box.place = static_cast<u32>(place);
    const bool has_cells = find_cells(tb, level, gt_box(truth, image, place), first_row, last_row, box);
    const u32 collected = __ballot_sync(~0u, has_cells);
    if (lane == 0) counts[warp] = __popc(collected);
    __syncthreads();
    u32 at = __popc(collected & ((1u << lane) - 1)), count = 0;
    for (u32 i = 0; i < kThreads / kWarp; ++i) {
      at += i < warp ? counts[i] : 0;
      count += counts[i];
    }
    if (has_cells) list[at] = box;
    __syncthreads();
    // In the order of the boxes. The next ones come behind a barrier, where all threads are done with these.
    for (u32 i = 0; i < count; ++i) {
      const FoveaBox& other = list[i];
      const bool inside = other.left <= column && column <= other.right && other.top <= row && row <= other.bottom;
      if (inside && takes_cell(other.area, area)) {
        area = other.area;
        best = other.place;
      }
    }
  }
  if (cell < cells) {
    tb.out.set(image * tb.cells_per_image + level.first_cell + cell, best == kNone ? kUnmatched : int64_t{best});
  }
}

}  // namespace ioubal::cuda
