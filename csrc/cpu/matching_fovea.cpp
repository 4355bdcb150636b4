// FoveaBox: which cells of the levels belong to which gt box. Each level's boxes are painted, the smallest last.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/matching_input.h"

namespace ioubal {
namespace {

constexpr int64_t kGrain = 1 << 13;  // cells

struct FoveaLevel {
  int64_t height, width, first;  // first: its first cell in the image
  double stride, smallest, largest;
};

template <class T>
void match_cells(const MatchBoxes<T>& boxes, const std::vector<FoveaLevel>& levels, double sigma,
                 const IndexWriter& out, int64_t offset) {
  std::vector<int64_t> order(boxes.count());
  for (int64_t g = 0; g < boxes.count(); ++g) order[g] = g;
  // Painted in this order, each cell ends with the box that takes it (takes_cell). A NaN is painted nowhere.
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return is_nan(boxes.area[a]) ? !is_nan(boxes.area[b]) : boxes.area[a] > boxes.area[b];
  });
  const T from = static_cast<T>(1 - sigma), to = static_cast<T>(1 + sigma);
  for (const FoveaLevel& level : levels) {
    out.fill(offset + level.first, level.height * level.width, kUnmatched);
    if (level.height == 0 || level.width == 0) continue;
    const T stride = static_cast<T>(level.stride);
    const T smallest = static_cast<T>(level.smallest * level.smallest);
    const T largest = static_cast<T>(level.largest * level.largest);
    for (const int64_t g : order) {
      if (!is_in_scale(boxes.area[g], smallest, largest)) continue;
      const T* box = boxes.box[g].v;
      const FoveaCells<T> x = fovea_cells(box[0], box[2], stride, from, to, static_cast<T>(level.width));
      const FoveaCells<T> y = fovea_cells(box[1], box[3], stride, from, to, static_cast<T>(level.height));
      const int64_t left = static_cast<int64_t>(x.first), columns = static_cast<int64_t>(x.last) - left + 1;
      if (columns <= 0) continue;
      for (int64_t row = static_cast<int64_t>(y.first); row <= static_cast<int64_t>(y.last); ++row) {
        out.fill(offset + level.first + row * level.width + left, columns, boxes.index[g]);
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
  const bool wide = any_float64(gt_boxes);
  torch::stable::parallel_for(0, images, std::max<int64_t>(kGrain / (cells + 1), 1), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      if (wide) {
        match_cells(match_boxes<double>(gt_boxes, gt_labels, n), levels, sigma, out, n * cells);
      } else {
        match_cells(match_boxes<float>(gt_boxes, gt_labels, n), levels, sigma, out, n * cells);
      }
    }
  });
}

}  // namespace
}  // namespace ioubal

STABLE_TORCH_LIBRARY_IMPL(ioubal, CPU, m) { m.impl("match_fovea.cpp", TORCH_BOX(&ioubal::match_fovea)); }
