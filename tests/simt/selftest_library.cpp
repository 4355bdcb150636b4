// Half of a shared library: built twice, with -DPART=first and -DPART=second, to prove that the emulation may be
// included by several files of one library and called from any thread.
#include "simt.h"

#define CONCATENATED(a, b) a##b
#define NAMED(a, b) CONCATENATED(a, b)

// In both halves, as kernels in headers are. out[b]: the sum of block b's numbers 0, 1, ..., threads - 1.
template <class T>
inline void sum_kernel(T* out) {
  __shared__ T x[1024];
  x[threadIdx.x] = T(threadIdx.x);
  for (unsigned half = blockDim.x / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) x[threadIdx.x] += x[threadIdx.x + half];
  }
  if (threadIdx.x == 0) out[blockIdx.x] = x[0];
}

extern "C" void NAMED(sum_, PART)(double* out, int blocks, int threads) {
  simt::launch(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), [&] { sum_kernel(out); });
}

extern "C" unsigned long NAMED(launches_, PART)() { return simt::launches(); }
