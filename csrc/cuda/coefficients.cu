#include "cuda/coefficients.cuh"

#include "cuda/launch.h"

namespace ioubal::cuda {
namespace {

__global__ void __launch_bounds__(kCoefficientThreads, 1)
    coefficients_kernel(const IOUBAL_GRID_CONSTANT CoefficientsTable tb) {
  coefficients_block(tb);
}

__global__ void __launch_bounds__(kCoefficientThreads, 1) loss_sum_kernel(const IOUBAL_GRID_CONSTANT LossSum tb) {
  __shared__ double scratch[kCoefficientWarps];
  add_losses<kCoefficientThreads>(tb, scratch);
}

}  // namespace

void launch_coefficients(const OnDevice& device, const CoefficientsTable& tb) {
  device.launch<kCoefficientThreads>(coefficients_kernel, 1, tb);
}

void launch_loss_sum(const OnDevice& device, const LossSum& tb) {
  if (tb.tiles > 0) device.launch<kCoefficientThreads>(loss_sum_kernel, 1, tb);
}

}  // namespace ioubal::cuda
