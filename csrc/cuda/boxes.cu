// Box decode, encode and IoU on CUDA.
#include "cuda/boxes.cuh"

#include "cuda/launch.h"

namespace ioubal::cuda {
namespace {

template <BoxOp kOp>
void run(const Tensor& first, const Tensor& second, const FloatRef& third, const std::vector<double>& weights,
         int64_t coder, const Tensor& out) {
  BoxTable tb;
  tb.first = float_ref(first);
  tb.second = float_ref(second);
  tb.third = third;
  tb.out = float_out(out);
  tb.rows = first.numel() / 4;
  for (int j = 0; j < 4; ++j) tb.weights.v[j] = weights.empty() ? 1.f : static_cast<float>(weights[j]);
  tb.coder = static_cast<BoxCoder>(coder);
  const OnDevice device(first);
  const int64_t blocks = (tb.rows + kThreads - 1) / kThreads;
  device.launch(boxes_kernel<kOp>, static_cast<u32>(std::min<int64_t>(blocks, 1 << 20)), tb);
}

const FloatRef kAbsent = {nullptr, Dtype::kFloat32};

void decode_boxes(Tensor deltas, Tensor anchors, std::vector<double> weights, int64_t coder, Tensor out) {
  run<BoxOp::kDecode>(deltas, anchors, kAbsent, weights, coder, out);
}

void decode_boxes_backward(Tensor grad_output, Tensor deltas, Tensor anchors, std::vector<double> weights,
                           int64_t coder, Tensor grad) {
  run<BoxOp::kDecodeBackward>(grad_output, deltas, float_ref(anchors), weights, coder, grad);
}

void encode_boxes(Tensor boxes, Tensor anchors, std::vector<double> weights, int64_t coder, Tensor out) {
  run<BoxOp::kEncode>(boxes, anchors, kAbsent, weights, coder, out);
}

void paired_box_iou(Tensor boxes1, Tensor boxes2, Tensor out) { run<BoxOp::kIou>(boxes1, boxes2, kAbsent, {}, 0, out); }

void delta_iou_op(Tensor pred, Tensor target, std::vector<double> weights, int64_t coder, Tensor out) {
  run<BoxOp::kDeltaIou>(pred, target, kAbsent, weights, coder, out);
}

}  // namespace
}  // namespace ioubal::cuda

STABLE_TORCH_LIBRARY_IMPL(ioubal, IOUBAL_CUDA_KEY, m) {
  m.impl(IOUBAL_CUDA_OP("decode_boxes"), TORCH_BOX(&ioubal::cuda::decode_boxes));
  m.impl(IOUBAL_CUDA_OP("decode_boxes_backward"), TORCH_BOX(&ioubal::cuda::decode_boxes_backward));
  m.impl(IOUBAL_CUDA_OP("encode_boxes"), TORCH_BOX(&ioubal::cuda::encode_boxes));
  m.impl(IOUBAL_CUDA_OP("paired_box_iou"), TORCH_BOX(&ioubal::cuda::paired_box_iou));
  m.impl(IOUBAL_CUDA_OP("delta_iou"), TORCH_BOX(&ioubal::cuda::delta_iou_op));
}
