// Fresh memory of a large output in large pages.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ioubal {

// Asks the system to back a large tensor that is about to be written whole by huge pages. glibc takes large blocks
// fresh from the system and gives them back, so that writing 64 MB meets 16,000 page faults of 4 KB, which cost more
// than the whole loss; with 2 MB there are 32. Linux gives huge pages to those who ask ("madvise", the usual setting of
// /sys/kernel/mm/transparent_hugepage/enabled). A refusal changes nothing, nor do pages that are there already.
inline void ask_for_large_pages(const torch::stable::Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  constexpr int64_t kLeast = int64_t{1} << 23;  // smaller blocks come from the heap, or cost little
  const int64_t bytes = t.numel() * t.element_size();
  if (bytes < kLeast) return;
  const uintptr_t data = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t first = (data + kPage - 1) / kPage * kPage, end = (data + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)t;
#endif
}

}  // namespace ioubal
