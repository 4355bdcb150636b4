// Launches of the dense pass: plans of the tiles, choice of the kernel.
#pragma once

#include "cuda/focal_table.cuh"
#include "cuda/launch.h"

namespace ioubal::cuda {

struct FillVariant {
  Dtype type;
  double gamma;
  Output output;
  DenseLayout layout;
  bool may_skip;
  bool same_scale;  // of the gradients of all images
  bool table;       // by focal_table_kernel
  u32 blocks;       // per multiprocessor, which loop over the tiles; 0: one per tile
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

// Gives the rows of so many images their tiles, and chooses layout (the widest access that their addresses allow),
// table and blocks of the variant.
void plan_rows(const OnDevice& device, DenseTable& tb, FillVariant& variant, u32 images);
// Likewise for planes.
void plan_planes(const OnDevice& device, DenseTable& tb, FillVariant& variant, u32 images);

}  // namespace ioubal::cuda
