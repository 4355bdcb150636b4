// The kernels of the dense pass for one dtype; a .cu file per dtype, so that they compile side by side.
#pragma once

#include "cuda/focal_fill.h"

namespace ioubal::cuda {

template <class T, int kGamma, Output kOutput, Layout kLayout>
void launch_fill_kernel(const OnDevice& device, FillTable tb, const FillVariant& v) {
  tb.turn = FastDiv::make(tb.deltas.tiles > 0 ? tb.dense.all_tiles() / tb.deltas.tiles + 1 : 1);
  const u32 tiles = tb.deltas.tiles + tb.dense.all_tiles();
  launch_pass<kFillThreads>(device, focal_fill_kernel<T, kGamma, kOutput, kLayout>, tiles, v.may_skip, tb);
}

// Any gamma and heads of several layouts are rarer: one kernel for all of them.
template <class T, int kGamma, Output kOutput>
void launch_fill(const OnDevice& device, const FillTable& tb, const FillVariant& v) {
  if constexpr (kGamma != -1) {
    switch (v.layout) {
      case Layout::kRows: return launch_fill_kernel<T, kGamma, kOutput, Layout::kRows>(device, tb, v);
      case Layout::kPlanes: return launch_fill_kernel<T, kGamma, kOutput, Layout::kPlanes>(device, tb, v);
      default: break;
    }
  }
  launch_fill_kernel<T, -1, kOutput, Layout::kMixed>(device, tb, v);
}

template <class T>
void launch_fill_variant(const OnDevice& device, const FillTable& tb, const FillVariant& v) {
  if (v.output == kNone) {
    return v.gamma == 2.0 ? launch_fill<T, 2, kNone>(device, tb, v) : launch_fill<T, -1, kNone>(device, tb, v);
  }
  if constexpr (sizeof(T) == 4) {
    if (v.output == kLoss) return launch_fill<T, -1, kLoss>(device, tb, v);
  }
  if (v.gamma == 2.0) return launch_fill<T, 2, kGradient>(device, tb, v);
  if (v.gamma == 1.0) return launch_fill<T, 1, kGradient>(device, tb, v);
  if (v.gamma == 0.0) return launch_fill<T, 0, kGradient>(device, tb, v);
  return launch_fill<T, -1, kGradient>(device, tb, v);
}

}  // namespace ioubal::cuda
