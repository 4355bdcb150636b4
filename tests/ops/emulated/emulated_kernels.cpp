// The kernels of csrc/cpu compiled as for AVX-512, over emulated intrinsics, behind a plain C interface.
#include "avx512_emulation.h"
#include "cpu/isa.h"

#define INLINE static inline
#define NOINLINE __attribute__((noinline))
#define IOUBAL_PRAGMA(x) _Pragma(#x)

using c10::BFloat16;
using c10::Half;
using ioubal::Output;
using ioubal::PeriodicMask;

namespace avx512 {
#define IOUBAL_ISA 4
#include "cpu/simd.inc"
//
#include "cpu/focal_dense.inc"
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
