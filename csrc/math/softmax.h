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

}  // namespace ioubal
