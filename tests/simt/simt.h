// A small emulation of CUDA's execution model: compiles kernels with g++ and runs them on the CPU, one fiber per
// thread, so that they are proved without a GPU. Test-only. Include it in place of the CUDA headers, launch with
//
//   simt::launch(grid, block, [&] { kernel(arguments...); });
//
// Blocks run one after another; the order of blocks, of warps and of the lanes of a warp is drawn from simt::seed (or
// the environment's IOUBAL_SIMT_SEED), so a missing barrier gives wrong results under some seed. A thread runs until it
// waits in a barrier or a collective.
//
// `__shared__ float x[8];` works as in CUDA, in templates and inline functions too. It is thread-local memory of the
// thread a launch runs on, and before every block all of it is filled with NaN (as half, bfloat16, float and double; as
// integers, numbers that no index or count has). Therefore: the runtime of the sanitizers must be shared (g++'s
// default), not linked into the kernels' library, whose thread-local memory all belongs to the kernels; and two
// libraries with the same kernels in one process need -fvisibility=hidden or -fno-gnu-unique. Not supported: dynamic
// shared memory (`extern __shared__`).
//
// Misuse ends the process with a message "SIMT: ..." on stderr: an invalid launch; a collective that not all live lanes
// of its mask reach at the same line; a barrier that not all threads reach at the same line; a thread that runs for
// IOUBAL_SIMT_TIMEOUT seconds (60; 0: for ever) without reaching any. Values read from lanes that do not take part are
// NaN. AddressSanitizer finds wrong global addresses, UndefinedBehaviorSanitizer misaligned vectors and wrong indices
// of arrays (build with -fno-sanitize-recover=all), ThreadSanitizer data races between the threads of a block. Not
// found: a wrong index of shared memory behind a pointer, races between blocks, lanes that meet in one helper, called
// at different lines.
//
// Several files of one library may include this, and any thread may launch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __shared__ static thread_local

namespace simt {

// Emulates kernel<<<grid, block>>>; returns when all threads have exited. `kernel` takes no argument and calls the
// kernel. Launches from several threads run one after another.
template <class F>
void launch(dim3 grid, dim3 block, F kernel) {
  scheduler.launch(
      grid, block, [](void* f) { (*static_cast<F*>(f))(); }, &kernel,
      []() -> char* {
        static thread_local char here;
        return &here;
      });
}

// Draws the order of all later launches.
inline void seed(unsigned value) { scheduler.seed(value); }

// Number of launches so far.
inline unsigned long launches() { return scheduler.launches(); }

// For a load or store of `bytes` bytes that the kernel leaves to assembly on a GPU.
inline void check_aligned(const void* p, size_t bytes, const char* what) { scheduler.check_aligned(p, bytes, what); }

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class To, class From>
To reinterpret(From value) {
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

// A shuffle: lane `source` if it lies in [low, high], else the own value.
template <class T>
T shuffle(Site site, unsigned mask, T value, int source, int low, int high) {
  const int lane = static_cast<int>(scheduler.lane());
  return reinterpret<T>(scheduler.meet_warp(site, mask, to_bits(value), source < low || source > high ? lane : source));
}
inline int lane_first(int width) { return static_cast<int>(scheduler.lane()) & -width; }
inline int lane_last(int width) { return lane_first(width) + width - 1; }

template <class T>
struct Same {
  using type = T;
  static_assert(std::is_integral<T>::value, "no atomics of floating-point values: a sum has a fixed order");
};
template <class T>
using Value = typename Same<T>::type;

}  // namespace simt

// ---- vectors, aligned as in CUDA ----
#define SIMT_VECTOR2(name, type)          \
  struct alignas(2 * sizeof(type)) name { \
    type x, y;                            \
  };                                      \
  inline name make_##name(type x, type y) { return {x, y}; }
#define SIMT_VECTOR4(name, type)                                  \
  struct alignas(sizeof(type) < 4 ? 4 * sizeof(type) : 16) name { \
    type x, y, z, w;                                              \
  };                                                              \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }
