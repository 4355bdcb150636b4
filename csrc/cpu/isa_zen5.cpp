// Kernels for AVX-512 with BF16 on Zen 5, whose divider is fast. The softmax's are those of any AVX-512.
#include "cpu/isa_body.h"
#include "cpu/octave_table.h"

#if defined(__x86_64__)
namespace ioubal {
namespace {

IOUBAL_TARGET_BEGIN("avx2,fma,f16c,bmi,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")
#define IOUBAL_ISA 6
#include "cpu/simd.inc"
//
#include "cpu/focal_dense.inc"
IOUBAL_TARGET_END

}  // namespace

const KernelTable& zen5_kernels() {
  static const KernelTable table = [] {
    KernelTable made = avx512_bf16_kernels();
    made.focal[kFloat32] = focal_dense<float>;
    made.focal[kBFloat16] = focal_dense<BFloat16>;
    made.focal[kFloat16] = focal_dense<Half>;
    made.isa = 6;
    made.streams = made.computes = made.octaves = true;
    return made;
  }();
  return table;
}

}  // namespace ioubal
#endif
