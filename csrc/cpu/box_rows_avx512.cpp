// Box kernels for AVX-512 F, BW, DQ and VL.
#include "cpu/box_rows.h"
#include "cpu/isa_body.h"

#if defined(__x86_64__)
IOUBAL_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define IOUBAL_HD INLINE  // the formulas, compiled for the functions below only
#include "cpu/power.h"
#include "math/iou.h"
#include "math/smooth_l1.h"

namespace ioubal {
namespace {

#define IOUBAL_ISA 4
#include "cpu/simd.inc"
//
#include "cpu/box_rows.inc"

}  // namespace
}  // namespace ioubal
IOUBAL_TARGET_END

namespace ioubal {
const BoxKernels& avx512_box_kernels() { return box_table; }
}  // namespace ioubal
#endif
