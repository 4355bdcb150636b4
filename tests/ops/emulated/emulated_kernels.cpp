// The kernels of csrc/cpu compiled as for AVX-512, over emulated intrinsics, behind a plain C interface.
#include "avx512_emulation.h"
#include "cpu/isa.h"
#include "cpu/matching.h"

#define INLINE static inline
#define NOINLINE __attribute__((noinline))
#define IOUBAL_PRAGMA(x) _Pragma(#x)

using c10::BFloat16;
using c10::Half;
using ioubal::Output;
using ioubal::PeriodicMask;

namespace avx512 {
using namespace ioubal;
#define IOUBAL_ISA 4
#include "cpu/simd.inc"
//
#include "cpu/focal_dense.inc"
#include "cpu/matching.inc"
#include "cpu/softmax_row.inc"
#undef IOUBAL_ISA
}  // namespace avx512

namespace avx512_bf16 {
#define IOUBAL_ISA 5
#include "cpu/simd.inc"
//
#include "cpu/focal_dense.inc"
#include "cpu/softmax_row.inc"
}  // namespace avx512_bf16

extern "C" double focal(int isa, int dtype, const void* x, void* out, int64_t n, double scale, double gamma,
                        const uint8_t* mask, int64_t start, int64_t period, int output) {
  const PeriodicMask keep = {mask, start, period};
  const Output o = static_cast<Output>(output);
  if (isa == 5) return avx512_bf16::focal_dense<BFloat16>(x, out, n, scale, gamma, keep, o);
  if (dtype == 0) return avx512::focal_dense<float>(x, out, n, scale, gamma, keep, o);
  if (dtype == 1) return avx512::focal_dense<BFloat16>(x, out, n, scale, gamma, keep, o);
  return avx512::focal_dense<Half>(x, out, n, scale, gamma, keep, o);
}

extern "C" double softmax(int isa, int dtype, const void* x, void* out, int64_t columns, int64_t target, double scale) {
  float buffer[4096];
  if (isa == 5) return avx512_bf16::softmax_row<BFloat16>(x, out, columns, target, scale, buffer);
  if (dtype == 0) return avx512::softmax_row<float>(x, out, columns, target, scale, buffer);
  if (dtype == 1) return avx512::softmax_row<BFloat16>(x, out, columns, target, scale, buffer);
  return avx512::softmax_row<Half>(x, out, columns, target, scale, buffer);
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
