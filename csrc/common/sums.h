// The tensor of sums that the positives fill and, with a process group, ranks add up: float64 (1 + scopes, 4).
#pragma once

#include "math/balance.h"

namespace ioubal {

struct Sums {
  // Row 0.
  enum Shared : int { kCount = 0, kIou = 1, kBad = 2 };
  // Row 1 + scope: plain and weighted sum of the positives' classification and localisation losses (Eq. 4 and 7).
  enum PerScope : int { kClsPlain = 0, kClsWeighted = 1, kLocPlain = 2, kLocWeighted = 3 };

  double* data;

  IOUBAL_HD double& shared(Shared column) const { return data[column]; }
  IOUBAL_HD double& scope(int64_t index, PerScope column) const { return data[4 * (1 + index) + column]; }
  IOUBAL_HD double cls_normalizer(int64_t index, double eps) const {
    return normalizer(scope(index, kClsPlain), scope(index, kClsWeighted), eps);
  }
  IOUBAL_HD double loc_normalizer(int64_t index, double eps) const {
    return normalizer(scope(index, kLocPlain), scope(index, kLocWeighted), eps);
  }
  // A positive's part of the two sums that start at column `plain`.
  void add(int64_t index, PerScope plain, double loss, double balance) const {
    const BalanceShare<double> share = balance_share(loss, balance);
    data[4 * (1 + index) + plain] += share.plain;
    data[4 * (1 + index) + plain + 1] += share.weighted;
  }
  // The default divisor: the count of row 0. Ranks average their losses, so each divides by its share of the global
  // count.
  IOUBAL_HD double default_divisor(double world_size) const {
    return (shared(kCount) > 1 ? shared(kCount) : 1.0) / world_size;
  }
};

}  // namespace ioubal
