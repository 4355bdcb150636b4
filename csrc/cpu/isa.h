// Kernels that exist once per instruction set, chosen at run time.
#pragma once

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 10
#error "the CPU library needs GCC 10 or newer, or clang: CXX names another compiler"
#endif

#include <cstdint>

#include "cpu/left_out.h"

namespace ioubal {

// What a dense pass writes.
enum class Output : int { kNone, kGradient, kLoss };

// Index of a dtype in the tables below.
enum DtypeIndex : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

struct OctaveTable;

// Sum of the plain negative losses of n contiguous logits; writes scale * gradient or scale * loss to out, 0 for what
// is left out. stream: a gradient past the caches; out is not x then, and fence_streams is the caller's. octaves: null,
// or a table of the same scale, gamma and output, of which kernels that have octaves make use for bfloat16.
using FocalDense = double (*)(const void* x, void* out, int64_t n, double scale, double gamma, const LeftOut& left_out,
                              Output output, bool stream, const OctaveTable* octaves);

// Softmax cross entropy of some rows: loss = logsumexp(x) - x[target], and where out is given scale * (softmax(x) -
// onehot(target)). A row with a negative target is ignored: loss 0, zeros in out. A row without a finite loss is the
// caller's: its loss is not finite, what it has in out is unspecified. out may be x.
constexpr int64_t kSoftmaxRows = 64;
struct SoftmaxTile {
  const void* x;
  void* out;
  int64_t rows, columns;
  // Null: the rows begin at x and follow each other. Else row i is row order[i] of the all_rows rows at x, there is no
  // out, and order[rows ... 2 * rows) names the rows that will be wanted next.
  const int64_t* order;
  int64_t all_rows;
  bool stream;  // float32 past the caches; out is not x then, and fence_streams is the caller's
  const int64_t* target;
  const double* scale;
  double* loss;
  float* buffer;       // softmax_buffer(columns) entries
  bool waits = false;  // for a call that writes its gradient; until then it keeps its buffer and the factors
  float factor[kSoftmaxRows + 1];
};
// Rows of a tile: its exponentials fill a part of the L1 cache, and rows come in vectors.
inline int64_t softmax_tile_rows(int64_t columns) {
  const int64_t rows = 2048 / columns;
  return rows >= kSoftmaxRows ? kSoftmaxRows : rows >= 8 ? rows / 8 * 8 : rows > 1 ? rows : 1;
}
// The size of a tile's buffer: room for its alignment and for the last vector.
inline int64_t softmax_buffer(int64_t columns) { return softmax_tile_rows(columns) * columns + 64; }
// Computes `tile`, whose gradient may wait for the next call, and writes that of `before` if it waits. Either may be
// null.
using SoftmaxRows = void (*)(SoftmaxTile* tile, SoftmaxTile* before);

struct KernelTable {
  FocalDense focal[4];
  SoftmaxRows softmax[4];
  int isa;                // 0 portable, 2 AVX2, 4 AVX-512, 5 AVX-512 with BF16, 6 the same on Zen 5
  bool streams = false;   // a large gradient is written faster past the caches
  bool computes = false;  // 16-bit logits of gamma 0, 1 and 2 are computed faster than looked up
  bool octaves = false;   // but bfloat16 ones are looked up in an OctaveTable, whatever gamma
};

const KernelTable& portable_kernels();
#if defined(__x86_64__)
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
const KernelTable& avx512_bf16_kernels();
const KernelTable& zen5_kernels();
#endif

// The best table this CPU can run, at most the limit set by set_isa_limit.
const KernelTable& kernels();

// Whether a gradient of that many bytes, in memory of its own, is to be written past the caches.
bool stream_gradient(int64_t bytes);
// After a thread's last streamed line, before others read.
void fence_streams();

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
