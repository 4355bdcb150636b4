// What every isa_<name>.cpp includes before it opens its target region: an inline function parsed inside that region
// would be compiled for it, so all headers come first.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cpu/isa.h"
#include "cpu/shuffle.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

#define IOUBAL_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define IOUBAL_TARGET_BEGIN(isa) IOUBAL_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define IOUBAL_TARGET_END IOUBAL_PRAGMA(clang attribute pop)
#else
#define IOUBAL_TARGET_BEGIN(isa) \
  IOUBAL_PRAGMA(GCC push_options) IOUBAL_PRAGMA(GCC target(isa, "prefer-vector-width=512"))
#define IOUBAL_TARGET_END IOUBAL_PRAGMA(GCC pop_options)
#endif

namespace ioubal {
using c10::BFloat16;
using c10::Half;
}  // namespace ioubal
