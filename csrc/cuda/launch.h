// The host side of every CUDA op: device, stream, launches, and tensors as kernels see them.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cuda/coefficients.cuh"
#if !defined(IOUBAL_SIMT)
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif

// The emulation of the tests registers the same ops for CPU tensors, under an overload of its own.
#if defined(IOUBAL_SIMT)
#define IOUBAL_CUDA_KEY CPU
#define IOUBAL_CUDA_OP(name) name ".simt"
#else
#define IOUBAL_CUDA_KEY CUDA
#define IOUBAL_CUDA_OP(name) name ".cpp"
#endif

namespace ioubal::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using TensorList = std::vector<Tensor>;

#if defined(IOUBAL_SIMT)
class OnDevice {
 public:
  explicit OnDevice(const Tensor&) {}
  static u32 multiprocessors() { return 2; }
  template <u32 kBlock, class... Parameters>
  static u32 resident_blocks(void (*)(Parameters...)) {
    return 1024 / kBlock * multiprocessors();
  }
  template <u32 kBlock = kThreads, class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), u32 blocks, const Arguments&... arguments) const {
    if (blocks > 0) simt::launch(dim3(blocks), dim3(kBlock), [&] { kernel(arguments...); });
  }
};
#else
// Makes a tensor's device current, for torch and for this library's own CUDA runtime, and launches on torch's stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    check(cudaSetDevice(tensor.get_device_index()), "cudaSetDevice");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    device_ = tensor.get_device_index();
  }
  u32 multiprocessors() const {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_), "cudaDeviceGetAttribute");
    return static_cast<u32>(count);
  }
  // As many blocks of a kernel as run side by side.
  template <u32 kBlock, class... Parameters>
  u32 resident_blocks(void (*kernel)(Parameters...)) const {
    int count = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, kBlock, 0), "kernel occupancy");
    return static_cast<u32>(std::max(count, 1)) * multiprocessors();
  }
  template <u32 kBlock = kThreads, class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), u32 blocks, const Arguments&... arguments) const {
    if (blocks == 0) return;
    // clang-format off
    kernel<<<blocks, kBlock, 0, stream_>>>(arguments...);  // the formatter takes it for two templates
    // clang-format on
    check(cudaGetLastError(), "kernel launch");
  }

 private:
  static void check(cudaError_t error, const char* what) {
    STD_TORCH_CHECK(error == cudaSuccess, "ioubal_kernels: ", what, ": ", cudaGetErrorString(error));
  }
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int device_ = 0;
};
#endif

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: return Dtype::kFloat64;
  }
}

inline u32 size_of(Dtype type) { return type == Dtype::kFloat64 ? 8 : type == Dtype::kFloat32 ? 4 : 2; }

inline FloatRef float_ref(const Tensor& t) { return {t.const_data_ptr(), dtype_of(t)}; }
inline FloatRef float_ref(const OptionalTensor& t) { return t ? float_ref(*t) : FloatRef{nullptr, Dtype::kFloat32}; }
inline FloatOut float_out(const Tensor& t) { return {t.mutable_data_ptr(), dtype_of(t)}; }
inline IntRef int_ref(const Tensor& t) { return {t.const_data_ptr(), t.scalar_type() == ScalarType::Long}; }
inline IntRef int_ref(const OptionalTensor& t) { return t ? int_ref(*t) : IntRef{nullptr, false}; }
inline NumberRef number_ref(const OptionalTensor& t, double value) {
  return {float_ref(t), value, t.has_value() && t->dim() == 1};
}
inline NumberRef number_ref(double value) { return {{nullptr, Dtype::kFloat32}, value, false}; }
inline Quad<double> to_quad(const std::vector<double>& values) {
  return {{values[0], values[1], values[2], values[3]}};
}

// What is written in place of a tensor's elements, as the type of a kernel's pointer.
template <class T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline u32 divide_up(int64_t n, int64_t by) { return static_cast<u32>((n + by - 1) / by); }

// A count that kernels keep in 32 bits with room for a tile's steps.
inline u32 count32(int64_t n, const char* what) {
  STD_TORCH_CHECK(n >= 0 && n < (int64_t(1) << 31), "ioubal_kernels: ", what, " must be less than 2^31 elements, got ",
                  n);
  return static_cast<u32>(n);
}

// Scratch memory that Python has allocated (ops/workspace.py), handed out piece by piece.
class Workspace {
 public:
  explicit Workspace(const TensorList& tensors) {
    STD_TORCH_CHECK(tensors.size() == 1, "ioubal_kernels: the CUDA kernels need a workspace");
    at_ = static_cast<char*>(tensors[0].mutable_data_ptr());
    end_ = at_ + tensors[0].numel() * tensors[0].element_size();
  }
  // Aligned to T only: a piece follows one of the same type without a gap, as the word after `ignored` must.
  template <class T>
  T* take(int64_t count) {
    char* const start = at_ + (0 - reinterpret_cast<uintptr_t>(at_)) % alignof(T);
    at_ = start + count * static_cast<int64_t>(sizeof(T));
    STD_TORCH_CHECK(at_ <= end_, "ioubal_kernels: the workspace is too small by ", at_ - end_, " bytes");
    return reinterpret_cast<T*>(start);
  }

 private:
  char *at_, *end_;
};

// The coefficients' part of a workspace.
struct CoefficientMemory {
  float *negative, *positive, *location, *cls_norm, *loc_norm, *positives_loss;
  u32* ticket;
  CoefficientMemory(Workspace& workspace, int64_t images, int64_t scopes)
      : negative(workspace.take<float>(images)),
        positive(workspace.take<float>(images)),
        location(workspace.take<float>(images)),
        cls_norm(workspace.take<float>(scopes)),
        loc_norm(workspace.take<float>(scopes)),
        positives_loss(workspace.take<float>(1)),
        ticket(workspace.take<u32>(1)) {}
  Coefficients refs() const { return {negative, positive, location, cls_norm, loc_norm}; }
  void fill(CoefficientsTable& tb) const {
    tb.negative = negative;
    tb.positive = positive;
    tb.location = location;
    tb.cls_norm = cls_norm;
    tb.loc_norm = loc_norm;
    tb.positives_loss = positives_loss;
    tb.ticket = ticket;
  }
};

void launch_coefficients(const OnDevice& device, const CoefficientsTable& tb);

// Launches a pass, a block a tile. One that may find that there is nothing to do is small: its blocks loop over the
// tiles. As many as are there at once: with fewer warps there are too few reads under way, and more would begin when
// the others are done.
template <u32 kBlock = kThreads, class... Parameters, class Table>
void launch_pass(const OnDevice& device, void (*kernel)(Parameters...), u32 tiles, bool may_skip, const Table& tb) {
  const u32 blocks = may_skip ? std::min(tiles, device.resident_blocks<kBlock>(kernel)) : tiles;
  device.launch<kBlock>(kernel, blocks, tb);
}

}  // namespace ioubal::cuda
