// Box decode, encode and IoU over contiguous (R, 4) tensors of any mix of dtypes, computed in double.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/tensor_access.h"
#include "cpu/box_tiles.h"

namespace ioubal {

const BoxKernels& box_kernels() {
  const int isa = kernels().isa;
#if defined(__x86_64__)
  if (isa >= 4) return avx512_box_kernels();
  if (isa >= 2) return avx2_box_kernels();
#endif
  (void)isa;
  return portable_box_kernels();
}

namespace {

constexpr int64_t kGrain = 1 << 13;

// f(first row, rows, tiles for what it reads, values to fill) for all tiles of `out`, which has that many columns.
template <class F>
void fill_tiles(const Tensor& out, int64_t columns, const F& f) {
  const RowWriter writer(out, columns);
  torch::stable::parallel_for(0, out.numel() / columns, kGrain, [&](int64_t begin, int64_t end) {
    BoxTile in[3], filled;
    for_tiles(begin, end, [&](int64_t first, int64_t rows) {
      f(first, rows, in, filled.v);
      writer.write(first, rows, filled.v);
    });
  });
}

void decode_boxes(Tensor deltas, Tensor anchors, std::vector<double> weights, int64_t coder, Tensor out) {
  const RowReader d(deltas, 4), a(anchors, 4);
  const Quad<double> w = to_quad(weights);
  fill_tiles(out, 4, [&](int64_t first, int64_t rows, BoxTile* in, double* boxes) {
    box_kernels().decode(d.read(first, rows, in[0]), a.read(first, rows, in[1]), rows, w, static_cast<BoxCoder>(coder),
                         boxes);
  });
}

void decode_boxes_backward(Tensor grad_output, Tensor deltas, Tensor anchors, std::vector<double> weights,
                           int64_t coder, Tensor grad) {
  const RowReader g(grad_output, 4), d(deltas, 4), a(anchors, 4);
  const Quad<double> w = to_quad(weights);
  fill_tiles(grad, 4, [&](int64_t first, int64_t rows, BoxTile* in, double* grad_deltas) {
    box_kernels().decode_backward(g.read(first, rows, in[0]), d.read(first, rows, in[1]), a.read(first, rows, in[2]),
                                  rows, w, static_cast<BoxCoder>(coder), grad_deltas);
  });
}

void encode_boxes(Tensor boxes, Tensor anchors, std::vector<double> weights, int64_t coder, Tensor out) {
  const RowReader b(boxes, 4), a(anchors, 4);
  const Quad<double> w = to_quad(weights);
  fill_tiles(out, 4, [&](int64_t first, int64_t rows, BoxTile* in, double* deltas) {
    box_kernels().encode(b.read(first, rows, in[0]), a.read(first, rows, in[1]), rows, w, static_cast<BoxCoder>(coder),
                         deltas);
  });
}

void paired_box_iou(Tensor boxes1, Tensor boxes2, Tensor out) {
  const RowReader a(boxes1, 4), b(boxes2, 4);
  fill_tiles(out, 1, [&](int64_t first, int64_t rows, BoxTile* in, double* iou) {
    box_kernels().paired_iou(a.read(first, rows, in[0]), b.read(first, rows, in[1]), rows, iou);
  });
}

void delta_iou_op(Tensor pred, Tensor target, std::vector<double> weights, int64_t coder, Tensor out) {
  const RowReader p(pred, 4), t(target, 4);
  const Quad<double> w = to_quad(weights);
  fill_tiles(out, 1, [&](int64_t first, int64_t rows, BoxTile* in, double* iou) {
    box_kernels().delta_iou(p.read(first, rows, in[0]), t.read(first, rows, in[1]), rows, w,
                            static_cast<BoxCoder>(coder), iou);
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
