// Matching kernels for AVX-512 F, BW, DQ and VL.
#include "cpu/isa_body.h"
#include "cpu/matching.h"

#if defined(__x86_64__)
namespace ioubal {
namespace {

IOUBAL_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define IOUBAL_ISA 4
#include "cpu/simd.inc"
//
#include "cpu/matching.inc"
IOUBAL_TARGET_END

}  // namespace

const MatchKernels<float>& avx512_match_kernels() { return match_table; }

}  // namespace ioubal
#endif
