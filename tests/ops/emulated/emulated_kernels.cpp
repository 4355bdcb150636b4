// The kernels of csrc/cpu compiled as for AVX-512, over emulated intrinsics, behind a plain C interface.
#include <algorithm>
#include <vector>

#include "avx512_emulation.h"
#include "cpu/isa.h"

#define INLINE static inline
#define NOINLINE __attribute__((noinline))
#define IOUBAL_PRAGMA(x) _Pragma(#x)

using c10::BFloat16;
using c10::Half;
using ioubal::Output;
using ioubal::PeriodicMask;
using ioubal::SoftmaxTile;
using ioubal::kSoftmaxRows;
using ioubal::SoftmaxRows;
using ioubal::softmax_buffer;
using ioubal::softmax_tile_rows;

namespace avx512 {
#define IOUBAL_ISA 4
#include "cpu/simd.inc"
//
#include "cpu/focal_dense.inc"
#include "cpu/softmax_rows.inc"
#undef IOUBAL_ISA
}  // namespace avx512

namespace avx512_bf16 {
#define IOUBAL_ISA 5
#include "cpu/simd.inc"
//
#include "cpu/focal_dense.inc"
#include "cpu/softmax_rows.inc"
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

// All rows, in tiles as the library forms them; order: null, or the rows to take (then `selected` of them, no out).
extern "C" void softmax(int isa, int dtype, const void* x, void* out, int64_t rows, int64_t columns,
                        const int64_t* target, const double* scale, const int64_t* order, int64_t selected,
                        double* loss) {
  const int64_t size = dtype == 0 ? 4 : 2, count = order ? selected : rows, per_tile = softmax_tile_rows(columns);
  const SoftmaxRows kernel = isa == 5     ? avx512_bf16::softmax_rows<BFloat16>
                             : dtype == 0 ? avx512::softmax_rows<float>
                             : dtype == 1 ? avx512::softmax_rows<BFloat16>
                                          : avx512::softmax_rows<Half>;
  std::vector<float> buffer(softmax_buffer(columns));
  std::vector<int64_t> padded(order, order + (order ? selected : 0));
  padded.resize(count + 2 * per_tile, 0);
  SoftmaxTile tile;
  tile.columns = columns;
  tile.all_rows = rows;
  for (int64_t first = 0; first < count; first += tile.rows) {
    tile.rows = std::min(per_tile, count - first);
    tile.order = order ? padded.data() + first : nullptr;
    tile.x = static_cast<const char*>(x) + (order ? 0 : first * columns * size);
    tile.out = out ? static_cast<char*>(out) + first * columns * size : nullptr;
    std::copy_n(target + first, tile.rows, tile.target);
    std::copy_n(scale + first, tile.rows, tile.scale);
    kernel(tile, buffer.data());
    std::copy_n(tile.loss, tile.rows, loss + first);
  }
}
