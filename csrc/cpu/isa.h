// Kernels that exist once per instruction set, chosen at run time.
#pragma once

#include <cstdint>

namespace ioubal {

// What a dense pass writes.
enum class Output : int { kNone, kGradient, kLoss };

// Entry i of a run is counted when bytes[(start + i) % period] is 0xff; period 0: all are. 64 bytes past the period
// repeat its beginning, so that a line can be read at any phase.
struct PeriodicMask {
  const uint8_t* bytes = nullptr;
  int64_t start = 0, period = 0;
};
constexpr int64_t kMaskPad = 64;

// Index of a dtype in the tables below.
enum DtypeIndex : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// Sum of the plain negative losses of n contiguous logits; writes scale * gradient or scale * loss to out.
using FocalDense = double (*)(const void* x, void* out, int64_t n, double scale, double gamma, const PeriodicMask& mask,
                              Output output);
// logsumexp(x) - x[target]; with out also scale * (softmax - onehot). buffer holds columns + 16 floats (doubles for
// float64).
using SoftmaxRow = double (*)(const void* x, void* out, int64_t columns, int64_t target, double scale, float* buffer);

struct KernelTable {
  FocalDense focal[4];
  SoftmaxRow softmax[4];
  int isa;  // 0 portable, 2 AVX2, 4 AVX-512, 5 AVX-512 with BF16
};

const KernelTable& portable_kernels();
#if defined(__x86_64__)
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
const KernelTable& avx512_bf16_kernels();
#endif

// The best table this CPU can run, at most the limit set by set_isa_limit.
const KernelTable& kernels();

// Limits the choice to `limit` (for tests and benchmarks; negative: unchanged). Returns the level in use.
int set_isa_limit(int limit);

// Entries of a block of the dense pass: fixed, so that sums are bitwise the same for any number of threads.
constexpr int64_t kBlockEntries = 1 << 16;

// A denormal result costs about 150 cycles, and near x = -31 every gradient is one: flush them to zero inside a block.
class FlushDenormals {
 public:
  FlushDenormals();
  ~FlushDenormals();

 private:
  unsigned saved_;
};

}  // namespace ioubal
