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

// The packed arguments that the classification losses of rows share. read: logits, labels, iou, and those present of
// weight, scope_ids, avg_factor, grad_scale. written: sums, loss, and the gradient if it is wanted.
struct __attribute__((visibility("hidden"))) PackedRows {
  Tensor logits, labels, iou;
  OptionalTensor weight, scope_ids, avg_factor, grad_scale;
  int64_t num_scopes;
  Tensor sums, loss;
  TensorList grads;
  int64_t first_bad = -1;  // label or scope, where they are to be checked: of those in [min_label, columns)

  PackedRows(const TensorList& read, const TensorList& written, const std::vector<int64_t>& integers,
             int64_t min_label) {
    enum : int { kNumScopes, kCheck, kHasWeight, kHasScopeIds, kHasAvgFactor, kHasScale };
    Unpacker from(read), to(written);
    logits = from.one(), labels = from.one(), iou = from.one();
    weight = from.optional(integers[kHasWeight]), scope_ids = from.optional(integers[kHasScopeIds]);
    avg_factor = from.optional(integers[kHasAvgFactor]), grad_scale = from.optional(integers[kHasScale]);
    num_scopes = integers[kNumScopes];
    sums = to.one(), loss = to.one(), grads = to.list(written.size() - 2);
    if (!integers[kCheck]) return;
    first_bad = check_labels(labels, logits.size(1), min_label);
    if (first_bad < 0 && scope_ids) first_bad = check_labels(*scope_ids, num_scopes, 0);
  }
};

}  // namespace ioubal
