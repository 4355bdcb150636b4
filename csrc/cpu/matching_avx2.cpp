// Matching kernels for AVX2.
#include "cpu/isa_body.h"
#include "cpu/matching.h"

#if defined(__x86_64__)
namespace ioubal {
namespace {

IOUBAL_TARGET_BEGIN("avx2,fma,f16c")
#define IOUBAL_ISA 2
#include "cpu/simd.inc"
//
#include "cpu/matching.inc"
IOUBAL_TARGET_END

}  // namespace

const MatchKernels<float>& avx2_match_kernels() { return match_table; }

}  // namespace ioubal
#endif
