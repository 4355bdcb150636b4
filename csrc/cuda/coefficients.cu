#include "cuda/coefficients.cuh"

#include "cuda/launch.h"

namespace ioubal::cuda {
namespace {

__global__ void __launch_bounds__(kThreads, 3) coefficients_kernel(const IOUBAL_GRID_CONSTANT CoefficientsTable tb) {
  coefficients_block(tb);
}

}  // namespace

void launch_coefficients(const OnDevice& device, const CoefficientsTable& tb) {
  device.launch(coefficients_kernel, 1, tb);
}

}  // namespace ioubal::cuda
