// Value checks that Python turns into errors.
#pragma once

#include "common/tensor_access.h"

namespace ioubal {

// Flat index of the first label outside [min_label, num_classes), or -1.
int64_t check_labels(Tensor labels, int64_t num_classes, int64_t min_label);

// The next tensors of a packed list of arguments: a small call spends most of its time on passing arguments one by one.
class __attribute__((visibility("hidden"))) Unpacker {
 public:
  explicit Unpacker(const TensorList& list) : at_(list.data()) {}
  const Tensor& one() { return *at_++; }
  OptionalTensor optional(bool present) { return present ? OptionalTensor(one()) : std::nullopt; }
  TensorList list(int64_t count) {
    at_ += count;
    return TensorList(at_ - count, at_);
  }

 private:
  const Tensor* at_;
};

}  // namespace ioubal
