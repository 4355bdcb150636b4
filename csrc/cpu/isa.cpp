// Which instruction set is used.
#include "cpu/isa.h"

#include <atomic>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ioubal {
namespace {

std::atomic<int> isa_limit{5};

int detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return 2;
  }
  return __builtin_cpu_supports("avx512bf16") ? 5 : 4;
#else
  return 0;
#endif
}

}  // namespace

const KernelTable& kernels() {
  static const int best = detect();
  const int limit = isa_limit.load(std::memory_order_relaxed), level = best < limit ? best : limit;
#if defined(__x86_64__)
  if (level >= 5) return avx512_bf16_kernels();
  if (level >= 4) return avx512_kernels();
  if (level >= 2) return avx2_kernels();
#endif
  (void)level;
  return portable_kernels();
}

bool streams(const KernelTable& table) {
#if defined(__x86_64__)
  // Measured: 0.75 of the time on Zen 5, 1.05 to 1.08 with AVX2 on Zen 3. Not on Intel.
  static const bool amd = __builtin_cpu_is("amd");
  return amd && table.isa >= 4;
#else
  (void)table;
  return false;
#endif
}

int set_isa_limit(int limit) {
  if (limit >= 0) isa_limit.store(limit, std::memory_order_relaxed);
  return kernels().isa;
}

#if defined(__x86_64__)
FlushDenormals::FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8000); }
FlushDenormals::~FlushDenormals() { _mm_setcsr(saved_); }
#else
FlushDenormals::FlushDenormals() : saved_(0) {}
FlushDenormals::~FlushDenormals() { (void)saved_; }
#endif

}  // namespace ioubal
