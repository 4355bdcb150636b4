// Intersection over union of two boxes, from corners or straight from deltas.
#pragma once

#include "math/box.h"

namespace ioubal {

// Overlap of [a1, a2] and [b1, b2]; 0 when apart or inverted.
template <class T>
IOUBAL_HD T interval_overlap(T a1, T a2, T b1, T b2) {
  const T low = select(b1 > a1, b1, a1), high = select(b2 < a2, b2, a2);
  return clamp(high - low, T(0), T(INFINITY));
}

// Areas of inverted boxes count as 0; an empty union gives 0.
template <class T>
IOUBAL_HD T box_iou(const Quad<T>& a, const Quad<T>& b) {
  const T inter = interval_overlap(a.v[0], a.v[2], b.v[0], b.v[2]) * interval_overlap(a.v[1], a.v[3], b.v[1], b.v[3]);
  const T area_a = clamp(a.v[2] - a.v[0], T(0), T(INFINITY)) * clamp(a.v[3] - a.v[1], T(0), T(INFINITY));
  const T area_b = clamp(b.v[2] - b.v[0], T(0), T(INFINITY)) * clamp(b.v[3] - b.v[1], T(0), T(INFINITY));
  const T united = area_a + area_b - inter;
  return select(united == T(0), T(0), inter / united);
}

// Overlap of two intervals of widths w1 and w2 whose centres are `shift` apart.
template <class T>
IOUBAL_HD T centered_overlap(T shift, T w1, T w2) {
  using std::fabs;
  const T narrow = select(w2 < w1, w2, w1), reach = T(0.5) * (w1 + w2) - fabs(shift);
  return clamp(select(narrow < reach, narrow, reach), T(0), T(INFINITY));
}

// IoU of the two boxes that deltas decode to on any one anchor: decoding is a shift and a scale per axis, to which IoU
// is invariant. Sizes and distances are never turned into corners, which would lose them far from the anchor (at
// infinity, a box's width would be NaN).
template <class T, class W>
IOUBAL_HD T delta_iou(const Quad<T>& pred, const Quad<T>& target, const Quad<W>& weights, BoxCoder coder) {
  T inter = T(1), area_p = T(1), area_t = T(1);
  for (int axis = 0; axis < 2; ++axis) {
    const int low = axis, high = axis + 2;
    const T p1 = decode_size(pred.v[high], weights.v[high]), t1 = decode_size(target.v[high], weights.v[high]);
    if (coder == BoxCoder::kFovea) {  // distances from one centre to both sides
      const T p0 = decode_size(pred.v[low], weights.v[low]), t0 = decode_size(target.v[low], weights.v[low]);
      inter *= select(t0 < p0, t0, p0) + select(t1 < p1, t1, p1);
      area_p *= p0 + p1;
      area_t *= t0 + t1;
    } else {
      inter *= centered_overlap(pred.v[low] / weights.v[low] - target.v[low] / weights.v[low], p1, t1);
      area_p *= p1;
      area_t *= t1;
    }
  }
  return inter / (area_p + area_t - inter);
}

}  // namespace ioubal
