// What makes a function usable from host and device code. This folder includes no torch header: g++ and nvcc share it.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define IOUBAL_HD __host__ __device__ __forceinline__
#elif !defined(IOUBAL_HD)  // else a file that compiles the formulas for one instruction set
#define IOUBAL_HD inline
#endif

namespace ioubal {

// A loss term and its derivative with respect to the prediction, always computed side by side.
template <class T>
struct Term {
  T loss;
  T grad;
};

// `?:` for formulas that are evaluated on vectors as well, both sides always.
template <class T>
IOUBAL_HD T select(bool condition, T a, T b) {
  return condition ? a : b;
}

// The same of functions, of which a scalar evaluates one.
template <class A, class B>
IOUBAL_HD auto choose(bool condition, const A& a, const B& b) {
  return condition ? a() : b();
}

// Comparisons written so that a NaN first argument is returned, never hidden.
template <class T>
IOUBAL_HD T clamp(T value, T low, T high) {
  return select(value < low, low, select(value > high, high, value));
}

}  // namespace ioubal
