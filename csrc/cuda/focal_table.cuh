// The dense pass of 16-bit logits by table: a logit's loss and gradient are read from shared memory instead of
// computed. The table holds the logits in (-32, -0.125], which nearly all of a detector's are; vectors with another one
// are done after the others, by arithmetic, as those with a positive or ignored entry are.
//
// One block a multiprocessor, because a table is large: an entry is 8 bytes, kept kCopies times, for different lanes.
// With 16 copies (bfloat16) every lane of a half-warp reads banks of its own, whatever the logits: no conflict. Warps
// have tiles of their own and never wait for each other; tiles side by side in memory are done at the same time.
#pragma once

#include "cuda/focal_fill.cuh"

namespace ioubal::cuda {

// As many threads as leave each the registers that the loads of a group need.
constexpr u32 kTableThreads = 640, kTableWarps = kTableThreads / kWarp;

// What differs by dtype: bits of the mantissa, and the biased exponent of 2^-3. Eight exponents are in the table.
template <class T>
struct TableOf;
template <>
struct TableOf<BFloat16> {
  static constexpr u32 kMantissa = 7, kFirstExponent = 124, kCopies = 16;
};
template <>
struct TableOf<Float16> {
  static constexpr u32 kMantissa = 10, kFirstExponent = 12, kCopies = 2;
};

template <class T>
struct TableEntries : TableOf<T> {
  using TableOf<T>::kMantissa;
  using TableOf<T>::kCopies;
  static constexpr u32 kBlock = kTableThreads, kTile = kWarp;
  static constexpr u32 kEntries = 8u << kMantissa, kBytes = 8 * kEntries * kCopies;
  // The logit -0.125; those in the table are the next kEntries patterns of bits. Entry i is for the one that ends in i.
  static constexpr u32 kFirst = 0x8000u | TableOf<T>::kFirstExponent << kMantissa;
  static constexpr u32 kShift = 3 + (kCopies == 16 ? 4 : 1);  // log2 of an entry's bytes, copies included
  static constexpr u32 kMask = (kEntries - 1) << kShift;
  static_assert(kCopies == 16 || kCopies == 2);

  const char* table;  // shared memory
  u32 copy;           // of this lane, in bytes
  float scale;        // of the gradients in it

  // Fills the table; a barrier of the block must follow.
  IOUBAL_DEVICE TableEntries(char* memory, const Scale& s, float gamma)
      : table(memory), copy(0), scale(s.usual ? s.value : NAN) {
    constexpr u32 kTogether = kWarp / kCopies;  // entries of which a warp writes all copies at once
    const u32 lane = threadIdx.x % kWarp;
    // A shuffle, which the compiler does not do again and again to save a register.
    copy = __shfl_sync(~0u, lane % kCopies * 8, lane);
#pragma unroll 1
    for (u32 first = threadIdx.x - lane; first < kEntries; first += kTableThreads) {
      const u32 place = first + lane, bits = kFirst + ((place - kFirst) & (kEntries - 1));
      Vec<T, 2> logit;
      logit.words[0] = bits;
      float x[2], loss = 0.f;
      logit.unpack(x);
      const u32 gradient = pack(negative_entry<-1, false, false>(x[0], s, gamma, loss), 0.f, T());
#pragma unroll 1
      for (u32 k = 0; k < kWarp; k += kTogether) {
        const u32 source = k + lane / kCopies;
        const uint2 entry = {__shfl_sync(~0u, float_to_bits(loss), source), __shfl_sync(~0u, gradient, source)};
        reinterpret_cast<uint2*>(memory)[(first + source) * kCopies + lane % kCopies] = entry;
      }
    }
  }

  IOUBAL_DEVICE bool serves(const Scale& s) const { return s.value == scale; }

  // Entry of the logit whose last bits are those of `shifted` from kShift on.
  IOUBAL_DEVICE uint2 entry(u32 shifted) const {
    return *reinterpret_cast<const uint2*>(table + ((shifted & kMask) | copy));
  }

