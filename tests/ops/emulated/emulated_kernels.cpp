// The kernels of csrc/cpu compiled as for AVX-512, over emulated intrinsics, behind a plain C interface.
#include <algorithm>
#include <memory>
#include <vector>

#include "avx512_emulation.h"
#include "cpu/box_rows.h"
#include "cpu/isa.h"
#include "cpu/matching.h"
#include "cpu/octave_table.h"
#include "cpu/power.h"
#include "cpu/shuffle.h"
#include "math/iou.h"
#include "math/smooth_l1.h"

#define INLINE static inline
#define NOINLINE __attribute__((noinline))
#define IOUBAL_PRAGMA(x) _Pragma(#x)

using c10::BFloat16;
using c10::Half;
using ioubal::kSoftmaxRows;
using ioubal::LeftOut;
using ioubal::OctaveTable;
using ioubal::Output;
using ioubal::PeriodicMask;
using ioubal::softmax_buffer;
using ioubal::softmax_tile_rows;
using ioubal::SoftmaxRows;
using ioubal::SoftmaxTile;

namespace avx512 {
using namespace ioubal;
#define IOUBAL_ISA 4
#include "cpu/simd.inc"
//
#include "cpu/focal_dense.inc"
#include "cpu/matching.inc"
#include "cpu/softmax_rows.inc"
#include "cpu/box_rows.inc"
#undef IOUBAL_ISA
}  // namespace avx512

namespace avx512_bf16 {
using namespace ioubal;
#define IOUBAL_ISA 5
#include "cpu/simd.inc"
//
#include "cpu/focal_dense.inc"
#include "cpu/softmax_rows.inc"
#undef IOUBAL_ISA
}  // namespace avx512_bf16

namespace zen5 {
using namespace ioubal;
#define IOUBAL_ISA 6
#include "cpu/simd.inc"
//
#include "cpu/focal_dense.inc"
#undef IOUBAL_ISA
}  // namespace zen5

extern "C" double focal(int isa, int dtype, const void* x, void* out, int64_t n, double scale, double gamma,
                        const uint8_t* mask, int64_t start, int64_t period, const int64_t* skips, int64_t skipped,
                        double* positives, int output, int stream, int by_octave) {
  const ioubal::FocalDense kernels[3][4] = {
      {avx512::focal_dense<float>, avx512::focal_dense<BFloat16>, avx512::focal_dense<Half>},
      {nullptr, avx512_bf16::focal_dense<BFloat16>, nullptr},
      {zen5::focal_dense<float>, zen5::focal_dense<BFloat16>, zen5::focal_dense<Half>}};
  std::vector<ioubal::Skip> list;  // skips: (first, count, positive) each
  for (int64_t i = 0; i < skipped; ++i) list.push_back({skips[3 * i], skips[3 * i + 1], skips[3 * i + 2]});
  std::vector<uint8_t> bits((period + ioubal::kMaskPad) / 8 + 5, 0xff);
  for (int64_t i = 0; mask && i < period + ioubal::kMaskPad; ++i) {
    if (!mask[i]) bits[i / 8] &= static_cast<uint8_t>(~(1 << i % 8));
  }
  const LeftOut left_out = {{mask, start, period, bits.data()}, list.data(), list.data() + skipped, 0, positives};
  const Output kind = static_cast<Output>(output);
  std::unique_ptr<OctaveTable> octaves;
  if (by_octave) octaves = std::make_unique<OctaveTable>(kernels[isa - 4], scale, gamma, kind);
  return kernels[isa - 4][dtype](x, out, n, scale, gamma, left_out, kind, stream != 0, octaves.get());
}

// All rows, in tiles as the library forms them; order: null, or the rows to take (then `selected` of them, no out).
extern "C" void softmax(int isa, int dtype, const void* x, void* out, int64_t rows, int64_t columns,
                        const int64_t* target, const double* scale, const int64_t* order, int64_t selected,
                        double* loss, int stream) {
  const int64_t size = dtype == 0 ? 4 : 2, count = order ? selected : rows, per_tile = softmax_tile_rows(columns);
  const SoftmaxRows kernel = isa == 5     ? avx512_bf16::softmax_rows<BFloat16>
                             : dtype == 0 ? avx512::softmax_rows<float>
                             : dtype == 1 ? avx512::softmax_rows<BFloat16>
                                          : avx512::softmax_rows<Half>;
  std::vector<float> buffers(2 * softmax_buffer(columns));
  std::vector<int64_t> padded(order, order + (order ? selected : 0));
  padded.resize(count + 2 * per_tile, 0);
  SoftmaxTile tiles[2];
  int64_t turn = 0;
  for (int64_t first = 0; first < count; first += per_tile) {
    SoftmaxTile& tile = tiles[turn % 2];
    tile.columns = columns;
    tile.all_rows = rows;
    tile.stream = stream != 0;
    tile.buffer = buffers.data() + turn % 2 * softmax_buffer(columns);
    tile.rows = std::min(per_tile, count - first);
    tile.order = order ? padded.data() + first : nullptr;
    tile.x = static_cast<const char*>(x) + (order ? 0 : first * columns * size);
    tile.out = out ? static_cast<char*>(out) + first * columns * size : nullptr;
    tile.target = target + first;
    tile.scale = scale + first;
    tile.loss = loss + first;
    kernel(&tile, turn % 5 == 0 ? nullptr : &tiles[(turn + 1) % 2]);  // now and then what waits is written by itself
    if (++turn % 5 == 0) kernel(nullptr, &tile);
  }
  if (turn % 5 != 0) kernel(nullptr, &tiles[(turn + 1) % 2]);
}

