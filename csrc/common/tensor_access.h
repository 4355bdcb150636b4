// Reading and writing single elements of stable-ABI tensors of any supported dtype. For the few positives, not for
// dense work.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <vector>

#include "common/sums.h"
#include "math/box.h"

// A function that does nothing but prefetch is free of effects to GCC, which drops its calls; not what is inlined
// first.
#define IOUBAL_PREFETCHES inline __attribute__((always_inline))

namespace ioubal {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using TensorList = std::vector<Tensor>;

// A float tensor's memory: elements in, double out. Offsets are in elements.
class FloatReader {
 public:
  FloatReader() = default;
  explicit FloatReader(const Tensor& t) : data_(t.const_data_ptr()), type_(t.scalar_type()) {}
  double operator[](int64_t offset) const {
    switch (type_) {
      case ScalarType::Float: return static_cast<const float*>(data_)[offset];
      case ScalarType::BFloat16: return static_cast<float>(static_cast<const c10::BFloat16*>(data_)[offset]);
      case ScalarType::Half: return static_cast<float>(static_cast<const c10::Half*>(data_)[offset]);
      default: return static_cast<const double*>(data_)[offset];
    }
  }
  IOUBAL_PREFETCHES void prefetch(int64_t offset) const {
    const int64_t size = type_ == ScalarType::Double ? 8 : type_ == ScalarType::Float ? 4 : 2;
    __builtin_prefetch(static_cast<const char*>(data_) + offset * size);
  }
  Quad<double> quad(int64_t offset, int64_t stride) const {
    return {{(*this)[offset], (*this)[offset + stride], (*this)[offset + 2 * stride], (*this)[offset + 3 * stride]}};
  }

 private:
  const void* data_ = nullptr;
  ScalarType type_ = ScalarType::Double;
};

class FloatWriter {
 public:
  explicit FloatWriter(const Tensor& t) : data_(t.mutable_data_ptr()), type_(t.scalar_type()) {}
  void set(int64_t offset, double value) const {
    switch (type_) {
      case ScalarType::Float: static_cast<float*>(data_)[offset] = static_cast<float>(value); break;
      case ScalarType::BFloat16:
        static_cast<c10::BFloat16*>(data_)[offset] = static_cast<c10::BFloat16>(static_cast<float>(value));
        break;
      case ScalarType::Half:
        static_cast<c10::Half*>(data_)[offset] = static_cast<c10::Half>(static_cast<float>(value));
        break;
      default: static_cast<double*>(data_)[offset] = value;
    }
  }

 private:
  void* data_;
  ScalarType type_;
};

// A tensor of int32 or int64.
class IntReader {
 public:
  explicit IntReader(const Tensor& t) : data_(t.const_data_ptr()), wide_(t.scalar_type() == ScalarType::Long) {}
  int64_t operator[](int64_t offset) const {
    return wide_ ? static_cast<const int64_t*>(data_)[offset] : static_cast<const int32_t*>(data_)[offset];
  }
  IOUBAL_PREFETCHES void prefetch(int64_t offset) const {
    __builtin_prefetch(static_cast<const char*>(data_) + offset * (wide_ ? 8 : 4));
  }
  // f(pointer to the elements), for loops that are worth a copy for either type.
  template <class F>
  auto visit(const F& f) const {
    return wide_ ? f(static_cast<const int64_t*>(data_)) : f(static_cast<const int32_t*>(data_));
  }

 private:
  const void* data_;
  bool wide_;
};

// A tensor that may be absent: then every element is `otherwise`.
class OptionalFloats {
 public:
  OptionalFloats(const OptionalTensor& tensor) {
    if (tensor) reader_.emplace(*tensor);
  }
  explicit operator bool() const { return reader_.has_value(); }
  double get(int64_t offset, double otherwise) const { return reader_ ? (*reader_)[offset] : otherwise; }
  const FloatReader& reader() const { return *reader_; }

 private:
  std::optional<FloatReader> reader_;
};

// The scope of each row's sums; without ids all rows share scope 0.
class Scopes {
 public:
  Scopes(const OptionalTensor& ids, int64_t count) : count_(count) {
    if (ids) reader_.emplace(*ids);
  }
  explicit operator bool() const { return reader_.has_value(); }
  int64_t count() const { return count_; }
  // -1 for an id outside [0, count).
  int64_t get(int64_t row) const {
    const int64_t scope = reader_ ? (*reader_)[row] : 0;
    return scope >= 0 && scope < count_ ? scope : -1;
  }

 private:
  std::optional<IntReader> reader_;
  int64_t count_;
};

// A number that is either known to Python or still in a float tensor: a tensor wins. One value, or one per image.
class Number {
 public:
  Number(const OptionalTensor& tensor, double value) : value_(value) {
    if (tensor) {
      reader_.emplace(*tensor);
      per_image_ = tensor->dim() == 1;
    }
  }
  bool is_tensor() const { return reader_.has_value(); }
  double get(int64_t image = 0) const { return reader_ ? (*reader_)[per_image_ ? image : 0] : value_; }

 private:
  std::optional<FloatReader> reader_;
  bool per_image_ = false;
  double value_;
};

// What a sum is divided by: avg_factor (a tensor, or a number > 0), else the default.
inline double divisor_of(const OptionalTensor& avg_factor, double number, double default_divisor) {
  const Number given(avg_factor, number);
  return given.is_tensor() || number > 0 ? given.get() : default_divisor;
}

inline Sums sums_of(const Tensor& tensor) { return {static_cast<double*>(tensor.mutable_data_ptr())}; }

inline Quad<double> to_quad(const std::vector<double>& values) {
  return {{values[0], values[1], values[2], values[3]}};
}

}  // namespace ioubal
