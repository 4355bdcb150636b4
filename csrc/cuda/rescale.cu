#include "cuda/rescale.cuh"

#include "cuda/launch.h"

namespace ioubal::cuda {
namespace {

void rescale(TensorList grads, Tensor grad_output, OptionalTensor grad_scale_tensor, double grad_scale) {
  const OnDevice device(grad_output);
  for (const Tensor& t : grads) {
    RescaleTable tb;
    tb.data = t.mutable_data_ptr();
    tb.count = t.numel();
    const u32 size = size_of(dtype_of(t));
    tb.head = static_cast<u32>((16 - reinterpret_cast<uintptr_t>(tb.data) % 16) % 16 / size);
    tb.head = static_cast<u32>(std::min<int64_t>(tb.head, tb.count));
    tb.scale = number_ref(grad_output, 0.0);
    tb.expected = number_ref(grad_scale_tensor, grad_scale);
    // At least a block, for the ends; a small grid, for it mostly finds nothing to do.
    const int64_t wanted = std::max<int64_t>((tb.count * size / 16 + kThreads - 1) / kThreads, 1);
    const u32 blocks = static_cast<u32>(std::min<int64_t>(wanted, 2 * device.multiprocessors()));
    switch (dtype_of(t)) {
      case Dtype::kFloat32: device.launch(rescale_kernel<float>, blocks, tb); break;
      case Dtype::kBFloat16: device.launch(rescale_kernel<BFloat16>, blocks, tb); break;
      default: device.launch(rescale_kernel<Float16>, blocks, tb);
    }
  }
}

}  // namespace
}  // namespace ioubal::cuda

STABLE_TORCH_LIBRARY_IMPL(ioubal, IOUBAL_CUDA_KEY, m) {
  m.impl(IOUBAL_CUDA_OP("rescale"), TORCH_BOX(&ioubal::cuda::rescale));
}
