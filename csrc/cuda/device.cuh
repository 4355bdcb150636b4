// The machine as the kernels see it: special functions, 16-bit conversions, vector access, warp and block sums.
// Compiled by nvcc, or by g++ with -DIOUBAL_SIMT over an emulation of the threads (tests/simt).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "math/box.h"
#include "math/macros.h"

#if defined(IOUBAL_SIMT)
#include "simt.h"
#define IOUBAL_DEVICE inline
#define IOUBAL_GRID_CONSTANT
#else
#define IOUBAL_DEVICE __device__ __forceinline__
#define IOUBAL_GRID_CONSTANT __grid_constant__
#endif

namespace ioubal::cuda {

using u32 = uint32_t;
using u64 = uint64_t;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr u32 kWarp = 32, kThreads = 256;

#if defined(IOUBAL_SIMT)
// The special-function units are not correctly rounded: be off by their documented worst error, in a way that depends
// on the value alone, as in hardware.
inline float wobble(float value, float relative) {
  u32 bits;
  memcpy(&bits, &value, 4);
  return value * (1.f + relative * (static_cast<int>((bits * 2654435761u >> 16) % 3) - 1));
}
inline float ex2(float t) { return t < -126.f ? 0.f : wobble(exp2f(t), 1.8e-7f); }
inline float rcp(float t) { return t == 1.f ? 1.f : wobble(1.f / t, 1.2e-7f); }
inline float rcbrt(float t) { return wobble(1.f / std::cbrt(t), 1.2e-7f); }
inline float bits_to_float(u32 bits) { return __uint_as_float(bits); }
inline u32 float_to_bits(float value) { return __float_as_uint(value); }
// Not by _Float16, which g++ knows on x86 from version 12 on.
inline float half_to_float(uint16_t bits) {
  const u32 sign = (bits & 0x8000u) << 16, size = (bits & 0x7fffu) << 13;
  const u32 exact = float_to_bits(bits_to_float(size) * 0x1p112f);  // the exponents' bias; right for denormals, too
  return bits_to_float(sign | (size >= 0x0f800000 ? size + 0x70000000 : exact));
}
inline u32 float_to_half(float value) {
  const u32 bits = float_to_bits(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (value != value) return 0x7fffu;
  if (size >= 0x477ff000) return sign | 0x7c00;                                                  // 65520 and more
  if (size < 0x38800000) return sign | (float_to_bits(bits_to_float(size) + .5f) - 0x3f000000);  // multiples of 2^-24
  return sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
}
inline u32 float_to_bfloat(float value) {
  const u32 bits = float_to_bits(value);
  return value != value ? 0x7fffu : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 pack(float low, float high, BFloat16) { return float_to_bfloat(low) | float_to_bfloat(high) << 16; }
inline u32 pack(float low, float high, Float16) { return float_to_half(low) | float_to_half(high) << 16; }
template <int kBytes>
void load_bytes(const void* p, u32* words) {
  simt::check_aligned(p, kBytes, "load");
  words[0] = 0;
  memcpy(words, p, kBytes);
}
template <int kBytes>
void store_bytes(void* p, const u32* words) {
  simt::check_aligned(p, kBytes, "store");
  memcpy(p, words, kBytes);
}
inline float load_shared_by_blocks(const float* p) { return *p; }
inline u32 count_up(u32* counter) { return atomicAdd(counter, 1u); }
#else
IOUBAL_DEVICE float ex2(float t) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(t));
  return r;
}
// Exactly 1 at 1, which large logits rely on: p = 1 and 1 - p = 0.
IOUBAL_DEVICE float rcp(float t) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(t));
  return r;
}
IOUBAL_DEVICE float rcbrt(float t) { return rcbrtf(t); }  // 1 / cbrt(t)
IOUBAL_DEVICE float bits_to_float(u32 bits) { return __uint_as_float(bits); }
IOUBAL_DEVICE u32 float_to_bits(float value) { return __float_as_uint(value); }
IOUBAL_DEVICE float half_to_float(uint16_t bits) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(bits));
  return r;
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
IOUBAL_DEVICE u32 float_to_bfloat(float value) {  // no such instruction before sm_80
  const u32 bits = float_to_bits(value);
  return value != value ? 0x7fffu : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
IOUBAL_DEVICE u32 pack(float low, float high, BFloat16) { return float_to_bfloat(low) | float_to_bfloat(high) << 16; }
IOUBAL_DEVICE u32 pack(float low, float high, Float16) {
  u32 r;
  asm("{.reg .f16 a, b; cvt.rn.f16.f32 a, %1; cvt.rn.f16.f32 b, %2; mov.b32 %0, {a, b};}"
      : "=r"(r)
      : "f"(low), "f"(high));
  return r;
}
#else
IOUBAL_DEVICE u32 pack(float low, float high, BFloat16) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
IOUBAL_DEVICE u32 pack(float low, float high, Float16) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
#endif
// Each logit is read once: do not let it push the labels out of L1. Volatile and relaxed.gpu, of which neither nvcc nor
// ptxas changes the place: a plain load moves down to its first use, behind branches and the arithmetic of other
// loads, and a thread waits for one vector after another instead of for all at once.
template <int kBytes>
IOUBAL_DEVICE void load_bytes(const void* p, u32* words) {
  if constexpr (kBytes == 16) {
    asm volatile("ld.relaxed.gpu.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(p));
  } else if constexpr (kBytes == 8) {
    asm volatile("ld.relaxed.gpu.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "l"(p));
  } else if constexpr (kBytes == 4) {
    asm volatile("ld.relaxed.gpu.global.L1::no_allocate.u32 %0, [%1];" : "=r"(words[0]) : "l"(p));
  } else {
    uint16_t half;
    asm volatile("ld.relaxed.gpu.global.L1::no_allocate.u16 %0, [%1];" : "=h"(half) : "l"(p));
    words[0] = half;
  }
}
// Volatile and a barrier for the compiler: a positive's gradient is stored after the vector that holds its place.
template <int kBytes>
IOUBAL_DEVICE void store_bytes(void* p, const u32* words) {
  if constexpr (kBytes == 16) {
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3])
                 : "memory");
  } else if constexpr (kBytes == 8) {
    asm volatile("st.global.v2.u32 [%0], {%1,%2};" ::"l"(p), "r"(words[0]), "r"(words[1]) : "memory");
  } else if constexpr (kBytes == 4) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(p), "r"(words[0]) : "memory");
  } else {
    asm volatile("st.global.u16 [%0], %1;" ::"l"(p), "h"(static_cast<uint16_t>(words[0])) : "memory");
  }
}
// What other blocks of the same launch have written lies in L2, not in this multiprocessor's L1.
IOUBAL_DEVICE float load_shared_by_blocks(const float* p) { return __ldcg(p); }
// Adds 1 and returns what it was. What this thread has written is there for those who see the new number and then
// fence. Every block does it at its end: a release costs less than __threadfence, which is sequentially consistent.
IOUBAL_DEVICE u32 count_up(u32* counter) {
  u32 before;
  asm volatile("atom.release.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
#endif

// kCount elements of T in registers, as they lie in memory.
template <class T, int kCount>
struct Vec {
  static constexpr int kBytes = kCount * static_cast<int>(sizeof(T)), kWords = (kBytes + 3) / 4;
  u32 words[kWords];

  IOUBAL_DEVICE void load(const T* p) { load_bytes<kBytes>(p, words); }
  IOUBAL_DEVICE void store(T* p) const { store_bytes<kBytes>(p, words); }
  IOUBAL_DEVICE void unpack(float (&x)[kCount]) const { unpack_as(x, T()); }
  IOUBAL_DEVICE void set(const float (&x)[kCount]) { pack_as(words, x, T()); }
  IOUBAL_DEVICE static void store(T* p, const float (&x)[kCount]) {
    Vec packed;
    packed.set(x);
    packed.store(p);
  }

 private:
  IOUBAL_DEVICE void unpack_as(float (&x)[kCount], float) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) x[j] = bits_to_float(words[j]);
  }
  IOUBAL_DEVICE void unpack_as(float (&x)[kCount], BFloat16) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) x[j] = bits_to_float(j & 1 ? words[j / 2] & 0xffff0000u : words[j / 2] << 16);
  }
  IOUBAL_DEVICE void unpack_as(float (&x)[kCount], Float16) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      x[j] = half_to_float(static_cast<uint16_t>(j & 1 ? words[j / 2] >> 16 : words[j / 2]));
    }
  }
  IOUBAL_DEVICE static void pack_as(u32 (&packed)[kWords], const float (&x)[kCount], float) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) packed[j] = float_to_bits(x[j]);
  }
  template <class Half>
  IOUBAL_DEVICE static void pack_as(u32 (&packed)[kWords], const float (&x)[kCount], Half half) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      packed[i] = pack(x[2 * i], 2 * i + 1 < kCount ? x[2 * i + 1 < kCount ? 2 * i + 1 : 0] : 0.f, half);
    }
  }
};