SIMT_VECTOR2(int2, int)
SIMT_VECTOR2(uint2, unsigned)
SIMT_VECTOR2(float2, float)
SIMT_VECTOR2(double2, double)
SIMT_VECTOR2(ushort2, unsigned short)
SIMT_VECTOR2(longlong2, long long)
SIMT_VECTOR4(int4, int)
SIMT_VECTOR4(uint4, unsigned)
SIMT_VECTOR4(float4, float)
SIMT_VECTOR4(ushort4, unsigned short)
#undef SIMT_VECTOR2
#undef SIMT_VECTOR4

// ---- barriers and collectives; the last two arguments are where the call stands ----
#define SIMT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SIMT_HERE) { simt::scheduler.wait_for_block({"__syncthreads", file, line}); }

inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_HERE) {
  simt::scheduler.meet_warp({"__syncwarp", file, line}, mask, 0, simt::kNothing);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_HERE) {
  return simt::shuffle({"__shfl_sync", file, line}, mask, value, simt::lane_first(width) + (source & (width - 1)), 0,
                       31);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_HERE) {
  const int source = static_cast<int>(simt::scheduler.lane()) - static_cast<int>(delta);
  return simt::shuffle({"__shfl_up_sync", file, line}, mask, value, source, simt::lane_first(width), 31);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_HERE) {
  const int source = static_cast<int>(simt::scheduler.lane() + delta);
  return simt::shuffle({"__shfl_down_sync", file, line}, mask, value, source, 0, simt::lane_last(width));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, SIMT_HERE) {
  const int source = static_cast<int>(simt::scheduler.lane()) ^ lanes;
  return simt::shuffle({"__shfl_xor_sync", file, line}, mask, value, source, 0, simt::lane_last(width));
}

inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_HERE) {
  const simt::Site site{"__ballot_sync", file, line};
  return static_cast<unsigned>(simt::scheduler.meet_warp(site, mask, predicate != 0, simt::kBallot));
}

inline int __any_sync(unsigned mask, int predicate, SIMT_HERE) {
  return simt::scheduler.meet_warp({"__any_sync", file, line}, mask, predicate != 0, simt::kBallot) != 0;
}

inline int __all_sync(unsigned mask, int predicate, SIMT_HERE) {
  return simt::scheduler.meet_warp({"__all_sync", file, line}, mask, predicate == 0, simt::kBallot) == 0;
}
#undef SIMT_HERE

// ---- integers and bits ----
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll(static_cast<unsigned long long>(v)) : 64; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline unsigned __float_as_uint(float v) { return simt::reinterpret<unsigned>(v); }
inline int __float_as_int(float v) { return simt::reinterpret<int>(v); }
inline float __uint_as_float(unsigned v) { return simt::reinterpret<float>(v); }
inline float __int_as_float(int v) { return simt::reinterpret<float>(v); }
inline long long __double_as_longlong(double v) { return simt::reinterpret<long long>(v); }
inline double __longlong_as_double(long long v) { return simt::reinterpret<double>(v); }

// ---- memory ----
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// Integers only, on purpose: the kernels must not add floating-point values in an order that varies.
template <class T>
T atomicAdd(T* p, simt::Value<T> v) {
  return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
template <class T>
T atomicOr(T* p, simt::Value<T> v) {
  return __atomic_fetch_or(p, v, __ATOMIC_RELAXED);
}
template <class T>
T atomicExch(T* p, simt::Value<T> v) {
  return __atomic_exchange_n(p, v, __ATOMIC_RELAXED);
}
template <class T>
T atomicMax(T* p, simt::Value<T> v) {
  T old = *p;
  while (old < v && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
template <class T>
T atomicMin(T* p, simt::Value<T> v) {
  T old = *p;
  while (v < old && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
