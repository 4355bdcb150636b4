// Proves the SIMT emulation itself: what is right gives the same bits in every order, every misuse is found.
//   selftest MODE     exit status 0, or an abort with a message where the mode misuses the machine
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "simt.h"

namespace {

constexpr unsigned kFull = 0xffffffffu;
constexpr unsigned kSeeds = 24;

#define CHECK(condition)                                                         \
  do {                                                                           \
    if (!(condition)) {                                                          \
      std::fprintf(stderr, "line %d: CHECK(%s) failed\n", __LINE__, #condition); \
      std::exit(1);                                                              \
    }                                                                            \
  } while (0)

// ---- kernels

__device__ float warp_sum(float v) {
  for (int lanes = 16; lanes; lanes >>= 1) v += __shfl_xor_sync(kFull, v, lanes);
  return v;
}

template <bool kBarrier>
__global__ void __launch_bounds__(1024) sum_kernel(const float* __restrict__ x, float* out, unsigned n) {
  __shared__ float partial[32];
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, warps = (blockDim.x + 31) / 32;
  const float v = warp_sum(i < n ? x[i] : 0.f);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  if (kBarrier) __syncthreads();
  if (threadIdx.x < 32) {
    const float total = warp_sum(threadIdx.x < warps ? partial[threadIdx.x] : 0.f);
    if (threadIdx.x == 0) out[blockIdx.x] = total;
  }
}

template <class T>
inline bool is_nan_at_first(T* out) {
  __shared__ T value;
  const bool nan = value != value;
  __syncthreads();
  value = T(threadIdx.x);
  *out = value;
  return nan;
}

struct Big {
  float4 a[64];
};

__global__ void by_value_kernel(const __grid_constant__ Big big, float* out) {
  atomicAdd(reinterpret_cast<unsigned*>(out + 1), 1u);
  out[0] = big.a[threadIdx.x].w;
}

// ---- what must work

void orders() {
  for (const unsigned block : {32u, 256u, 1024u}) {
    constexpr unsigned kBlocks = 5;
    const unsigned n = kBlocks * block - 3;
    std::vector<float> x(n), first(kBlocks), out(kBlocks);
    for (unsigned i = 0; i < n; ++i) x[i] = std::sin(float(i)) * float(1 << i % 13);
    for (unsigned seed = 0; seed < kSeeds; ++seed) {
      simt::seed(seed);
      const unsigned long before = simt::launches();
      simt::launch(kBlocks, block, [&] { sum_kernel<true>(x.data(), out.data(), n); });
      CHECK(simt::launches() == before + 1);
      if (seed == 0) first = out;
      CHECK(std::memcmp(first.data(), out.data(), sizeof(float) * kBlocks) == 0);
    }
    float sum = 0, want = 0;
    for (float v : out) sum += v;
    for (float v : x) want += v;
    CHECK(std::fabs(sum - want) < 1e-2f * n);
  }
}

// The orders of blocks, warps and lanes differ from seed to seed, and are the same for the same seed.
void shuffled() {
  std::set<std::vector<unsigned>> seen;
  for (unsigned seed = 0; seed < 2 * kSeeds; ++seed) {
    simt::seed(seed % kSeeds);
    std::vector<unsigned> order;
    simt::launch(3, 96, [&] { order.push_back(blockIdx.x * 96 + threadIdx.x); });
    CHECK(order.size() == 3 * 96 && std::set<unsigned>(order.begin(), order.end()).size() == order.size());
    seen.insert(order);
  }
  CHECK(seen.size() == kSeeds);
}

void indices() {
  std::set<std::vector<unsigned>> seen;
  simt::launch(dim3(3, 2, 4), dim3(5, 3, 2), [&] {
    CHECK(gridDim.x == 3 && gridDim.y == 2 && gridDim.z == 4 && blockDim.x == 5 && blockDim.y == 3 && blockDim.z == 2);
    __syncthreads();
    seen.insert({blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z});
  });
  CHECK(seen.size() == 24 * 30 && *seen.rbegin() == std::vector<unsigned>({2, 1, 3, 4, 2, 1}));
}

void collectives() {
  for (unsigned seed = 0; seed < kSeeds; ++seed) {
    simt::seed(seed);
    simt::launch(2, 128, [&] {
      const int lane = threadIdx.x % 32, base = threadIdx.x - lane;
      const int id = static_cast<int>(threadIdx.x);
      CHECK(__shfl_sync(kFull, id, 3) == base + 3);
      CHECK(__shfl_sync(kFull, id, 35) == base + 3);
      CHECK(__shfl_sync(kFull, id, 3, 8) == id / 8 * 8 + 3);
      CHECK(__shfl_up_sync(kFull, id, 2) == (lane < 2 ? id : id - 2));
      CHECK(__shfl_up_sync(kFull, id, 2, 16) == (lane % 16 < 2 ? id : id - 2));
      CHECK(__shfl_down_sync(kFull, id, 5) == (lane > 26 ? id : id + 5));
      CHECK(__shfl_down_sync(kFull, id, 5, 8) == (lane % 8 > 2 ? id : id + 5));
      CHECK(__shfl_xor_sync(kFull, id, 17) == (id ^ 17));
      CHECK(__shfl_xor_sync(kFull, id * 1e-30, 1) == (id ^ 1) * 1e-30);
      CHECK(__shfl_xor_sync(kFull, -1LL - id, 31) == -1LL - (id ^ 31));
      CHECK(__ballot_sync(kFull, lane % 3 == 0) == 0x49249249u);
      CHECK(__any_sync(kFull, lane == 7) == 1 && __any_sync(kFull, 0) == 0);
      CHECK(__all_sync(kFull, lane != 7) == 0 && __all_sync(kFull, 5) == 1);
      __syncwarp();
      if (lane < 16) {  // part of a warp, named in the mask; the others go another way
        CHECK(__shfl_xor_sync(0xffffu, id, 1) == (id ^ 1));
        CHECK(__ballot_sync(0xffffu, 1) == 0xffffu);
      } else {
        CHECK(__all_sync(0xffff0000u, 1));
      }
      __syncthreads();
      if (lane == 9) return;  // the live lanes of a mask are enough; the value of the others is undefined
      CHECK(__ballot_sync(kFull, 1) == ~(1u << 9));
      const float v = __shfl_sync(kFull, 1.f, 9);
      CHECK(v != v);
    });
  }
  simt::launch(1, 40, [&] { CHECK(__ballot_sync(kFull, 1) == (threadIdx.x < 32 ? kFull : 0xffu)); });
}

void intrinsics() {
  static_assert(alignof(float4) == 16 && alignof(uint2) == 8 && alignof(ushort4) == 8 && sizeof(int4) == 16, "");
  CHECK(__popc(0xf0u) == 4 && __clz(1) == 31 && __clz(0) == 32 && __ffs(8) == 4 && __ffs(0) == 0);
  CHECK(__umulhi(0x80000000u, 6) == 3 && __float_as_uint(1.f) == 0x3f800000u && __uint_as_float(0x40000000u) == 2.f);
  CHECK(__double_as_longlong(1.0) == 0x3ff0000000000000LL);
  CHECK(__funnelshift_r(0xf0u, 0x5u, 4) == 0x5000000fu && __funnelshift_l(0xf0000000u, 0x5u, 4) == 0x5fu);
  unsigned u = 5;
  CHECK(atomicAdd(&u, 3) == 5 && atomicOr(&u, 16) == 8 && u == 24 && atomicMax(&u, 30) == 24 && u == 30);
  int i = -2;
  CHECK(atomicMin(&i, -1) == -2 && i == -2 && atomicMin(&i, -7) == -2 && i == -7 && atomicAdd(&i, 1) == -7);
  float out[2] = {};
  Big big{};
  big.a[2].w = 7;
  simt::launch(1, 3, [&] { by_value_kernel(big, out); });
  CHECK(__float_as_uint(out[1]) == 3 && (out[0] == 0.f || out[0] == 7.f));
}

// In a template, in every block: nothing of the block before is left.
void uninitialised_shared() {
  float f;
  double d;
  simt::launch(50, 64, [&] { CHECK(is_nan_at_first(&f) && is_nan_at_first(&d)); });
  simt::launch(2, 1, [&] {
    __shared__ uint16_t half, table[3][5];
    __shared__ int number;
    CHECK((half & 0x7c00) == 0x7c00 && (half & 0x3ff) && (half & 0x7f80) == 0x7f80 && (half & 0x7f));
    CHECK((number > 500000 || number < -500000) && table[2][4] == half);
    half = table[2][4] = 0, number = 0;
  });
}

// ---- what must be found

void missing_barrier() {
  std::vector<float> x(256, 1.f);
  unsigned wrong = 0;
  float out = 0;
  for (unsigned seed = 0; seed < kSeeds; ++seed) {
    simt::seed(seed);
    simt::launch(1, 256, [&] { sum_kernel<false>(x.data(), &out, 256); });
    wrong += out != 256.f;
  }
  std::fprintf(stderr, "wrong under %u of %u seeds, the last is %f\n", wrong, kSeeds, out);
  CHECK(wrong >= kSeeds / 2);
}

void divergent_shuffle() {
  simt::launch(4, 64, [] {
    if (threadIdx.x != 37) __shfl_xor_sync(kFull, 1.f, 1);
    __syncthreads();
  });
}

void different_collectives() {
  simt::launch(1, 32, [] {
    if (threadIdx.x < 4) {
      __ballot_sync(kFull, 1);
    } else {
      __syncwarp();
    }
  });
}

void different_lines() {
  simt::launch(1, 32, [] {
    if (threadIdx.x < 4) {
      __syncwarp();
    } else {
      __syncwarp();
    }
  });
}

void foreign_mask() {
  simt::launch(1, 32, [] { __syncwarp(0xffffu); });
}

void exited_at_barrier() {
  simt::launch(1, 64, [] {
    if (threadIdx.x == 40) return;
    __syncthreads();
  });
}

void different_barriers() {
  simt::launch(1, 64, [] {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  });
}

// Half a warp waits for the block, the other half for the first one.
void deadlock() {
  simt::launch(1, 64, [] {
    if (threadIdx.x % 32 < 16) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  });
}

void endless_wait() {
  static volatile int flag = 0;
  simt::launch(2, 32, [] {
    while (!flag && blockIdx.x < 2) {
    }
    flag = 1;
  });
}

void global_overflow() {
  const std::unique_ptr<float[]> x(new float[255]), out(new float[1]);
  simt::launch(1, 256, [&] { sum_kernel<true>(x.get(), out.get(), 256); });
}

void misaligned_vector() {
  alignas(16) float x[9] = {};
  simt::launch(1, 2, [&] {
    const float4 v = *reinterpret_cast<const float4*>(x + 1 + 4 * threadIdx.x);
    CHECK(v.x == 0);
  });
}

void misaligned_bytes() {
  alignas(16) const float x[8] = {};
  simt::launch(1, 2, [&] { simt::check_aligned(x + 2 * threadIdx.x, 16, "load"); });
}

void shared_index() {
  simt::launch(1, 64, [] {
    __shared__ int x[63];
    x[threadIdx.x] = 1;
    CHECK(x[0] == 1 || threadIdx.x);
  });
}

void stack_overflow() {
  simt::launch(1, 32, [] {
    volatile char big[100 << 10];
    for (size_t i = sizeof big; i-- > 0;) big[i] = 1;
  });
}

void big_block() {
  simt::launch(1, 1025, [] {});
}
void big_block_3d() {
  simt::launch(1, dim3(32, 32, 2), [] {});
}
void empty_grid() {
  simt::launch(0, 32, [] {});
}
void big_grid() {
  simt::launch(0x80000000u, 32, [] {});
}
void launch_inside() {
  simt::launch(1, 1, [] { simt::launch(1, 1, [] {}); });
}
void outside() { __syncthreads(); }

// ---- for ThreadSanitizer: no order of the threads has to be the wrong one

template <bool kRace>
void neighbours() {
  constexpr unsigned kBlock = 64, kBlocks = 3;
  unsigned out[kBlocks * kBlock], ticket = 0, sum = 0;
  for (int repeat = 0; repeat < 2; ++repeat) {
    simt::launch(kBlocks, kBlock, [&] {
      __shared__ unsigned x[kBlock];
      __shared__ bool last;
      const unsigned i = threadIdx.x;
      x[i] = i;
      if (!kRace) __syncthreads();
      const unsigned left = x[(i + kBlock - 1) % kBlock];
      __syncthreads();
      x[i ^ 1] = left;
      __syncwarp();
      out[blockIdx.x * kBlock + i] = x[i];
      __syncthreads();
      if (i == 0) {
        __threadfence();
        last = atomicAdd(&ticket, 1u) == kBlocks - 1;
      }
      __syncthreads();
      if (!last || i != 0) return;
      __threadfence();
      ticket = sum = 0;
      for (const unsigned v : out) sum += v;
    });
    CHECK(kRace || (ticket == 0 && sum == kBlocks * kBlock * (kBlock - 1) / 2));
  }
}

const std::pair<const char*, void (*)()> kModes[] = {
    {"orders", orders},
    {"shuffled", shuffled},
    {"indices", indices},
    {"collectives", collectives},
    {"intrinsics", intrinsics},
    {"uninitialised_shared", uninitialised_shared},
    {"missing_barrier", missing_barrier},
    {"divergent_shuffle", divergent_shuffle},
    {"different_collectives", different_collectives},
    {"different_lines", different_lines},
    {"foreign_mask", foreign_mask},
    {"exited_at_barrier", exited_at_barrier},
    {"different_barriers", different_barriers},
    {"deadlock", deadlock},
    {"endless_wait", endless_wait},
    {"global_overflow", global_overflow},
    {"misaligned_vector", misaligned_vector},
    {"misaligned_bytes", misaligned_bytes},
    {"shared_index", shared_index},
    {"stack_overflow", stack_overflow},
    {"big_block", big_block},
    {"big_block_3d", big_block_3d},
    {"empty_grid", empty_grid},
    {"big_grid", big_grid},
    {"launch_inside", launch_inside},
    {"outside", outside},
    {"no_race", neighbours<false>},
    {"race", neighbours<true>},
};

}  // namespace

int main(int count, char** arguments) {
  for (const auto& mode : kModes) {
    if (count == 2 && !std::strcmp(arguments[1], mode.first)) {
      mode.second();
      return 0;
    }
  }
  std::fprintf(stderr, "usage: selftest MODE\n");
  return 2;
}
