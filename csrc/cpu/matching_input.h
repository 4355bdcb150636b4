// Reading the boxes of an image and writing indices, for the ops of matching.
#pragma once

#include <limits>

#include "common/tensor_access.h"
#include "cpu/matching.h"

namespace ioubal {

// The boxes of one image, from a list over images or from a padded tensor, without the places that hold none.
template <class T>
MatchBoxes<T> match_boxes(const TensorList& gt_boxes, const TensorList& gt_labels, int64_t image) {
  const bool padded = gt_boxes.size() == 1 && gt_boxes[0].dim() == 3;
  const Tensor& boxes = gt_boxes[padded ? 0 : image];
  const int64_t places = boxes.size(padded ? 1 : 0), first = padded ? image * places : 0;
  const FloatReader reader(boxes);
  const T infinity = std::numeric_limits<T>::infinity();
  MatchBoxes<T> result;
  const auto bounds = [&](const Quad<T>& box) {
    result.x1.push_back(box.v[0]);
    result.y1.push_back(box.v[1]);
    result.x2.push_back(box.v[2]);
    result.y2.push_back(box.v[3]);
  };
  for (int64_t g = 0; g < places; ++g) {
    if (!gt_labels.empty() && IntReader(gt_labels[padded ? 0 : image])[first + g] == kNoLabel) continue;
    const Quad<double> wide = reader.quad(4 * (first + g), 1);
    Quad<T> box;
    for (int j = 0; j < 4; ++j) box.v[j] = static_cast<T>(wide.v[j]);
    if (is_padding(box)) continue;
    result.box.push_back(box);
    result.area.push_back(matching_area(box));
    result.index.push_back(static_cast<int32_t>(g));
    bounds(is_regular_box(result.area.back()) ? box : Quad<T>{{-infinity, -infinity, infinity, infinity}});
  }
  while (result.x1.size() % kMatchLanes) bounds({{infinity, infinity, -infinity, -infinity}});
  return result;
}

// matched_idxs, int32 or int64.
class IndexWriter {
 public:
  explicit IndexWriter(const Tensor& t) : data_(t.mutable_data_ptr()), wide_(t.scalar_type() == ScalarType::Long) {}
  bool wide() const { return wide_; }
  int32_t* narrow_data(int64_t offset) const { return static_cast<int32_t*>(data_) + offset; }
  int64_t* wide_data(int64_t offset) const { return static_cast<int64_t*>(data_) + offset; }
  void set(int64_t offset, int64_t value) const {
    if (wide_) {
      *wide_data(offset) = value;
    } else {
      *narrow_data(offset) = static_cast<int32_t>(value);
    }
  }
  void fill(int64_t offset, int64_t count, int64_t value) const {
    if (wide_) {
      std::fill_n(wide_data(offset), count, value);
    } else {
      std::fill_n(narrow_data(offset), count, static_cast<int32_t>(value));
    }
  }

 private:
  void* data_;
  bool wide_;
};

inline bool is_float64(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

// Whether boxes are computed in double.
inline bool any_float64(const TensorList& boxes) { return !boxes.empty() && is_float64(boxes[0]); }

}  // namespace ioubal
