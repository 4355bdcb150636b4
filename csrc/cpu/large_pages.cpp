#include "cpu/large_pages.h"

#include <cstddef>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <fstream>
#include <mutex>
#include <string>
#endif

namespace ioubal {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
namespace {

constexpr uintptr_t kPage = uintptr_t{1} << 21;
constexpr int64_t kLeast = int64_t{1} << 23;  // smaller blocks come from the heap, or cost little

#if !defined(MADV_COLLAPSE)
constexpr int MADV_COLLAPSE = 25;
#endif

// Older systems let MADV_COLLAPSE pass where huge pages are switched off.
bool forbidden() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string setting;
  std::getline(file, setting);
  return setting.empty() || setting.find("[never]") != std::string::npos;
}

// Exchanges the small pages of a block for huge ones when the block comes back, once: what comes back does so at every
// step of a training. What is freed in between and fresh the next time has been asked for by MADV_HUGEPAGE; then there
// is nothing to exchange. 64 MB take 20 to 50 ms, and 180 where the system has to look for huge pages, for less than
// one that is gained each time; so all exchanges together may take a fiftieth of the time since the first call.
class Exchange {
 public:
  void operator()(uintptr_t first, uintptr_t end) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!allowed_) return;
    for (Block& block : seen_) {
      if (block.first != first || block.end != end) continue;
      if (!block.done) block.done = exchange(first, end - first);
      return;
    }
    seen_[next_] = {first, end, false};
    next_ = (next_ + 1) % kBlocks;
  }

 private:
  using Clock = std::chrono::steady_clock;
  using Seconds = std::chrono::duration<double>;
  static constexpr size_t kBlocks = 64;
  struct Block {
    uintptr_t first = 0, end = 0;
    bool done = false;
  };

  // False: not yet.
  bool exchange(uintptr_t first, size_t bytes) {
    const Clock::time_point before = Clock::now();
    if (spent_ + seconds_per_byte_ * bytes > Seconds(before - start_).count() / 50) return false;
    const bool failed = madvise(reinterpret_cast<void*>(first), bytes, MADV_COLLAPSE) != 0;
    if (failed && errno == ENOMEM) allowed_ = false;  // there are no huge pages to be had: looking for them is slow
    const double took = Seconds(Clock::now() - before).count();
    spent_ += took;
    if (!failed) seconds_per_byte_ = std::max(seconds_per_byte_, took / bytes);
    return true;
  }

  std::mutex mutex_;
  bool allowed_ = !forbidden();
  Block seen_[kBlocks];
  size_t next_ = 0;
  const Clock::time_point start_ = Clock::now();
  double spent_ = 0, seconds_per_byte_ = 5e-10;  // the rate: the slowest so far, at first a guess
};

}  // namespace

void ask_for_large_pages(const torch::stable::Tensor& t) {
  const int64_t bytes = t.numel() * t.element_size();
  if (bytes < kLeast) return;
  const uintptr_t data = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t first = (data + kPage - 1) / kPage * kPage, end = (data + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
  static Exchange exchange;
  exchange(first, end);
}
#else
void ask_for_large_pages(const torch::stable::Tensor&) {}
#endif

}  // namespace ioubal
