// Memory of a large output in large pages.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace ioubal {

// Asks the system to back a large tensor that is about to be written whole by huge pages. glibc takes large blocks
// fresh from the system and gives them back, so that writing 64 MB meets 16,000 page faults of 4 KB, which cost more
// than the whole loss; with 2 MB there are 32. Linux gives huge pages to those who ask ("madvise", the usual setting of
// /sys/kernel/mm/transparent_hugepage/enabled). Where the allocator keeps its memory, the pages are there already, and
// small ones stay small: those of a block that comes back are exchanged (MADV_COLLAPSE, Linux 6.1), because streamed
// lines wait for page walks. A refusal changes nothing.
void ask_for_large_pages(const torch::stable::Tensor& t);

}  // namespace ioubal