  // In the place of logits their gradients; adds their losses. False, with nothing of worth in either, if one is not in
  // the table. `off`: bits of entries to be left out.
  template <int kCount>
  IOUBAL_DEVICE bool look_up(Vec<T, kCount>& v, u32 off, float& sum) const {
    constexpr u32 kHalf = 0xffffu & ~(kEntries - 1), kOutside = kCount == 1 ? kHalf : kHalf << 16 | kHalf;
    u32 outside = 0;
#pragma unroll
    for (int i = 0; i < v.kWords; ++i) {
      const u32 word = v.words[i];
      // A half that is less than kFirst borrows from the other, but is outside itself.
      outside |= (word - (kFirst << 16 | kFirst)) & kOutside;
      const uint2 low = entry(word << kShift);
      const uint2 high = kCount == 1 ? uint2{0, 0} : entry(word >> (16 - kShift));
      float losses[2] = {bits_to_float(low.x), bits_to_float(high.x)};
      u32 gradients = low.y | high.y << 16;
      if (off) {
        const u32 both = off >> 2 * i;
        losses[0] = both & 1 ? 0.f : losses[0];
        losses[1] = both & 2 ? 0.f : losses[1];
        gradients &= (both & 1 ? 0u : 0xffffu) | (both & 2 ? 0u : 0xffff0000u);
      }
      sum += losses[0];
      if (kCount > 1) sum += losses[1];
      v.words[i] = gradients;
    }
    return outside == 0;
  }

  // As negative_group of focal_dense.cuh. A vector that is left as it was leaves the sum as it was, too.
  template <int kGamma, Output kOutput, int kCount>
  IOUBAL_DEVICE u32 group(const DenseTable&, const DenseRun<T>&, const Vec<T, kCount> (&in)[kVectorsInFlight], T* out,
                          u32 stride, u32 skip, u32 ignored, float& sum) const {
    static_assert(kOutput == kGradient);
#pragma unroll
    for (u32 u = 0; u < kVectorsInFlight; ++u) {
      Vec<T, kCount> v = in[u];
      float total = sum;
      const bool inside = look_up<kCount>(v, ignored, total);
      if (!inside || (skip >> u & 1)) {
        skip |= 1u << u;
        continue;
      }
      sum = total;
      v.store(out + u * stride);
    }
    return skip;
  }
};

// Of a block: the table, then the values that Marks keeps.
template <class T>
constexpr u32 kTableShared = TableEntries<T>::kBytes + kKept * kTableThreads * sizeof(float);

constexpr u32 kTableStatic = 2048;  // room for what kernels and the device take besides

// As focal_fill_kernel, of any gamma, for images whose gradients have the same scale.
template <class T, DenseLayout kLayout>
__global__ void __launch_bounds__(kTableThreads, 1) focal_table_kernel(const IOUBAL_GRID_CONSTANT FillTable tb) {
  char* const memory = dynamic_shared();
  float* const kept = reinterpret_cast<float*>(memory + TableEntries<T>::kBytes);
  const TableEntries<T> entries(memory, dense_run<T, -1>(tb.dense, tb.dense.level[0], 0).scale, tb.dense.gamma);
  constexpr u32 kParts = kTableThreads / kThreads;  // the threads beyond have no part in the deltas
  const u32 part = threadIdx.x / kThreads;
  for (u32 tile = blockIdx.x * kParts + part; part < kParts && tile < tb.deltas.tiles; tile += gridDim.x * kParts) {
    deltas_tile(tb, tile, threadIdx.x % kThreads);
  }
  __syncthreads();
  for (u32 tile = blockIdx.x * kTableWarps + threadIdx.x / kWarp; tile < tb.dense.tiles;
       tile += gridDim.x * kTableWarps) {
    const float total = warp_sum(dense_tile<T, -1, kGradient, kLayout>(tb.dense, entries, tile, kept));
    if (tb.dense.partial && threadIdx.x % kWarp == 0) tb.dense.partial[tile] = total;
  }
  finish_loss<kTableThreads>(tb.finish);
}

}  // namespace ioubal::cuda
