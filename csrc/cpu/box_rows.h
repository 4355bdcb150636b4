// Box coders, IoU and smooth L1 over rows of four coordinates, in double whatever the tensors' type. The formulas are
// those of math/; here they are evaluated on vectors, once per instruction set.
#pragma once

#include <cstdint>

namespace ioubal {

template <class T>
struct Quad;
enum class BoxCoder : int;

// Rows of a tile: its arrays stay in the L1 cache. What is read and written is padded to a multiple of kBoxLanes rows.
constexpr int64_t kBoxRows = 64;
constexpr int64_t kBoxLanes = 8;

struct SmoothL1Tile {
  const double *pred, *target;  // (rows, 4)
  const double* weight;         // (rows, weight_columns); null: 1
  int64_t weight_columns;       // 1 or 4
  const double* iou;            // (rows,); null: that of the deltas, where it is needed
  double beta, lambda;
  double *loss, *balance;  // (rows,): sum of the weighted coordinates; iou^lambda
  double* grad;            // (rows, 4), of the weighted coordinates
};

struct BoxKernels {
  // `count` elements of a dtype (indexed by DtypeIndex) to doubles and back.
  void (*load[4])(const void* from, int64_t count, double* to);
  void (*store[4])(const double* from, int64_t count, void* to);
  // `rows` rows, at most kBoxRows.
  void (*decode)(const double* deltas, const double* anchors, int64_t rows, const Quad<double>& weights, BoxCoder coder,
                 double* boxes);
  void (*decode_backward)(const double* grad_boxes, const double* deltas, const double* anchors, int64_t rows,
                          const Quad<double>& weights, BoxCoder coder, double* grad_deltas);
  void (*encode)(const double* boxes, const double* anchors, int64_t rows, const Quad<double>& weights, BoxCoder coder,
                 double* deltas);
  void (*paired_iou)(const double* boxes1, const double* boxes2, int64_t rows, double* iou);
  void (*delta_iou)(const double* pred, const double* target, int64_t rows, const Quad<double>& weights, BoxCoder coder,
                    double* iou);
  void (*smooth_l1)(const SmoothL1Tile& tile, int64_t rows, const Quad<double>& box_weights);
};

const BoxKernels& portable_box_kernels();
#if defined(__x86_64__)
const BoxKernels& avx2_box_kernels();
const BoxKernels& avx512_box_kernels();
#endif

// Those of the instruction set in use.
const BoxKernels& box_kernels();

}  // namespace ioubal
