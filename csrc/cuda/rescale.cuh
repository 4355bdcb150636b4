// Scaling a gradient where it lies, for losses whose logits it was written over.
#pragma once

#include "cuda/device.cuh"

namespace ioubal::cuda {

struct RescaleTable {
  void* data;
  int64_t count;
  u32 head;  // elements before the first multiple of 16 bytes
  NumberRef scale, expected;
};

// A 0 stays one, as an ignored row's has to whatever the factor: also infinite, or NaN.
IOUBAL_DEVICE float rescaled(float value, float factor) { return value == 0.f ? value : value * factor; }

// Nothing is read or written where the factor is 1.
template <class T>
__global__ void __launch_bounds__(kThreads) rescale_kernel(const IOUBAL_GRID_CONSTANT RescaleTable tb) {
  constexpr int kCount = 16 / static_cast<int>(sizeof(T));
  const double factor = tb.scale.get() / tb.expected.get();
  if (factor == 1.0) return;
  const float f = static_cast<float>(factor);
  T* const data = static_cast<T*>(tb.data);
  const int64_t vectors = (tb.count - tb.head) / kCount, rest = tb.head + vectors * kCount;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = first; i < vectors; i += static_cast<int64_t>(gridDim.x) * kThreads) {
    T* const at = data + tb.head + i * kCount;
    Vec<T, kCount> in;
    float v[kCount];
    in.load(at);
    in.unpack(v);
#pragma unroll
    for (int j = 0; j < kCount; ++j) v[j] = rescaled(v[j], f);
    Vec<T, kCount>::store(at, v);
  }
  if (first < tb.head) store_one(data + first, rescaled(load_one(data + first), f));
  if (rest + first < tb.count) store_one(data + rest + first, rescaled(load_one(data + rest + first), f));
}

}  // namespace ioubal::cuda
