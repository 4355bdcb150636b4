#include "cpu/focal_table.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

#include "cpu/shuffle.h"
#include "cpu/table_values.h"

namespace ioubal {
namespace {

constexpr int64_t kValues = 1 << 16, kBuildBlock = 1024;
constexpr int64_t kLine = 32;     // entries
constexpr int64_t kAhead = 1024;  // prefetch distance

// An entry is the loss, a double, whose last 16 bits are what is written: they change it by 1e-11. So one read gives
// both. The bits must not make a NaN of an infinity, nor a denormal number of a zero, whose addition is slow.
constexpr double kInfinite = 1e300, kZero = 1e-300;

inline double make_entry(float loss, uint16_t written) {
  const double entry = (loss > std::numeric_limits<float>::max() ? kInfinite : loss) + kZero;
  uint64_t bits;
  std::memcpy(&bits, &entry, 8);
  bits = (bits & ~uint64_t{0xffff}) | written;
  double result;
  std::memcpy(&result, &bits, 8);
  return result;
}

template <class T>
void build(double* entries, int dtype, double scale, double gamma, Output output) {
  const KernelTable& use = kernels();
  torch::stable::parallel_for(0, kValues / kBuildBlock, 4, [&](int64_t begin, int64_t end) {
    FlushDenormals flush;
    alignas(64) uint16_t bits[kBuildBlock], written[kBuildBlock] = {};
    alignas(64) float x[kBuildBlock], loss[kBuildBlock];
    for (int64_t first = begin * kBuildBlock; first < end * kBuildBlock; first += kBuildBlock) {
      for (int64_t i = 0; i < kBuildBlock; ++i) {
        bits[i] = static_cast<uint16_t>(first + i);
        x[i] = T(bits[i], T::from_bits());
      }
      values_of(use.focal, dtype, bits, x, kBuildBlock, scale, gamma, output, loss, written);
      for (int64_t i = 0; i < kBuildBlock; ++i) entries[first + i] = make_entry(loss[i], written[i]);
    }
  });
}

typedef double Pair __attribute__((vector_size(16)));
typedef uint32_t Quad __attribute__((vector_size(16)));

inline uint16_t written(double entry) {
  uint64_t bits;
  std::memcpy(&bits, &entry, 8);
  return static_cast<uint16_t>(bits);
}

typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint16_t Eight __attribute__((vector_size(16)));

// A line of mask bytes at any phase.
struct MaskCursor {
  const uint8_t* bytes;
  int64_t at, period, step;

