// Matching kernels for any CPU.
#include "cpu/isa_body.h"
#include "cpu/matching.h"

namespace ioubal {
namespace {

#define IOUBAL_ISA 0
#include "cpu/simd.inc"
//
#include "cpu/matching.inc"

}  // namespace

const MatchKernels<float>& portable_match_kernels() { return match_table; }

}  // namespace ioubal
