#include "cuda/coefficients.cuh"

#include "cuda/launch.h"

namespace ioubal::cuda {
namespace {

__global__ void __launch_bounds__(kCoefficientThreads, 1)
    coefficients_kernel(const IOUBAL_GRID_CONSTANT CoefficientsTable tb) {
  coefficients_block(tb);
}

}  // namespace

void launch_coefficients(const OnDevice& device, const CoefficientsTable& tb) {
  device.launch<kCoefficientThreads>(coefficients_kernel, 1, tb);
}

}  // namespace ioubal::cuda
