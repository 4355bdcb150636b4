// Intersection over union of two boxes, from corners or straight from deltas.
#pragma once

#include "math/box.h"

namespace ioubal {

// Overlap of [a1, a2] and [b1, b2]; 0 when apart or inverted.
template <class T>
IOUBAL_HD T interval_overlap(T a1, T a2, T b1, T b2) {
  const T low = b1 > a1 ? b1 : a1, high = b2 < a2 ? b2 : a2;
  return clamp(high - low, T(0), T(INFINITY));
}

// Areas of inverted boxes count as 0; an empty union gives 0.
template <class T>
IOUBAL_HD T box_iou(const Quad<T>& a, const Quad<T>& b) {
  const T inter = interval_overlap(a.v[0], a.v[2], b.v[0], b.v[2]) * interval_overlap(a.v[1], a.v[3], b.v[1], b.v[3]);
  const T area_a = clamp(a.v[2] - a.v[0], T(0), T(INFINITY)) * clamp(a.v[3] - a.v[1], T(0), T(INFINITY));
  const T area_b = clamp(b.v[2] - b.v[0], T(0), T(INFINITY)) * clamp(b.v[3] - b.v[1], T(0), T(INFINITY));
  const T united = area_a + area_b - inter;
  return united == T(0) ? T(0) : inter / united;
}

// IoU of the two decoded boxes. Decoding is a shift and a scale per axis, to which IoU is invariant: decode on the unit
// anchor, no anchor needed.
template <class T>
IOUBAL_HD T delta_iou(const Quad<T>& pred, const Quad<T>& target, const Quad<T>& weights, BoxCoder coder) {
  const Quad<T> unit = {{T(-0.5), T(-0.5), T(0.5), T(0.5)}};
  return box_iou(decode_box(pred, unit, weights, coder), decode_box(target, unit, weights, coder));
}

}  // namespace ioubal
