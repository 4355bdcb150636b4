// Smooth L1 of one coordinate: 0.5 d^2 / beta below beta, |d| - beta / 2 above; beta = 0 is L1.
#pragma once

#include "math/macros.h"

namespace ioubal {

template <class T, class Beta>  // Beta: T or what T can be divided by and turns into
IOUBAL_HD Term<T> smooth_l1(T difference, Beta beta) {
  using std::fabs;
  const T magnitude = fabs(difference);
  const auto near = [&]() -> Term<T> {
    const T slope = difference / beta;
    return {T(0.5) * difference * difference / beta, slope};
  };
  // The sign of 0 is 0 (beta = 0) and the sign of NaN stays NaN.
  const auto far = [&]() -> Term<T> {
    const T sign = select(difference > T(0), T(1), select(difference < T(0), T(-1), difference));
    return {magnitude - T(0.5) * beta, sign};
  };
  return choose(magnitude < beta, near, far);
}

}  // namespace ioubal
