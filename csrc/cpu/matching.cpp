// Matching of anchors and cells with gt boxes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "common/tensor_access.h"
#include "math/matching.h"

namespace ioubal {
namespace {

constexpr int64_t kGrain = 1 << 13;

// The boxes of one image without the padded places.
template <class T>
struct Boxes {
  std::vector<Quad<T>> box;
  std::vector<T> area;
  std::vector<int64_t> index;  // within the image
  int64_t count() const { return static_cast<int64_t>(index.size()); }
};

template <class T>
Boxes<T> boxes_of(const TensorList& gt_boxes, const TensorList& gt_labels, int64_t image) {
  const bool padded = gt_boxes.size() == 1 && gt_boxes[0].dim() == 3;
  const Tensor& boxes = gt_boxes[padded ? 0 : image];
  const int64_t places = boxes.size(padded ? 1 : 0), first = padded ? image * places : 0;
  const FloatReader reader(boxes);
  Boxes<T> result;
  for (int64_t g = 0; g < places; ++g) {
    if (!gt_labels.empty() && IntReader(gt_labels[padded ? 0 : image])[first + g] == kNoLabel) continue;
    const Quad<double> wide = reader.quad(4 * (first + g), 1);
    Quad<T> box;
    for (int j = 0; j < 4; ++j) box.v[j] = static_cast<T>(wide.v[j]);
    if (is_padding(box)) continue;
    result.box.push_back(box);
    result.area.push_back(matching_area(box));
    result.index.push_back(g);
  }
  return result;
}

class IndexWriter {
 public:
  explicit IndexWriter(const Tensor& t) : data_(t.mutable_data_ptr()), wide_(t.scalar_type() == ScalarType::Long) {}
  void set(int64_t offset, int64_t value) const {
    if (wide_) {
      static_cast<int64_t*>(data_)[offset] = value;
    } else {
      static_cast<int32_t*>(data_)[offset] = static_cast<int32_t>(value);
    }
  }

 private:
  void* data_;
  bool wide_;
};

template <class T>
void match_image(const FloatReader& anchors, int64_t first, int64_t rows, const Boxes<T>& boxes, T high, T low,
                 bool allow_low_quality, bool force_best, const IndexWriter& out, int64_t offset) {
  std::vector<T> highest(boxes.count(), T(-1));
  std::vector<int64_t> best_anchor(boxes.count(), 0);
  const auto anchor = [&](int64_t r) {
    const Quad<double> wide = anchors.quad(4 * (first + r), 1);
    return Quad<T>{
        {static_cast<T>(wide.v[0]), static_cast<T>(wide.v[1]), static_cast<T>(wide.v[2]), static_cast<T>(wide.v[3])}};
  };
  for (int pass = 0; pass < (allow_low_quality ? 2 : 1); ++pass) {
    for (int64_t r = 0; r < rows; ++r) {
      const Quad<T> a = anchor(r);
      const T area = matching_area(a);
      T best = T(-1);
      int64_t index = kUnmatched;
      bool restored = false;
      for (int64_t g = 0; g < boxes.count(); ++g) {
        const T iou = matching_iou(boxes.box[g], boxes.area[g], a, area);
        if (takes_over(iou, best)) {
          best = iou;
          index = boxes.index[g];
        }
        if (pass == 0 && takes_over(iou, highest[g])) {
          highest[g] = iou;
          best_anchor[g] = r;
        }
        restored |= pass == 1 && iou == highest[g];
      }
      if (pass == 0) out.set(offset + r, boxes.count() ? matched_index(best, index, high, low) : kUnmatched);
      if (restored) out.set(offset + r, index);
    }
  }
  if (!force_best || rows == 0) return;
  for (int64_t g = 0; g < boxes.count(); ++g) out.set(offset + best_anchor[g], boxes.index[g]);
}

template <class T>
void match_batch(const Tensor& anchors, const TensorList& gt_boxes, const TensorList& gt_labels, double high,
                 double low, bool allow_low_quality, bool force_best, const Tensor& matched_idxs) {
  const int64_t images = matched_idxs.size(0), rows = matched_idxs.size(1);
  const FloatReader reader(anchors);
  const IndexWriter out(matched_idxs);
  torch::stable::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      match_image<T>(reader, anchors.dim() == 3 ? n * rows : 0, rows, boxes_of<T>(gt_boxes, gt_labels, n),
                     static_cast<T>(high), static_cast<T>(low), allow_low_quality, force_best, out, n * rows);
    }
  });
}

