// The AVX-512 intrinsics that csrc/cpu/*.inc use, in portable C++: so that the wide kernels are tested on any machine.
// Approximations are emulated at their documented worst error.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

typedef float __m512 __attribute__((vector_size(64), aligned(4)));
typedef float __m256 __attribute__((vector_size(32), aligned(4)));
typedef int32_t __m512i __attribute__((vector_size(64), aligned(4)));
typedef int32_t __m256i __attribute__((vector_size(32), aligned(4)));
typedef int32_t __m128i __attribute__((vector_size(16), aligned(4)));
typedef uint16_t half_bits __attribute__((vector_size(32)));
typedef uint16_t line_bits __attribute__((vector_size(64)));
typedef uint16_t __mmask16;
typedef __m256i __m256bh;
typedef __m512i __m512bh;
#define _MM_FROUND_TO_NEAREST_INT 0
#define _MM_FROUND_NO_EXC 8
#define EMULATE static inline

template <class F>
EMULATE __m512 lanes(const F& f) {
  __m512 r;
  for (int i = 0; i < 16; ++i) r[i] = f(i);
  return r;
}

EMULATE __m512 _mm512_set1_ps(float a) { return lanes([&](int) { return a; }); }
EMULATE __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
EMULATE __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
EMULATE __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
EMULATE __m512 _mm512_div_ps(__m512 a, __m512 b) { return a / b; }
enum { _CMP_EQ_OQ = 0, _CMP_GT_OQ = 30 };
EMULATE __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  int m = 0;
  for (int i = 0; i < 16; ++i) m |= (predicate == _CMP_EQ_OQ ? a[i] == b[i] : a[i] > b[i]) << i;
  return static_cast<__mmask16>(m);
}
EMULATE __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) { return lanes([&](int i) { return std::fma(a[i], b[i], c[i]); }); }
EMULATE __m512 _mm512_fmsub_ps(__m512 a, __m512 b, __m512 c) { return lanes([&](int i) { return std::fma(a[i], b[i], -c[i]); }); }
EMULATE __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) { return lanes([&](int i) { return std::fma(-a[i], b[i], c[i]); }); }
EMULATE __m512 _mm512_max_ps(__m512 a, __m512 b) { return lanes([&](int i) { return a[i] > b[i] ? a[i] : b[i]; }); }
EMULATE __m512 _mm512_min_ps(__m512 a, __m512 b) { return lanes([&](int i) { return a[i] < b[i] ? a[i] : b[i]; }); }
// Relative error up to 2^-14, of either sign.
EMULATE __m512 _mm512_rcp14_ps(__m512 a) {
  return lanes([&](int i) { return static_cast<float>(1.0 / a[i] * (i % 2 ? 1 + 0x1p-14 : 1 - 0x1p-14)); });
}
EMULATE __m512 _mm512_scalef_ps(__m512 a, __m512 b) {
  return lanes([&](int i) {
    if (std::isnan(b[i])) return b[i];
    if (std::isinf(b[i])) return b[i] > 0 ? a[i] * b[i] : 0.f;
    return std::ldexp(a[i], static_cast<int>(std::fmax(std::floor(b[i]), -1000.f)));
  });
}
EMULATE __m512i _mm512_castps_si512(__m512 a) { return (__m512i)a; }
EMULATE __m512 _mm512_castsi512_ps(__m512i a) { return (__m512)a; }
EMULATE __m512i _mm512_set1_epi32(int a) { return __m512i{} + a; }
EMULATE __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
EMULATE __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
EMULATE __m512i _mm512_add_epi32(__m512i a, __m512i b) { return a + b; }
EMULATE __m512i _mm512_sub_epi32(__m512i a, __m512i b) { return a - b; }
EMULATE __m512i _mm512_max_epi32(__m512i a, __m512i b) { return a > b ? a : b; }
EMULATE __m512i _mm512_max_epi16(__m512i a, __m512i b) {
  typedef int16_t short_lanes __attribute__((vector_size(64)));
  const short_lanes x = (short_lanes)a, y = (short_lanes)b;
  return (__m512i)(x > y ? x : y);
}
template <class... I>
EMULATE __m512i _mm512_set_epi32(I... from_the_last) {
  const int32_t values[] = {static_cast<int32_t>(from_the_last)...};
  static_assert(sizeof(values) == 64, "16 lanes");
  __m512i r;
  for (int i = 0; i < 16; ++i) r[i] = values[15 - i];
  return r;
}
// The lowest four bits of an index choose a lane, the fifth the source.
EMULATE __m512i _mm512_permutex2var_epi32(__m512i a, __m512i index, __m512i b) {
  __m512i r;
  for (int i = 0; i < 16; ++i) r[i] = (index[i] & 16 ? b : a)[index[i] & 15];
  return r;
}
EMULATE __m512i _mm512_maskz_permutexvar_epi16(uint32_t mask, __m512i index, __m512i a) {
  const line_bits places = (line_bits)index, values = (line_bits)a;
  line_bits r;
  for (int i = 0; i < 32; ++i) r[i] = mask >> i & 1 ? values[places[i] & 31] : 0;
  return (__m512i)r;
}
// The one kind that is used: the smaller size of two, NaN being none, with the sign bit set.
EMULATE __m512 _mm512_range_ps(__m512 a, __m512 b, int kind) {
  if (kind != 0b1110) __builtin_trap();
  return lanes([&](int i) { return -std::fmin(std::fabs(a[i]), std::fabs(b[i])); });
}
EMULATE __mmask16 _mm512_cmpneq_epi32_mask(__m512i a, __m512i b) {
  int m = 0;
  for (int i = 0; i < 16; ++i) m |= (a[i] != b[i]) << i;
  return static_cast<__mmask16>(m);
}
EMULATE __m512i _mm512_srai_epi32(__m512i a, int n) { return a >> n; }
EMULATE __m512 _mm512_cvtepi32_ps(__m512i a) { return __builtin_convertvector(a, __m512); }
EMULATE __mmask16 _mm512_cmpgt_epi32_mask(__m512i a, __m512i b) {
  int m = 0;
  for (int i = 0; i < 16; ++i) m |= (a[i] > b[i]) << i;
  return static_cast<__mmask16>(m);
}
EMULATE __m512i _mm512_slli_epi32(__m512i a, int n) { return a << n; }
EMULATE __m512i _mm512_srli_epi32(__m512i a, int n) {
  typedef uint32_t unsigned_lanes __attribute__((vector_size(64)));
  return (__m512i)((unsigned_lanes)a >> n);
}
EMULATE __mmask16 _mm512_movepi32_mask(__m512i a) {
  int m = 0;
  for (int i = 0; i < 16; ++i) m |= (a[i] < 0) << i;
  return static_cast<__mmask16>(m);
}
EMULATE __mmask16 _mm_movepi8_mask(__m128i a) {
  int8_t bytes[16];
  std::memcpy(bytes, &a, 16);
  int m = 0;
  for (int i = 0; i < 16; ++i) m |= (bytes[i] < 0) << i;
  return static_cast<__mmask16>(m);
}
EMULATE __m512 _mm512_mask_blend_ps(__mmask16 m, __m512 a, __m512 b) { return lanes([&](int i) { return m >> i & 1 ? b[i] : a[i]; }); }
EMULATE __m512 _mm512_maskz_mov_ps(__mmask16 m, __m512 a) { return lanes([&](int i) { return m >> i & 1 ? a[i] : 0.f; }); }
EMULATE float _mm512_reduce_add_ps(__m512 a) {
  for (int step = 8; step; step /= 2) {
    for (int i = 0; i < step; ++i) a[i] += a[i + step];
  }
  return a[0];
}
EMULATE float _mm512_reduce_max_ps(__m512 a) {
  for (int i = 1; i < 16; ++i) a[0] = a[i] > a[0] ? a[i] : a[0];
  return a[0];
}

