// Finding the few indices that are not plain background (-1), in order.
#pragma once

#include <cstdint>
#include <vector>

#include "common/tensor_access.h"

namespace ioubal {

constexpr int64_t kBackground = -1, kIgnore = -2;

struct Exceptional {
  int64_t index;
  int64_t value;
};

// Every i < count with values[i] != background, ascending, whatever the number of threads.
std::vector<Exceptional> find_exceptional(const IntReader& values, int64_t count, int64_t background);

}  // namespace ioubal
