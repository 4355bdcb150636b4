// Kernels for AVX-512 with BF16: only bfloat16 gains by its conversion instructions.
#include "cpu/isa_body.h"

#if defined(__x86_64__)
namespace ioubal {
namespace {

IOUBAL_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#define IOUBAL_ISA 5
#include "cpu/simd.inc"
//
#include "cpu/focal_dense.inc"
#include "cpu/softmax_rows.inc"
IOUBAL_TARGET_END

}  // namespace

const KernelTable& avx512_bf16_kernels() {
  static const KernelTable table = {{avx512_kernels().focal[kFloat32], focal_dense<BFloat16>,
                                     avx512_kernels().focal[kFloat16], portable_kernels().focal[kFloat64]},
                                    {avx512_kernels().softmax[kFloat32], softmax_rows<BFloat16>,
                                     avx512_kernels().softmax[kFloat16], portable_kernels().softmax[kFloat64]},
                                    5};
  return table;
}

}  // namespace ioubal
#endif
