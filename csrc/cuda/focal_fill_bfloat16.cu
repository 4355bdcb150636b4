#include "cuda/focal_fill_variants.cuh"

namespace ioubal::cuda {

void launch_focal_fill_bfloat16(const OnDevice& device, const FillTable& tb, const FillVariant& variant) {
  launch_fill_variant<BFloat16>(device, tb, variant);
}

}  // namespace ioubal::cuda
