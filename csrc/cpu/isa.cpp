// Which instruction set is used.
#include "cpu/isa.h"

#include <atomic>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace ioubal {
namespace {

std::atomic<int> isa_limit{6};

#if defined(__x86_64__)
// __builtin_cpu_supports("f16c") is an error for clang before 19.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

// Compilers of today do not all know it by name. A virtual one may lack what every real one has.
bool is_zen5() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &a, &b, &c, &d)) return false;
  if (!__builtin_cpu_supports("avx512vbmi") || !__builtin_cpu_supports("bmi2")) return false;
  const unsigned family = (a >> 8 & 15) + (a >> 20 & 255);
  return family >= 26;
}
#endif

int detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c()) return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return 2;
  }
  if (!__builtin_cpu_supports("avx512bf16")) return 4;
  return is_zen5() ? 6 : 5;
#else
  return 0;
#endif
}

}  // namespace

const KernelTable& kernels() {
  static const int best = detect();
  const int limit = isa_limit.load(std::memory_order_relaxed), level = best < limit ? best : limit;
#if defined(__x86_64__)
  if (level >= 6) return zen5_kernels();
  if (level >= 5) return avx512_bf16_kernels();
  if (level >= 4) return avx512_kernels();
  if (level >= 2) return avx2_kernels();
#endif
  (void)level;
  return portable_kernels();
}

bool stream_gradient(int64_t bytes) {
  // Past what a core has of a last cache beside the logits: whoever reads the gradient next finds little of it there.
  // On Zen 5 (32 MB) pass and next reading together are as fast either way at 16 MB, 8 % faster like this at 32 MB.
  constexpr int64_t kLeast = int64_t{24} << 20;
  return bytes >= kLeast && kernels().streams;
}

void fence_streams() {
#if defined(__x86_64__)
  _mm_sfence();
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
