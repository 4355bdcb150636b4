// Sums of many numbers in a fixed order.
#pragma once

#include <cstdint>

namespace ioubal {

// In four parts: a single sum would wait for each addition.
template <class T>
double sum_of(const T* values, int64_t count) {
  double parts[4] = {0, 0, 0, 0};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (int64_t j = 0; j < 4; ++j) parts[j] += values[i + j];
  }
  for (; i < count; ++i) parts[0] += values[i];
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

}  // namespace ioubal
