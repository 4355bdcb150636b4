// Launches of the dense pass: plan of the tiles, choice of the kernel.
#pragma once

#include "cuda/focal_fill.cuh"
#include "cuda/launch.h"

namespace ioubal::cuda {

struct FillVariant {
  Dtype type;
  double gamma;
  Output output;
  Layout layout;
  bool may_skip;
};

void launch_focal_fill_float32(const OnDevice& device, const FillTable& tb, const FillVariant& variant);
void launch_focal_fill_bfloat16(const OnDevice& device, const FillTable& tb, const FillVariant& variant);
void launch_focal_fill_float16(const OnDevice& device, const FillTable& tb, const FillVariant& variant);

inline void launch_focal_fill(const OnDevice& device, const FillTable& tb, const FillVariant& variant) {
  switch (variant.type) {
    case Dtype::kFloat32: return launch_focal_fill_float32(device, tb, variant);
    case Dtype::kBFloat16: return launch_focal_fill_bfloat16(device, tb, variant);
    default: return launch_focal_fill_float16(device, tb, variant);
  }
}

// After the pass of a forward: adds up the losses of its tiles and, where the deltas' zeros are written (`deltas`),
// puts the positives' gradient there.
void launch_focal_finish(const OnDevice& device, const FillTable& tb, const LossSum& losses, bool deltas = false);

// Cuts the levels of so many images, whose places, sizes and layouts are given, into groups and tiles.
void plan_dense(DenseTable& tb, Dtype type, u32 images);

// Words for `ignored` with the one after it and, cleared by the positives' kernel, for the bits of the strips.
struct StripMemory {
  u32 *ignored, *clear, clear_words;
  StripMemory(Workspace& workspace, DenseTable& tb);
};

// The second launch of a loss: coefficients, the bits of the strips where the positives have just been found, zeros.
void launch_coefficients_and_strips(const OnDevice& device, const CoefficientsTable& tb, const DenseTable& dense,
                                    bool found = true, const ZerosTable& zeros = {});

}  // namespace ioubal::cuda