// One block of regular anchors against regular boxes: the decisions, each box's largest IoU, and which anchors have it.
extern "C" int64_t match(const float* anchors, int64_t count, int64_t whole, const float* boxes, int64_t places,
                         float high, float low, int64_t* matched, float* top, uint8_t* hits) {
  using namespace ioubal;
  const MatchKernels<float>& kernels = avx512::match_table;
  MatchBoxes<float> all;
  const auto add_bounds = [&](float x1, float y1, float x2, float y2) {
    all.x1.push_back(x1), all.y1.push_back(y1), all.x2.push_back(x2), all.y2.push_back(y2);
  };
  for (int32_t g = 0; g < places; ++g, boxes += 4) {
    all.box.push_back({{boxes[0], boxes[1], boxes[2], boxes[3]}});
    all.area.push_back(matching_area(all.box.back()));
    all.index.push_back(g);
    add_bounds(boxes[0], boxes[1], boxes[2], boxes[3]);
  }
  while (all.x1.size() % kMatchLanes) add_bounds(INFINITY, INFINITY, -INFINITY, -INFINITY);
  static MatchBlock<float> block;
  static MatchBest<float> best;
  const MatchBounds<float> bounds = kernels.bounds(anchors, whole);
  kernels.load(anchors, whole, block);
  for (int64_t i = 0; i < whole; ++i) best.iou[i] = 0, best.index[i] = 0;
  std::vector<int32_t> list(places + kMatchLanes);
  const int64_t listed = kernels.overlapping(all, bounds, list.data());
  for (int64_t i = 0; i < listed; ++i) {
    const int32_t g = list[i];
    top[g] = kernels.pairs(block, all.box[g], all.area[g], g, best);
    if (top[g] > 0) kernels.equal(block, all.box[g], all.area[g], top[g], hits + g * whole);
  }
  kernels.write64(best, count, high, low, matched);
  return bounds.regular ? listed : -1;
}

// `function` of rows of a and b in a dtype, in tiles: 0 decode, 1 encode, 2 IoU, 3 IoU of deltas, 4 smooth L1 (its
// gradient in out, its losses and balances in terms).
extern "C" void box_rows(int function, int dtype, const void* a_, const void* b_, int64_t rows, int fovea, double beta,
                         double lambda, void* out_, double* terms) {
  using namespace ioubal;
  const BoxKernels& kernels = avx512::box_table;
  const int64_t size = dtype == kFloat64   ? 8
                       : dtype == kFloat32 ? 4
                                           : 2,
                columns = function == 2 || function == 3 ? 1 : 4;
  const Quad<double> weights = {{10, 10, 5, 5}};
  const BoxCoder coder = fovea ? BoxCoder::kFovea : BoxCoder::kDelta;
  const char *a = static_cast<const char*>(a_), *b = static_cast<const char*>(b_);
  char* out = static_cast<char*>(out_);
  double in[2][4 * kBoxRows] = {}, result[4 * kBoxRows], loss[kBoxRows], balance[kBoxRows];
  for (int64_t first = 0; first < rows; first += kBoxRows) {
    const int64_t count = std::min(kBoxRows, rows - first);
    kernels.load[dtype](a + first * 4 * size, 4 * count, in[0]);
    kernels.load[dtype](b + first * 4 * size, 4 * count, in[1]);
    if (function == 0) kernels.decode(in[0], in[1], count, weights, coder, result);
    if (function == 1) kernels.encode(in[0], in[1], count, weights, coder, result);
    if (function == 2) kernels.paired_iou(in[0], in[1], count, result);
    if (function == 3) kernels.delta_iou(in[0], in[1], count, weights, coder, result);
    if (function == 4) {
      SmoothL1Tile tile = {in[0], in[1], nullptr, 0, nullptr, beta, lambda, loss, balance, result};
      kernels.smooth_l1(tile, count, weights);
      std::copy_n(loss, count, terms + first);
      std::copy_n(balance, count, terms + rows + first);
    }
    kernels.store[dtype](result, columns * count, out + first * columns * size);
  }
}
