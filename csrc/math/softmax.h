// Softmax cross entropy of one row of logits.
#pragma once

#include "math/macros.h"

namespace ioubal {

template <class T>
struct RowSum {
  T top;  // the largest logit
  T sum;  // of exp(x - top)
};

template <class T, class Load>
IOUBAL_HD RowSum<T> row_sum(const Load& logit, int64_t columns) {
  T top = logit(0);
  for (int64_t k = 1; k < columns; ++k) top = logit(k) > top || logit(k) != logit(k) ? logit(k) : top;
  T sum = T(0);
  for (int64_t k = 0; k < columns; ++k) sum += std::exp(logit(k) - top);
  return {top, sum};
}

// Loss and slopes (slope(k, d loss / d x_k)) of a row with an infinite or NaN logit, as limits: a single +inf takes all
// the probability, several share it, a NaN makes the row NaN.
template <class T, class Load, class Slope>
IOUBAL_HD T softmax_limit(const Load& logit, int64_t columns, int64_t target, const Slope& slope) {
  int64_t infinite = 0;
  bool nan = false;
  for (int64_t k = 0; k < columns; ++k) {
    nan |= logit(k) != logit(k);
    infinite += logit(k) > T(0) && logit(k) - logit(k) != T(0);
  }
  const RowSum<T> row = row_sum<T>(logit, columns);
  const bool certain = infinite > 0 && logit(target) == row.top;
  // Without a limit: a NaN, nothing but -inf, or the target among several +inf.
  const bool undefined = nan || (certain ? infinite > 1 : infinite == 0 && row.sum != row.sum);
  for (int64_t k = 0; k < columns; ++k) {
    const T p = infinite == 0         ? std::exp(logit(k) - row.top) / row.sum
                : logit(k) == row.top ? T(1) / static_cast<T>(infinite)
                                      : T(0);
    slope(k, undefined ? T(NAN) : p - (k == target ? T(1) : T(0)));
  }
  if (undefined) return T(NAN);
  if (certain) return T(0);
  return infinite > 0 ? row.top : std::log(row.sum) + (row.top - logit(target));
}

}  // namespace ioubal
