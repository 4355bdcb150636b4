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

// Exchanges small pages of gradients for huge ones when they come back, once: what comes back does so at every step of
// a training, in blocks that differ where the images' sizes do. What is freed in between and fresh the next time has
// been asked for by MADV_HUGEPAGE; then there is nothing to exchange. 64 MB take 20 to 50 ms, and 180 where the system
// has to look for huge pages, for less than one that is gained each time; so all exchanges together may take a fiftieth
// of the time since the first call.
class Exchange {
 public:
  void operator()(uintptr_t first, uintptr_t end) {
    const std::lock_guard<std::mutex> lock(mutex_);
    uintptr_t run = first;  // from here on all pages have come back
    for (uintptr_t page = first; page <= end && allowed_; page += kPage) {
      if (page < end && comes_back(page)) continue;
      if (run < page) exchange(run, page);
      run = page + kPage;
    }
  }

 private:
  using Clock = std::chrono::steady_clock;
  using Seconds = std::chrono::duration<double>;
  static constexpr size_t kSlots = 4096;  // no two pages of 8 GB share one
  static constexpr uintptr_t kDone = 1;
  static constexpr uintptr_t kPiece = 4;  // pages: each call has a price of its own

  uintptr_t& slot(uintptr_t page) { return seen_[page / kPage % kSlots]; }

  // Whether the page has been here before and is not exchanged yet.
  bool comes_back(uintptr_t page) {
    uintptr_t& seen = slot(page);
    if (seen == page) return true;
    if (seen != (page | kDone)) seen = page;
    return false;
  }

  // As much of the run as there is time for.
  void exchange(uintptr_t first, uintptr_t end) {
    const Clock::time_point before = Clock::now();
    const Seconds left = (before - start_) / 50.0 - spent_;
    const auto affordable = static_cast<uintptr_t>(std::max(left / seconds_per_page_, 0.0));
    const uintptr_t pages = (end - first) / kPage, now = std::min(pages, affordable);
    if (now < std::min(pages, kPiece)) return;
    end = first + now * kPage;
    const bool failed = madvise(reinterpret_cast<void*>(first), end - first, MADV_COLLAPSE) != 0;
    if (failed && errno == ENOMEM) allowed_ = false;  // there are no huge pages to be had: looking for them is slow
    const Seconds took = Clock::now() - before;
    spent_ += took;
    if (!failed) seconds_per_page_ = std::max(seconds_per_page_, took / now);
    for (uintptr_t page = first; page < end; page += kPage) slot(page) = page | kDone;
  }

  std::mutex mutex_;
  bool allowed_ = !forbidden();
  uintptr_t seen_[kSlots] = {};  // a page each, and whether it is exchanged
  const Clock::time_point start_ = Clock::now();
  Seconds spent_{0}, seconds_per_page_{1e-3};  // the rate: the slowest so far, at first a guess
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
