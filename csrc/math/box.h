// Box coders. Boxes are x1 y1 x2 y2 with width x2 - x1; deltas are multiplied by the coder's weights.
#pragma once

#include "math/macros.h"

namespace ioubal {

enum class BoxCoder : int { kDelta = 0, kFovea = 1 };

// log(1000 / 16): the largest |dw|, |dh| (delta coder) or |log-distance| (fovea coder) that is exponentiated.
template <class T>
IOUBAL_HD constexpr T max_log_ratio() {
  return T(4.135166556742356);
}

// The fovea coder's targets lie in 1/16 .. 16 times the base size.
template <class T>
IOUBAL_HD constexpr T max_fovea_distance() {
  return T(16);
}

template <class T>
struct Quad {
  T v[4];
};

// Below, W is T or what T can be divided by and turns into.

// A size, or one of the fovea coder's distances, in units of the anchor's.
template <class T, class W>
IOUBAL_HD T decode_size(T delta, W weight) {
  using std::exp;
  return exp(clamp(delta / weight, -max_log_ratio<T>(), max_log_ratio<T>()));
}

template <class T, class W>
IOUBAL_HD Quad<T> decode_box(const Quad<T>& deltas, const Quad<T>& anchor, const Quad<W>& weights, BoxCoder coder) {
  const T width = anchor.v[2] - anchor.v[0], height = anchor.v[3] - anchor.v[1];
  const T center_x = anchor.v[0] + T(0.5) * width, center_y = anchor.v[1] + T(0.5) * height;
  if (coder == BoxCoder::kFovea) {
    const T left = width * decode_size(deltas.v[0], weights.v[0]);
    const T top = height * decode_size(deltas.v[1], weights.v[1]);
    const T right = width * decode_size(deltas.v[2], weights.v[2]);
    const T bottom = height * decode_size(deltas.v[3], weights.v[3]);
    return {{center_x - left, center_y - top, center_x + right, center_y + bottom}};
  }
  const T x = center_x + deltas.v[0] / weights.v[0] * width, y = center_y + deltas.v[1] / weights.v[1] * height;
  const T half_w = T(0.5) * width * decode_size(deltas.v[2], weights.v[2]);
  const T half_h = T(0.5) * height * decode_size(deltas.v[3], weights.v[3]);
  return {{x - half_w, y - half_h, x + half_w, y + half_h}};
}

// Gradient of decode_box with respect to the deltas, given the gradient of the box.
template <class T, class W>
IOUBAL_HD Quad<T> decode_box_backward(const Quad<T>& grad, const Quad<T>& deltas, const Quad<T>& anchor,
                                      const Quad<W>& weights, BoxCoder coder) {
  const T size[2] = {anchor.v[2] - anchor.v[0], anchor.v[3] - anchor.v[1]};
  using std::exp;
  const T limit = max_log_ratio<T>();
  Quad<T> out;
  for (int axis = 0; axis < 2; ++axis) {
    const T low = grad.v[axis], high = grad.v[axis + 2];
    const W w0 = weights.v[axis], w1 = weights.v[axis + 2];
    const T t0 = deltas.v[axis] / w0, t1 = deltas.v[axis + 2] / w1;
    // Beyond the clamp the box does not move: gradient 0 (NaN deltas stay NaN).
    const auto slope = [&](T t, W w) {
      return choose((t > limit) | (t < -limit), [] { return T(0); }, [&] { return size[axis] * exp(t) / w; });
    };
    const T slope1 = slope(t1, w1);
    if (coder == BoxCoder::kFovea) {
      const T slope0 = slope(t0, w0);
      out.v[axis] = -low * slope0;
      out.v[axis + 2] = high * slope1;
    } else {
      out.v[axis] = (low + high) * size[axis] / w0;
      out.v[axis + 2] = T(0.5) * (high - low) * slope1;
    }
  }
  return out;
}

// Distances are taken between corners before anything is added to them: coordinates are large beside their differences,
// and float32 would lose the difference of two centres.
template <class T, class W>
IOUBAL_HD Quad<T> encode_box(const Quad<T>& box, const Quad<T>& anchor, const Quad<W>& weights, BoxCoder coder) {
  using std::log;
  const T width = anchor.v[2] - anchor.v[0], height = anchor.v[3] - anchor.v[1];
  const T left = anchor.v[0] - box.v[0], top = anchor.v[1] - box.v[1];
  const T right = box.v[2] - anchor.v[2], bottom = box.v[3] - anchor.v[3];
  if (coder == BoxCoder::kFovea) {
    const T high = max_fovea_distance<T>(), low = T(1) / high;
    return {{weights.v[0] * log(clamp((left + T(0.5) * width) / width, low, high)),
             weights.v[1] * log(clamp((top + T(0.5) * height) / height, low, high)),
             weights.v[2] * log(clamp((right + T(0.5) * width) / width, low, high)),
             weights.v[3] * log(clamp((bottom + T(0.5) * height) / height, low, high))}};
  }
  const T box_w = box.v[2] - box.v[0], box_h = box.v[3] - box.v[1];
  return {{weights.v[0] * (T(0.5) * (right - left)) / width, weights.v[1] * (T(0.5) * (bottom - top)) / height,
           weights.v[2] * log(box_w / width), weights.v[3] * log(box_h / height)}};
}

// True when a side is not positive. NaN is not degenerate: it must reach the loss.
template <class T>
IOUBAL_HD bool is_degenerate(const Quad<T>& box) {
  return box.v[2] - box.v[0] <= T(0) || box.v[3] - box.v[1] <= T(0);
}

}  // namespace ioubal
