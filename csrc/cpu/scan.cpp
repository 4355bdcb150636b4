#include "cpu/scan.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace ioubal {
namespace {

constexpr int64_t kScanBlock = 1 << 13, kStride = 32;

template <class Int>
void scan_block(const Int* values, int64_t first, int64_t last, int64_t background_, std::vector<Exceptional>& found) {
  const Int background = static_cast<Int>(background_);
  int64_t i = first;
  for (; i + kStride <= last; i += kStride) {
    Int differs = 0;
    for (int64_t j = 0; j < kStride; ++j) differs |= values[i + j] ^ background;
    if (!differs) continue;
    uint32_t places = 0;  // no branch for each value: which ones are exceptional cannot be predicted
    for (int64_t j = 0; j < kStride; ++j) places |= static_cast<uint32_t>(values[i + j] != background) << j;
    for (; places; places &= places - 1) {
      const int64_t j = i + __builtin_ctz(places);
      found.push_back({j, values[j]});
    }
  }
  for (; i < last; ++i) {
    if (values[i] != background) found.push_back({i, values[i]});
  }
}

}  // namespace

std::vector<Exceptional> find_exceptional(const IntReader& values, int64_t count, int64_t background) {
  const int64_t blocks = (count + kScanBlock - 1) / kScanBlock;
  std::vector<std::vector<Exceptional>> found(blocks);
  torch::stable::parallel_for(0, blocks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * kScanBlock, last = std::min(count, first + kScanBlock);
      values.visit([&](const auto* all) { scan_block(all, first, last, background, found[b]); });
    }
  });
  if (blocks == 1) return std::move(found[0]);
  std::vector<Exceptional> all;
  size_t total = 0;
  for (const auto& part : found) total += part.size();
  all.reserve(total);
  for (const auto& part : found) all.insert(all.end(), part.begin(), part.end());
  return all;
}

}  // namespace ioubal
