// Scaling a gradient where it lies, for losses whose logits it was written over.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "common/tensor_access.h"

namespace ioubal {
namespace {

template <class T, class Wide>
void multiply(const Tensor& t, double factor) {
  constexpr int64_t kChunk = 1 << 16;
  T* const data = static_cast<T*>(t.mutable_data_ptr());
  const int64_t count = t.numel();
  const Wide wide = static_cast<Wide>(factor);
  const auto chunks = [count](auto one) {
    torch::stable::parallel_for(0, (count + kChunk - 1) / kChunk, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * kChunk; i < std::min(count, end * kChunk); ++i) one(i);
    });
  };
  if (std::isfinite(wide)) {
    chunks([=](int64_t i) { data[i] = static_cast<T>(static_cast<Wide>(data[i]) * wide); });
  } else {  // a 0, as an ignored row's, stays
    chunks([=](int64_t i) {
      if (static_cast<Wide>(data[i]) != 0) data[i] = static_cast<T>(static_cast<Wide>(data[i]) * wide);
    });
  }
}

// Multiplies by grad_output / the expected one; nothing is read or written where that is 1.
void rescale(TensorList grads, Tensor grad_output, OptionalTensor grad_scale_tensor, double grad_scale) {
  const double factor = FloatReader(grad_output)[0] / Number(grad_scale_tensor, grad_scale).get();
  if (factor == 1.0) return;
  for (const Tensor& t : grads) {
    switch (t.scalar_type()) {
      case ScalarType::Float: multiply<float, float>(t, factor); break;
      case ScalarType::BFloat16: multiply<c10::BFloat16, float>(t, factor); break;
      case ScalarType::Half: multiply<c10::Half, float>(t, factor); break;
      default: multiply<double, double>(t, factor);
    }
  }
}

}  // namespace
}  // namespace ioubal

STABLE_TORCH_LIBRARY_IMPL(ioubal, CPU, m) { m.impl("rescale.cpp", TORCH_BOX(&ioubal::rescale)); }
