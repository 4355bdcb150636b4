// Value checks that Python turns into errors, and the choice of the kernels.
#include "cpu/checks.h"

#include <torch/csrc/stable/library.h>

#include "cpu/focal_table.h"
#include "cpu/isa.h"
#include "cpu/scan.h"

namespace ioubal {
namespace {

template <class Int>
int64_t first_outside(const Int* values, int64_t count, int64_t low, int64_t high) {
  constexpr int64_t kStride = 64;
  for (int64_t i = 0; i < count; i += kStride) {
    const int64_t end = i + kStride < count ? i + kStride : count;
    bool bad = false;
    for (int64_t j = i; j < end; ++j) bad |= values[j] < low || values[j] >= high;
    if (!bad) continue;
    for (int64_t j = i; j < end; ++j) {
      if (values[j] < low || values[j] >= high) return j;
    }
  }
  return -1;
}

}  // namespace

int64_t check_labels(Tensor labels, int64_t num_classes, int64_t min_label) {
  const int64_t count = labels.numel();
  return IntReader(labels).visit(
      [&](const auto* values) { return first_outside(values, count, min_label, num_classes); });
}

namespace {

// Flat index of the first matched index that is below -2, past its image's boxes, or whose box has no class in
// [0, num_classes); or -1.
int64_t check_matched_idxs(Tensor matched_idxs, TensorList gt_labels, int64_t num_classes) {
  const int64_t images = matched_idxs.size(0), anchors = matched_idxs.size(1);
  const bool padded = gt_labels.size() == 1 && gt_labels[0].dim() == 2;
  std::vector<IntReader> labels(gt_labels.begin(), gt_labels.end());
  for (const Exceptional& e : find_exceptional(IntReader(matched_idxs), images * anchors, kBackground)) {
    if (e.value == kIgnore) continue;
    const int64_t image = e.index / anchors;
    const int64_t boxes = padded ? gt_labels[0].size(1) : gt_labels[image].size(0);
    if (e.value < 0 || e.value >= boxes) return e.index;
    const int64_t label = padded ? labels[0][image * boxes + e.value] : labels[image][e.value];
    if (label < 0 || label >= num_classes) return e.index;
  }
  return -1;
}

int64_t cpu_isa(int64_t limit) { return set_isa_limit(static_cast<int>(limit)); }

int64_t cpu_table(int64_t entries) { return set_table_threshold(entries); }
}  // namespace

}  // namespace ioubal

STABLE_TORCH_LIBRARY_IMPL(ioubal, CPU, m) {
  m.impl("check_labels.cpp", TORCH_BOX(&ioubal::check_labels));
  m.impl("check_matched_idxs.cpp", TORCH_BOX(&ioubal::check_matched_idxs));
}

STABLE_TORCH_LIBRARY_IMPL(ioubal, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&ioubal::cpu_isa));
  m.impl("cpu_table", TORCH_BOX(&ioubal::cpu_table));
}