bool in_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

void match_anchors(Tensor anchors, TensorList gt_boxes, TensorList gt_labels, double high, double low,
                   bool allow_low_quality, bool force_best, Tensor matched_idxs, TensorList workspace) {
  (void)workspace;
  const bool wide = in_double(anchors) || (!gt_boxes.empty() && in_double(gt_boxes[0]));
  const auto run = wide ? match_batch<double> : match_batch<float>;
  run(anchors, gt_boxes, gt_labels, high, low, allow_low_quality, force_best, matched_idxs);
}

struct FoveaLevel {
  int64_t height, width, first;  // first: its first cell in the image
  double stride, smallest, largest;
};

template <class T>
void match_cells(const Boxes<T>& boxes, const std::vector<FoveaLevel>& levels, double sigma, const IndexWriter& out,
                 int64_t offset) {
  std::vector<int64_t> order(boxes.count());
  for (int64_t g = 0; g < boxes.count(); ++g) order[g] = g;
  // Painted in this order, each cell ends with the box that takes it (takes_cell). A NaN is painted nowhere.
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return is_nan(boxes.area[a]) ? !is_nan(boxes.area[b]) : boxes.area[a] > boxes.area[b];
  });
  const T from = static_cast<T>(1 - sigma), to = static_cast<T>(1 + sigma);
  for (const FoveaLevel& level : levels) {
    for (int64_t cell = 0; cell < level.height * level.width; ++cell) out.set(offset + level.first + cell, kUnmatched);
    if (level.height == 0 || level.width == 0) continue;
    const T smallest = static_cast<T>(level.smallest * level.smallest);
    const T largest = static_cast<T>(level.largest * level.largest);
    for (const int64_t g : order) {
      if (!is_in_scale(boxes.area[g], smallest, largest)) continue;
      const T* box = boxes.box[g].v;
      const T stride = static_cast<T>(level.stride);
      const FoveaCells<T> x = fovea_cells(box[0], box[2], stride, from, to, static_cast<T>(level.width));
      const FoveaCells<T> y = fovea_cells(box[1], box[3], stride, from, to, static_cast<T>(level.height));
      for (int64_t row = static_cast<int64_t>(y.first); row <= static_cast<int64_t>(y.last); ++row) {
        for (int64_t column = static_cast<int64_t>(x.first); column <= static_cast<int64_t>(x.last); ++column) {
          out.set(offset + level.first + row * level.width + column, boxes.index[g]);
        }
      }
    }
  }
}

void match_fovea(TensorList gt_boxes, TensorList gt_labels, std::vector<int64_t> heights, std::vector<int64_t> widths,
                 std::vector<int64_t> strides, std::vector<double> min_sizes, std::vector<double> max_sizes,
                 double sigma, Tensor matched_idxs) {
  const int64_t images = matched_idxs.size(0), cells = matched_idxs.size(1);
  std::vector<FoveaLevel> levels;
  int64_t first = 0;
  for (size_t i = 0; i < heights.size(); ++i) {
    levels.push_back({heights[i], widths[i], first, static_cast<double>(strides[i]), min_sizes[i], max_sizes[i]});
    first += heights[i] * widths[i];
  }
  const IndexWriter out(matched_idxs);
  const bool wide = !gt_boxes.empty() && in_double(gt_boxes[0]);
  torch::stable::parallel_for(0, images, std::max<int64_t>(kGrain / (cells + 1), 1), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      if (wide) {
        match_cells(boxes_of<double>(gt_boxes, gt_labels, n), levels, sigma, out, n * cells);
      } else {
        match_cells(boxes_of<float>(gt_boxes, gt_labels, n), levels, sigma, out, n * cells);
      }
    }
  });
}

}  // namespace
}  // namespace ioubal

STABLE_TORCH_LIBRARY_IMPL(ioubal, CPU, m) {
  m.impl("match_anchors.cpp", TORCH_BOX(&ioubal::match_anchors));
  m.impl("match_fovea.cpp", TORCH_BOX(&ioubal::match_fovea));
}
