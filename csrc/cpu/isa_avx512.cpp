// Kernels for AVX-512 F, BW, DQ and VL.
#include "cpu/isa_body.h"

#if defined(__x86_64__)
namespace ioubal {
namespace {

IOUBAL_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define IOUBAL_ISA 4
#include "cpu/simd.inc"
//
#include "cpu/focal_dense.inc"
#include "cpu/softmax_rows.inc"
IOUBAL_TARGET_END

}  // namespace

const KernelTable& avx512_kernels() {
  static const KernelTable table = {
      {focal_dense<float>, focal_dense<BFloat16>, focal_dense<Half>, portable_kernels().focal[kFloat64]},
      {softmax_rows<float>, softmax_rows<BFloat16>, softmax_rows<Half>, portable_kernels().softmax[kFloat64]},
      4};
  return table;
}

}  // namespace ioubal
#endif
