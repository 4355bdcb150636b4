// Box kernels for any CPU.
#include "cpu/box_rows.h"
#include "cpu/isa_body.h"
//
#define IOUBAL_HD INLINE  // the formulas, compiled for the functions below only
#include "cpu/power.h"
#include "math/iou.h"
#include "math/smooth_l1.h"

namespace ioubal {
namespace {

#define IOUBAL_ISA 0
#include "cpu/simd.inc"
//
#include "cpu/box_rows.inc"

}  // namespace

const BoxKernels& portable_box_kernels() { return box_table; }

}  // namespace ioubal