  bool all() const {
    uint64_t parts[kLine / 8];
    std::memcpy(parts, bytes + at, kLine);
    return (parts[0] & parts[1] & parts[2] & parts[3]) == ~uint64_t{0};
  }
  // Sixteen logits with `nothing` for those that do not count.
  static void put(const uint16_t* x, uint16_t nothing, const uint8_t* mask, uint16_t* to) {
    Bytes m;
    Eight logits[2];
    std::memcpy(&m, mask, 16);
    std::memcpy(logits, x, 32);
    const Eight keep[2] = {(Eight)SHUFFLE(Bytes, m, m, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7),
                           (Eight)SHUFFLE(Bytes, m, m, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15)};
    for (int i = 0; i < 2; ++i) logits[i] = (logits[i] & keep[i]) | (~keep[i] & nothing);
    std::memcpy(to, logits, 32);
  }
  void next() {
    at += step;
    if (at >= period) at -= period;
  }
};

// Whole lines, eight logits at a time. Their bits come by four reads, not eight, since it is the reads that take the
// time; entries go in pairs of even and of odd ones, so that two shuffles, a shift and a blend make one write of eight
// results. `nothing` is a logit without loss and gradient, which stands for those that do not count.
template <bool WRITES, bool MASK>
__attribute__((noinline)) double look_up_lines(const double* table, const uint16_t* x, uint16_t* out, int64_t lines,
                                               MaskCursor mask, uint16_t nothing) {
  Pair sum0 = {}, sum1 = {}, sum2 = {}, sum3 = {};
  alignas(16) uint16_t counted[kLine];
  for (const uint16_t* end = x + lines * kLine; x != end; x += kLine) {
    __builtin_prefetch(x + kAhead, 0, 3);
    if (WRITES) __builtin_prefetch(out + kAhead, 1, 3);
    const uint16_t* from = x;
    if (MASK) {
      if (!mask.all()) {
        for (int64_t j = 0; j < kLine; j += 16) mask.put(x + j, nothing, mask.bytes + mask.at + j, counted + j);
        from = counted;
      }
      mask.next();
    }
#pragma GCC unroll 1
    for (int64_t j = 0; j < kLine; j += 8) {
      uint32_t two[4];
      std::memcpy(two, from + j, 16);
      // Or the compiler reads each half on its own.
      asm("" : "+r"(two[0]), "+r"(two[1]), "+r"(two[2]), "+r"(two[3]));
      const auto low = [&](int i) { return table[two[i] & 0xffff]; };
      const auto high = [&](int i) { return table[two[i] >> 16]; };
      const Pair even0 = {low(0), low(1)}, odd0 = {high(0), high(1)};
      sum0 += even0;
      sum1 += odd0;
      const Pair even1 = {low(2), low(3)}, odd1 = {high(2), high(3)};
      sum2 += even1;
      sum3 += odd1;
      if (WRITES) {
        const Quad even = SHUFFLE(Quad, (Quad)even0, (Quad)even1, 0, 2, 4, 6);
        const Quad odd = SHUFFLE(Quad, (Quad)odd0, (Quad)odd1, 0, 2, 4, 6);
        const Quad result = (even & 0xffff) | (odd << 16);
        std::memcpy(out + j, &result, 16);
      }
    }
    if (WRITES) out += kLine;
  }
  const Pair sum = (sum0 + sum1) + (sum2 + sum3);
  return sum[0] + sum[1];
}

template <bool WRITES, bool MASK>
double look_up(const double* table, const uint16_t* x, uint16_t* out, int64_t n, const PeriodicMask& keep,
               uint16_t nothing) {
  MaskCursor mask = {keep.bytes, keep.start, keep.period, MASK ? kLine % keep.period : 0};
  double total = 0;
  const auto each = [&](int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const double entry = table[!MASK || mask.bytes[mask.at] ? x[i] : nothing];
      total += entry;
      if (WRITES) out[i] = written(entry);
      if (MASK && ++mask.at == mask.period) mask.at = 0;
    }
    x += count;
    if (WRITES) out += count;
    n -= count;
  };
  if (WRITES) {  // up to the first whole line of the output
    const auto head = static_cast<int64_t>((64 - reinterpret_cast<uintptr_t>(out) % 64) % 64 / 2);
    each(std::min(head, n));
  }
  const int64_t lines = n / kLine, whole = lines * kLine;
  total += look_up_lines<WRITES, MASK>(table, x, out, lines, mask, nothing);
  x += whole;
  if (WRITES) out += whole;
  n -= whole;
  if (MASK) mask.at = (mask.at + whole) % mask.period;
  each(n);
  return total >= kInfinite / 2 ? std::numeric_limits<double>::infinity() : total;
}

constexpr int64_t kWorthATable = int64_t{1} << 20;   // 0.15 ms are spent on it, 0.3 ns a logit are saved
constexpr int64_t kWorthOctaves = int64_t{1} << 18;  // 4 us and 0.03 ns, with any other gamma 0.1
std::atomic<int64_t> chosen_threshold{-1};

}  // namespace

FocalTable::FocalTable(int dtype, double scale, double gamma, Output output)
    : entries_(new double[kValues]),
      minus_infinity_(dtype == kBFloat16 ? 0xff80 : 0xfc00),
      writes_(output != Output::kNone) {
  if (dtype == kBFloat16) {
    build<c10::BFloat16>(entries_.get(), dtype, scale, gamma, output);
  } else {
    build<c10::Half>(entries_.get(), dtype, scale, gamma, output);
  }
  entries_[minus_infinity_] = make_entry(0, 0);  // exactly, where the kernels end at exp(-87)
}

double FocalTable::operator()(const void* x_, void* out_, int64_t n, const PeriodicMask& mask) const {
  const auto* x = static_cast<const uint16_t*>(x_);
  auto* out = static_cast<uint16_t*>(out_);
  const double* table = entries_.get();
  if (writes_) {
    return mask.period ? look_up<true, true>(table, x, out, n, mask, minus_infinity_)
                       : look_up<true, false>(table, x, out, n, mask, minus_infinity_);
  }
  return mask.period ? look_up<false, true>(table, x, out, n, mask, minus_infinity_)
                     : look_up<false, false>(table, x, out, n, mask, minus_infinity_);
}

int64_t table_threshold(double gamma, bool octaves) {
  const int64_t chosen = chosen_threshold.load(std::memory_order_relaxed);
  if (chosen >= 0) return chosen;
  if (octaves) return kWorthOctaves;
  const bool computed = kernels().computes && (gamma == 0 || gamma == 1 || gamma == 2);
  return computed ? std::numeric_limits<int64_t>::max() : kWorthATable;
}

int64_t set_table_threshold(int64_t entries) {
  chosen_threshold.store(entries, std::memory_order_relaxed);
  return entries >= 0 ? entries : kWorthATable;
}

}  // namespace ioubal
