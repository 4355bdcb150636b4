// Box decode, encode and IoU over contiguous (R, 4) tensors, a thread per box, in float32.
#pragma once

#include "cuda/device.cuh"
#include "math/iou.h"

namespace ioubal::cuda {

struct BoxTable {
  FloatRef first, second, third;
  FloatOut out;
  int64_t rows;
  Quad<float> weights;
  BoxCoder coder;

  IOUBAL_DEVICE static Quad<float> quad(const FloatRef& ref, int64_t r) {
    return {{static_cast<float>(ref[4 * r]), static_cast<float>(ref[4 * r + 1]), static_cast<float>(ref[4 * r + 2]),
             static_cast<float>(ref[4 * r + 3])}};
  }
  IOUBAL_DEVICE void write(int64_t r, const Quad<float>& value) const {
    for (int j = 0; j < 4; ++j) out.set(4 * r + j, value.v[j]);
  }
};

enum class BoxOp : int { kDecode, kDecodeBackward, kEncode, kIou, kDeltaIou };

template <BoxOp kOp>
__global__ void __launch_bounds__(kThreads) boxes_kernel(const IOUBAL_GRID_CONSTANT BoxTable tb) {
  for (int64_t r = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; r < tb.rows;
       r += static_cast<int64_t>(gridDim.x) * kThreads) {
    const Quad<float> a = BoxTable::quad(tb.first, r), b = BoxTable::quad(tb.second, r);
    if constexpr (kOp == BoxOp::kDecode) tb.write(r, decode_box(a, b, tb.weights, tb.coder));
    if constexpr (kOp == BoxOp::kDecodeBackward) {
      tb.write(r, decode_box_backward(a, b, BoxTable::quad(tb.third, r), tb.weights, tb.coder));
    }
    if constexpr (kOp == BoxOp::kEncode) tb.write(r, encode_box(a, b, tb.weights, tb.coder));
    if constexpr (kOp == BoxOp::kIou) tb.out.set(r, box_iou(a, b));
    if constexpr (kOp == BoxOp::kDeltaIou) tb.out.set(r, delta_iou(a, b, tb.weights, tb.coder));
  }
}

}  // namespace ioubal::cuda