template <class T>
IOUBAL_DEVICE float load_one(const T* p) {
  Vec<T, 1> v;
  float x[1];
  v.load(p);
  v.unpack(x);
  return x[0];
}
template <class T>
IOUBAL_DEVICE void store_one(T* p, float value) {
  const float x[1] = {value};
  Vec<T, 1>::store(p, x);
}

// n / divisor for n < 2^31 and any divisor in [1, 2^31): a 64-bit division costs some 70 instructions.
struct FastDiv {
  u32 divisor, multiplier, shift;
  static FastDiv make(u32 divisor) {
    u32 shift = 0;
    while ((u64(1) << shift) < divisor) ++shift;
    return {divisor, static_cast<u32>((u64(1) << (31 + shift)) / divisor + 1), shift};
  }
  IOUBAL_DEVICE u32 div(u32 n) const { return __umulhi(2 * n, multiplier) >> shift; }
};

// ---- tensors of a dtype known at run time, for the few elements that are not worth a kernel of their own

enum class Dtype : int { kFloat32, kBFloat16, kFloat16, kFloat64 };

struct FloatRef {
  const void* data;
  Dtype type;
  IOUBAL_DEVICE double operator[](int64_t at) const {
    switch (type) {
      case Dtype::kFloat32: return static_cast<const float*>(data)[at];
      case Dtype::kBFloat16: return bits_to_float(static_cast<u32>(static_cast<const uint16_t*>(data)[at]) << 16);
      case Dtype::kFloat16: return half_to_float(static_cast<const uint16_t*>(data)[at]);
      default: return static_cast<const double*>(data)[at];
    }
  }
  IOUBAL_DEVICE double get(int64_t at, double otherwise) const { return data ? (*this)[at] : otherwise; }
  // Four elements, `step` apart. A switch for each would wait for one before it asks for the next.
  IOUBAL_DEVICE Quad<double> four(int64_t at, int64_t step = 1) const {
    switch (type) {
      case Dtype::kFloat32: return four_of<float>(at, step, [](float x) { return x; });
      case Dtype::kBFloat16:
        return four_of<uint16_t>(at, step, [](uint16_t x) { return bits_to_float(static_cast<u32>(x) << 16); });
      case Dtype::kFloat16: return four_of<uint16_t>(at, step, [](uint16_t x) { return half_to_float(x); });
      default: return four_of<double>(at, step, [](double x) { return x; });
    }
  }