template <class V>
EMULATE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
EMULATE __m512 _mm512_loadu_ps(const void* p) { return load<__m512>(p); }
EMULATE __m256i _mm256_loadu_si256(const __m256i* p) { return load<__m256i>(p); }
EMULATE __m128i _mm_loadu_si128(const __m128i* p) { return load<__m128i>(p); }
EMULATE void _mm512_storeu_ps(void* p, __m512 a) { std::memcpy(p, &a, 64); }
EMULATE void _mm512_storeu_si512(void* p, __m512i a) { std::memcpy(p, &a, 64); }
EMULATE __m512i _mm512_loadu_si512(const void* p) { return load<__m512i>(p); }
// Streaming stores: whole lines only.
EMULATE void _mm512_stream_si512(__m512i* p, __m512i a) {
  if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_trap();
  std::memcpy(p, &a, 64);
}
EMULATE void _mm512_stream_ps(void* p, __m512 a) { _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)a); }
EMULATE void _mm256_storeu_si256(__m256i* p, __m256i a) { std::memcpy(p, &a, 32); }

EMULATE __m512 _mm512_cvtph_ps(__m256i a) {
  const half_bits bits = (half_bits)a;
  return lanes([&](int i) { return static_cast<float>(c10::Half(bits[i], c10::Half::from_bits())); });
}
EMULATE __m512i _mm512_cvtepu16_epi32(__m256i a) {
  const half_bits bits = (half_bits)a;
  __m512i r;
  for (int i = 0; i < 16; ++i) r[i] = bits[i];
  return r;
}
EMULATE __m256i _mm512_cvtps_ph(__m512 a, int) {
  half_bits bits;
  for (int i = 0; i < 16; ++i) bits[i] = c10::Half(a[i]).x;
  return (__m256i)bits;
}
EMULATE __m256i _mm512_cvtepi32_epi16(__m512i a) {
  half_bits bits;
  for (int i = 0; i < 16; ++i) bits[i] = static_cast<uint16_t>(a[i]);
  return (__m256i)bits;
}
EMULATE __m256bh _mm512_cvtneps_pbh(__m512 a) {
  half_bits bits;
  for (int i = 0; i < 16; ++i) bits[i] = c10::BFloat16(a[i]).x;
  return (__m256bh)bits;
}
EMULATE __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  line_bits bits;
  for (int i = 0; i < 16; ++i) bits[i] = c10::BFloat16(low[i]).x, bits[i + 16] = c10::BFloat16(high[i]).x;
  return (__m512bh)bits;
}
EMULATE __m512i _mm512_castsi256_si512(__m256i a) {
  __m512i r = {};
  std::memcpy(&r, &a, 32);
  return r;
}
EMULATE __m512i _mm512_inserti64x4(__m512i a, __m256i b, int upper) {
  std::memcpy(reinterpret_cast<char*>(&a) + 32 * upper, &b, 32);
  return a;
}

