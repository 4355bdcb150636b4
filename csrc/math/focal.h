// Sigmoid focal loss of one logit, without alpha. gamma = 0 is binary cross entropy.
#pragma once

#include "math/macros.h"

namespace ioubal {

// A negative entry: p^gamma * softplus(x), p = sigmoid(x).
template <class T>
IOUBAL_HD Term<T> focal_negative(T x, T gamma) {
  const T e = std::exp(-std::fabs(x));
  const T log1pe = std::log1p(e);
  const T p = (x < T(0) ? e : T(1)) / (T(1) + e);
  const T one_minus_p = (x < T(0) ? T(1) : e) / (T(1) + e);
  const T softplus = (x > T(0) ? x : T(0)) + log1pe + (x != x ? x : T(0));
  // p^gamma through log p = min(x, 0) - log1p(e): no 0^0 and no 0 * inf at saturated logits.
  const T modulator = gamma == T(0) ? T(1) : std::exp(gamma * ((x < T(0) ? x : T(0)) - log1pe));
  // (1 - p) * softplus tends to 0, also at x = +inf where the product would be 0 * inf.
  const T tail = one_minus_p > T(0) ? one_minus_p * softplus : T(0);
  return {modulator * softplus, modulator * (p + gamma * tail)};
}

// A positive entry is a negative one seen from the other side: (1 - p)^gamma * softplus(-x).
template <class T>
IOUBAL_HD Term<T> focal_positive(T x, T gamma) {
  const Term<T> mirrored = focal_negative(-x, gamma);
  return {mirrored.loss, -mirrored.grad};
}

}  // namespace ioubal