 private:
  template <class T, class Widen>
  IOUBAL_DEVICE Quad<double> four_of(int64_t at, int64_t step, Widen widen) const {
    const T* const p = static_cast<const T*>(data) + at;
    const T a = p[0], b = p[step], c = p[2 * step], d = p[3 * step];
    return {{widen(a), widen(b), widen(c), widen(d)}};
  }
};

struct IntRef {
  const void* data;
  bool wide;  // int64, else int32
  IOUBAL_DEVICE int64_t operator[](int64_t at) const {
    return wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
  }
};

struct FloatOut {
  void* data;
  Dtype type;
  IOUBAL_DEVICE void set(int64_t at, float value) const {
    switch (type) {
      case Dtype::kFloat32: static_cast<float*>(data)[at] = value; break;
      case Dtype::kBFloat16: store_one(static_cast<BFloat16*>(data) + at, value); break;
      case Dtype::kFloat16: store_one(static_cast<Float16*>(data) + at, value); break;
      default: static_cast<double*>(data)[at] = value;
    }
  }
};

// A number that Python knows, or that is still in a float tensor on the device.
struct NumberRef {
  FloatRef tensor;
  double value;
  bool per_image;
  IOUBAL_DEVICE double get(int64_t image = 0) const { return tensor.data ? tensor[per_image ? image : 0] : value; }
};

// ---- sums in a fixed order: bitwise the same in every run

// Sum of load(first), load(first + step), ... below count. Several are loaded before the first is added: what a thread
// waits for is otherwise one load after the other.
template <class T, u32 kBatch = 8, class Load>
IOUBAL_DEVICE T strided_sum(u32 first, u32 count, u32 step, Load load) {
  T sum = 0;
#pragma unroll 1
  for (u32 i = first; i < count; i += kBatch * step) {
    T value[kBatch];
#pragma unroll
    for (u32 k = 0; k < kBatch; ++k) value[k] = i + k * step < count ? load(i + k * step) : T(0);
#pragma unroll
    for (u32 k = 0; k < kBatch; ++k) sum += value[k];
  }
  return sum;
}

// Sum over the warp, in every lane.
template <class T>
IOUBAL_DEVICE T warp_sum(T value) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// Sum over this lane and those before it. By all lanes.
IOUBAL_DEVICE u32 warp_scan(u32 value) {
#pragma unroll
  for (u32 distance = 1; distance < kWarp; distance *= 2) {
    const u32 before = __shfl_up_sync(~0u, value, distance);
    value += threadIdx.x % kWarp >= distance ? before : 0;
  }
  return value;
}

// Sum over the block of kBlock threads, valid in thread 0. `scratch` is shared memory of one T per warp; a barrier
// must lie between two uses.
template <u32 kBlock = kThreads, class T>
IOUBAL_DEVICE T block_sum(T value, T* scratch) {
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x >= kWarp) return T(0);
  return warp_sum(threadIdx.x < kBlock / kWarp ? scratch[threadIdx.x] : T(0));
}

}  // namespace ioubal::cuda