// Bytes and halves of a line, for csrc/cpu/octave_table.inc.
typedef uint64_t __mmask64;
typedef uint32_t __mmask32;
typedef uint8_t line_bytes __attribute__((vector_size(64)));
template <class L, class F>
EMULATE __m512i line_of(const F& f) {
  L r;
  for (int i = 0; i < static_cast<int>(64 / sizeof(r[0])); ++i) r[i] = f(i);
  return (__m512i)r;
}
template <class L, class F>
EMULATE uint64_t mask_of(const F& f) {
  uint64_t m = 0;
  for (int i = 0; i < static_cast<int>(64 / sizeof(L{}[0])); ++i) m |= static_cast<uint64_t>(f(i)) << i;
  return m;
}
EMULATE __m512i _mm512_setzero_si512() { return __m512i{}; }
EMULATE __m512i _mm512_set1_epi16(short a) { return (__m512i)(line_bits{} + static_cast<uint16_t>(a)); }
EMULATE __m512i _mm512_set1_epi8(char a) { return (__m512i)(line_bytes{} + static_cast<uint8_t>(a)); }
EMULATE __m512i _mm512_add_epi16(__m512i a, __m512i b) { return (__m512i)((line_bits)a + (line_bits)b); }
EMULATE __m512i _mm512_sub_epi16(__m512i a, __m512i b) { return (__m512i)((line_bits)a - (line_bits)b); }
EMULATE __m512i _mm512_srli_epi16(__m512i a, int n) { return (__m512i)((line_bits)a >> n); }
EMULATE __m512i _mm512_mask_max_epu16(__m512i otherwise, __mmask32 m, __m512i a, __m512i b) {
  const line_bits x = (line_bits)a, y = (line_bits)b, o = (line_bits)otherwise;
  return line_of<line_bits>([&](int i) { return m >> i & 1 ? (x[i] > y[i] ? x[i] : y[i]) : o[i]; });
}
EMULATE __m512i _mm512_max_epu16(__m512i a, __m512i b) { return _mm512_mask_max_epu16(a, ~0u, a, b); }
// In every 128 bits, eight of a and then eight of b, as signed halves that are cut off at 0 and 255.
EMULATE __m512i _mm512_packus_epi16(__m512i a, __m512i b) {
  const line_bits x = (line_bits)a, y = (line_bits)b;
  return line_of<line_bytes>([&](int i) {
    const int half = static_cast<int16_t>((i % 16 < 8 ? x : y)[i / 16 * 8 + i % 8]);
    return static_cast<uint8_t>(half < 0 ? 0 : half > 255 ? 255 : half);
  });
}
EMULATE __mmask64 _mm512_cmplt_epu8_mask(__m512i a, __m512i b) {
  const line_bytes x = (line_bytes)a, y = (line_bytes)b;
  return mask_of<line_bytes>([&](int i) { return x[i] < y[i]; });
}
EMULATE __mmask64 _mm512_cmpeq_epi8_mask(__m512i a, __m512i b) {
  const line_bytes x = (line_bytes)a, y = (line_bytes)b;
  return mask_of<line_bytes>([&](int i) { return x[i] == y[i]; });
}
EMULATE __mmask32 _mm512_cmpge_epu16_mask(__m512i a, __m512i b) {
  const line_bits x = (line_bits)a, y = (line_bits)b;
  return static_cast<__mmask32>(mask_of<line_bits>([&](int i) { return x[i] >= y[i]; }));
}
EMULATE __m512i _mm512_mask_mov_epi8(__m512i otherwise, __mmask64 m, __m512i a) {
  const line_bytes x = (line_bytes)a, o = (line_bytes)otherwise;
  return line_of<line_bytes>([&](int i) { return m >> i & 1 ? x[i] : o[i]; });
}
EMULATE __m512i _mm512_maskz_mov_epi8(__mmask64 m, __m512i a) { return _mm512_mask_mov_epi8(__m512i{}, m, a); }
EMULATE __m512i _mm512_mask_set1_epi8(__m512i otherwise, __mmask64 m, char a) {
  return _mm512_mask_mov_epi8(otherwise, m, _mm512_set1_epi8(a));
}
// Six bits of an index choose a byte, the seventh the source; where the mask is clear the index stays.
EMULATE __m512i _mm512_mask2_permutex2var_epi8(__m512i a, __m512i index, __mmask64 m, __m512i b) {
  const line_bytes x = (line_bytes)a, y = (line_bytes)b, places = (line_bytes)index;
  return line_of<line_bytes>([&](int i) { return m >> i & 1 ? (places[i] & 64 ? y : x)[places[i] & 63] : places[i]; });
}
// In every 128 bits, elements of the lower or upper halves in turn.
template <class L>
EMULATE __m512i unpack_line(__m512i a, __m512i b, bool upper) {
  constexpr int lane = 16 / sizeof(L{}[0]);
  const L x = (L)a, y = (L)b;
  return line_of<L>([&](int i) { return (i % 2 ? y : x)[i / lane * lane + upper * lane / 2 + i % lane / 2]; });
}
EMULATE __m512i _mm512_unpacklo_epi8(__m512i a, __m512i b) { return unpack_line<line_bytes>(a, b, false); }
EMULATE __m512i _mm512_unpackhi_epi8(__m512i a, __m512i b) { return unpack_line<line_bytes>(a, b, true); }
typedef float line_floats __attribute__((vector_size(64)));
typedef double __m512d __attribute__((vector_size(64)));
EMULATE __m512d _mm512_castps_pd(__m512 a) { return (__m512d)a; }
EMULATE __m512 _mm512_castpd_ps(__m512d a) { return (__m512)a; }
EMULATE __m256 _mm512_castps512_ps256(__m512 a) {
  __m256 r;
  for (int i = 0; i < 8; ++i) r[i] = a[i];
  return r;
}
EMULATE void _mm256_storeu_ps(float* p, __m256 a) { std::memcpy(p, &a, 32); }
EMULATE __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) {
  return (__m512)unpack_line<line_floats>((__m512i)a, (__m512i)b, false);
}
EMULATE __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) {
  return (__m512)unpack_line<line_floats>((__m512i)a, (__m512i)b, true);
}
EMULATE __m512d _mm512_unpacklo_pd(__m512d a, __m512d b) {
  return (__m512d)unpack_line<__m512d>((__m512i)a, (__m512i)b, false);
}
EMULATE __m512d _mm512_unpackhi_pd(__m512d a, __m512d b) {
  return (__m512d)unpack_line<__m512d>((__m512i)a, (__m512i)b, true);
}
// Two lines' 128 bits, two of each, chosen by two bits of `which` each.
EMULATE __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int which) {
  return lanes([&](int i) { return (i < 8 ? a : b)[(which >> (i / 4 * 2) & 3) * 4 + i % 4]; });
}
EMULATE __mmask16 _mm512_cmplt_epi32_mask(__m512i a, __m512i b) { return _mm512_cmpgt_epi32_mask(b, a); }
EMULATE __m512 _mm512_mask_add_ps(__m512 otherwise, __mmask16 m, __m512 a, __m512 b) {
  return lanes([&](int i) { return m >> i & 1 ? a[i] + b[i] : otherwise[i]; });
}
EMULATE __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) { return unpack_line<line_bits>(a, b, false); }
EMULATE __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) { return unpack_line<line_bits>(a, b, true); }
// Whole lines only.
EMULATE __m512i _mm512_load_si512(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_trap();
  return load<__m512i>(p);
}
EMULATE void _mm512_store_si512(void* p, __m512i a) { _mm512_stream_si512(static_cast<__m512i*>(p), a); }
EMULATE uint64_t _pdep_u64(uint64_t a, uint64_t places) {
  uint64_t r = 0;
  for (; places; places &= places - 1, a >>= 1) r |= a & 1 ? places & (0 - places) : 0;
  return r;
}
