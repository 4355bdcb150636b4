// Which box an anchor or a cell belongs to: the decisions of torchvision's box_iou + Matcher and of FoveaBox.
//
// Decisions compare for equality with torch's own results, so every operation here is rounded by itself: no product may
// be contracted into a multiply-add. What includes this file is compiled with -ffp-contract=off; on a GPU the
// intrinsics below are never contracted, whatever the flags.
#pragma once

#include "math/box.h"

namespace ioubal {

#if defined(__CUDA_ARCH__)
IOUBAL_HD float rounded_product(float a, float b) { return __fmul_rn(a, b); }
IOUBAL_HD float rounded_quotient(float a, float b) { return __fdiv_rn(a, b); }
IOUBAL_HD double rounded_product(double a, double b) { return __dmul_rn(a, b); }
IOUBAL_HD double rounded_quotient(double a, double b) { return __ddiv_rn(a, b); }
#else
template <class T>
IOUBAL_HD T rounded_product(T a, T b) {
  return a * b;
}
template <class T>
IOUBAL_HD T rounded_quotient(T a, T b) {
  return a / b;
}
#endif

template <class T>
IOUBAL_HD bool is_nan(T value) {
  return value != value;
}

// ------------------------------------------------------------------------------------------------------------- boxes

// A place of a padded tensor that holds no box; a label of kNoLabel says the same.
template <class T>
IOUBAL_HD bool is_padding(const Quad<T>& box) {
  return is_nan(box.v[0]) || is_nan(box.v[1]) || is_nan(box.v[2]) || is_nan(box.v[3]);
}
constexpr int64_t kNoLabel = -1;

// Negative where one side is inverted, NaN where a coordinate is.
template <class T>
IOUBAL_HD T matching_area(const Quad<T>& box) {
  return rounded_product(box.v[2] - box.v[0], box.v[3] - box.v[1]);
}

// torchvision's IoU, operation by operation. 0 / 0 and infinite areas give NaN; a NaN coordinate does through its area,
// so min and max need not care for it. regular: box and anchor are (see "culling"), and an IoU of 0 needs no division.
template <class T>
IOUBAL_HD T matching_iou(const Quad<T>& box, T box_area, const Quad<T>& anchor, T anchor_area, bool regular = false) {
  const T x1 = box.v[0] > anchor.v[0] ? box.v[0] : anchor.v[0], x2 = box.v[2] < anchor.v[2] ? box.v[2] : anchor.v[2];
  const T y1 = box.v[1] > anchor.v[1] ? box.v[1] : anchor.v[1], y2 = box.v[3] < anchor.v[3] ? box.v[3] : anchor.v[3];
  const T width = x2 - x1, height = y2 - y1;
  const T overlap = rounded_product(width > T(0) ? width : T(0), height > T(0) ? height : T(0));
  if (regular && overlap == T(0)) return T(0);
  return rounded_quotient(overlap, box_area + anchor_area - overlap);
}

// Whether `iou` takes the place of `best`, which came earlier: the rule of torch's max. Ties stay with the earlier one;
// a NaN is above every number, and the first NaN stays.
template <class T>
IOUBAL_HD bool takes_over(T iou, T best) {
  return !(iou <= best) && !is_nan(best);
}

// --------------------------------------------------------------------------------------------------------- thresholds

constexpr int64_t kUnmatched = -1, kBetween = -2;

// Thresholds are compared in the IoU's type, as torch does. A NaN is below no threshold.
template <class T>
IOUBAL_HD int64_t matched_index(T iou, int64_t index, T high, T low) {
  return iou < low ? kUnmatched : (iou < high ? kBetween : index);
}

// ------------------------------------------------------------------------------------------------------------ culling
//
// A box and a block of anchors that do not overlap have IoUs of exactly +0 with each other, and need not be computed,
// if
//   - each side of each anchor is longer than shortest_side: then every anchor's area is positive (and may be
//   infinite);
//   - the box's area is 0 or positive, and finite: then no overlap is 0 * infinity, and every union is positive.
// Anything else is computed pair by pair.

template <class T>
IOUBAL_HD constexpr T shortest_side() {
  return T(8.6736173798840355e-19);  // 2^-60: its square is a normal number
}

template <class T>
IOUBAL_HD bool is_regular_anchor(const Quad<T>& anchor) {
  return anchor.v[2] - anchor.v[0] > shortest_side<T>() && anchor.v[3] - anchor.v[1] > shortest_side<T>();
}

template <class T>
IOUBAL_HD bool is_regular_box(T area) {
  return area >= T(0) && area < T(INFINITY);
}

// ------------------------------------------------------------------------------------------------------------ FoveaBox

// Whether a level of sizes smallest .. largest takes a box: its size is the root of its area, so areas are compared
// with the bounds' squares. An infinite area is no size.
template <class T>
IOUBAL_HD bool is_in_scale(T area, T smallest_squared, T largest_squared) {
  return area >= smallest_squared && area <= largest_squared && area < T(INFINITY);
}

// Cells first .. last of one axis whose centres lie in the box shrunk by sigma, clamped to the map; none if first >
// last.
template <class T>
struct FoveaCells {
  T first, last;
};

// low, high: the box's side, in pixels. from, to: 1 - sigma and 1 + sigma.
template <class T>
IOUBAL_HD FoveaCells<T> fovea_cells(T low, T high, T stride, T from, T to, T cells) {
  low = rounded_quotient(low, stride);
  const T half = rounded_product(T(0.5), rounded_quotient(high, stride) - low);
  return {clamp(std::ceil(low + rounded_product(from, half) - T(0.5)), T(0), cells - T(1)),
          clamp(std::floor(low + rounded_product(to, half) - T(0.5)), T(0), cells - T(1))};
}

// Whether a box takes a cell from the one that has it, which came earlier: the smallest box wins, of equal ones the
// last.
template <class T>
IOUBAL_HD bool takes_cell(T area, T current_area) {
  return area <= current_area;
}

}  // namespace ioubal
