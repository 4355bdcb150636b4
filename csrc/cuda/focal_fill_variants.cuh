// The kernels of the dense pass for one dtype; a .cu file per dtype, so that they compile side by side.
#pragma once

#include "cuda/focal_fill.h"

namespace ioubal::cuda {

template <class T, int kGamma, Output kOutput, DenseLayout kLayout>
void launch_fill(const OnDevice& device, FillTable tb, const FillVariant& v) {
  tb.turn = FastDiv::make(tb.deltas.tiles > 0 ? tb.dense.tiles / tb.deltas.tiles + 1 : 1);
  u32 blocks = pass_blocks(device, tb.deltas.tiles + tb.dense.tiles, v.may_skip);
  if (v.blocks > 0) blocks = std::min(blocks, v.blocks * device.multiprocessors());
  device.launch(focal_fill_kernel<T, kGamma, kOutput, kLayout>, blocks, tb);
}

template <class T, int kGamma, Output kOutput>
void launch_fill_layout(const OnDevice& device, const FillTable& tb, const FillVariant& v) {
  // Rows without a common alignment are rare, and so are odd class counts with gamma 0 or 1: no kernel per gamma.
  constexpr int kCommon = kGamma == 2 ? 2 : -1;
  switch (v.layout) {
    case DenseLayout::kRows: return launch_fill<T, kGamma, kOutput, DenseLayout::kRows>(device, tb, v);
    case DenseLayout::kPlanes: return launch_fill<T, kGamma, kOutput, DenseLayout::kPlanes>(device, tb, v);
    case DenseLayout::kSingleRows:
      if constexpr (kOutput != kNone) {  // without an output nothing can be misaligned to it
        return launch_fill<T, kCommon, kOutput, DenseLayout::kSingleRows>(device, tb, v);
      }
      [[fallthrough]];
    default: return launch_fill<T, kCommon, kOutput, DenseLayout::kSpanningRows>(device, tb, v);
  }
}

template <class T, DenseLayout kLayout>
void launch_table(const OnDevice& device, const FillTable& tb) {
  const u32 blocks = std::min(divide_up(tb.dense.tiles, kTableWarps), device.multiprocessors());
  device.launch<kTableThreads, kTableShared<T>>(focal_table_kernel<T, kLayout>, blocks, tb);
}

template <class T>
void launch_fill_variant(const OnDevice& device, const FillTable& tb, const FillVariant& v) {
  if constexpr (sizeof(T) == 2) {
    if (v.table && v.layout == DenseLayout::kRows) return launch_table<T, DenseLayout::kRows>(device, tb);
    if (v.table && v.layout == DenseLayout::kPlanes) return launch_table<T, DenseLayout::kPlanes>(device, tb);
    if (v.table) return launch_table<T, DenseLayout::kSpanningRows>(device, tb);
  }
  if (v.output == kNone) {
    return v.gamma == 2.0 ? launch_fill_layout<T, 2, kNone>(device, tb, v)
                          : launch_fill_layout<T, -1, kNone>(device, tb, v);
  }
  if constexpr (sizeof(T) == 4) {
    if (v.output == kLoss) {
      if (v.layout == DenseLayout::kRows) return launch_fill<T, -1, kLoss, DenseLayout::kRows>(device, tb, v);
      if (v.layout == DenseLayout::kSingleRows) {
        return launch_fill<T, -1, kLoss, DenseLayout::kSingleRows>(device, tb, v);
      }
      return launch_fill<T, -1, kLoss, DenseLayout::kSpanningRows>(device, tb, v);
    }
  }
  if (v.gamma == 2.0) return launch_fill_layout<T, 2, kGradient>(device, tb, v);
  if (v.gamma == 1.0) return launch_fill_layout<T, 1, kGradient>(device, tb, v);
  if (v.gamma == 0.0) return launch_fill_layout<T, 0, kGradient>(device, tb, v);
  return launch_fill_layout<T, -1, kGradient>(device, tb, v);
}

}  // namespace ioubal::cuda
