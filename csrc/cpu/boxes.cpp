// Box decode, encode and IoU over contiguous (R, 4) tensors, element by element in double.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/tensor_access.h"
#include "math/iou.h"

namespace ioubal {
namespace {

constexpr int64_t kGrain = 1 << 13;

template <class F>
void for_boxes(const Tensor& t, const F& f) {
  torch::stable::parallel_for(0, t.numel() / 4, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) f(r);
  });
}

void write(const FloatWriter& out, int64_t r, const Quad<double>& value) {
  for (int j = 0; j < 4; ++j) out.set(4 * r + j, value.v[j]);
}

void decode_boxes(Tensor deltas, Tensor anchors, std::vector<double> weights, int64_t coder, Tensor out) {
  const FloatReader d(deltas), a(anchors);
  const FloatWriter boxes(out);
  const Quad<double> w = to_quad(weights);
  for_boxes(deltas, [&](int64_t r) {
    write(boxes, r, decode_box(d.quad(4 * r, 1), a.quad(4 * r, 1), w, static_cast<BoxCoder>(coder)));
  });
}

void decode_boxes_backward(Tensor grad_output, Tensor deltas, Tensor anchors, std::vector<double> weights,
                           int64_t coder, Tensor grad) {
  const FloatReader g(grad_output), d(deltas), a(anchors);
  const FloatWriter out(grad);
  const Quad<double> w = to_quad(weights);
  for_boxes(deltas, [&](int64_t r) {
    write(out, r,
          decode_box_backward(g.quad(4 * r, 1), d.quad(4 * r, 1), a.quad(4 * r, 1), w, static_cast<BoxCoder>(coder)));
  });
}

void encode_boxes(Tensor boxes, Tensor anchors, std::vector<double> weights, int64_t coder, Tensor out) {
  const FloatReader b(boxes), a(anchors);
  const FloatWriter deltas(out);
  const Quad<double> w = to_quad(weights);
  for_boxes(boxes, [&](int64_t r) {
    write(deltas, r, encode_box(b.quad(4 * r, 1), a.quad(4 * r, 1), w, static_cast<BoxCoder>(coder)));
  });
}

void paired_box_iou(Tensor boxes1, Tensor boxes2, Tensor out) {
  const FloatReader a(boxes1), b(boxes2);
  const FloatWriter iou(out);
  for_boxes(boxes1, [&](int64_t r) { iou.set(r, box_iou(a.quad(4 * r, 1), b.quad(4 * r, 1))); });
}

void delta_iou_op(Tensor pred, Tensor target, std::vector<double> weights, int64_t coder, Tensor out) {
  const FloatReader p(pred), t(target);
  const FloatWriter iou(out);
  const Quad<double> w = to_quad(weights);
  for_boxes(pred, [&](int64_t r) {
    iou.set(r, delta_iou(p.quad(4 * r, 1), t.quad(4 * r, 1), w, static_cast<BoxCoder>(coder)));
  });
}

}  // namespace
}  // namespace ioubal

STABLE_TORCH_LIBRARY_IMPL(ioubal, CPU, m) {
  m.impl("decode_boxes.cpp", TORCH_BOX(&ioubal::decode_boxes));
  m.impl("decode_boxes_backward.cpp", TORCH_BOX(&ioubal::decode_boxes_backward));
  m.impl("encode_boxes.cpp", TORCH_BOX(&ioubal::encode_boxes));
  m.impl("paired_box_iou.cpp", TORCH_BOX(&ioubal::paired_box_iou));
  m.impl("delta_iou.cpp", TORCH_BOX(&ioubal::delta_iou_op));
}
