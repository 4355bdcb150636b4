// The scheduler of the SIMT emulation: blocks one after another, one fiber per thread, in an order drawn from a seed;
// it ends the process, with a message, where a GPU would hang or compute nonsense. See simt.h.
#pragma once

#include <link.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdarg>
#include <cstring>
#include <mutex>
#include <thread>

#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// As in CUDA; of the thread that runs.
inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim{}, gridDim{};

namespace simt {

constexpr unsigned kWarp = 32, kMaxThreads = 1024;
// What uninitialised memory is filled with: NaN as half, bfloat16, float and double, and no plausible integer.
constexpr uint16_t kPoison = 0xfff5;
constexpr uint64_t kPoison64 = 0x0001000100010001u * kPoison;

// A call of a barrier or a collective, in the source.
struct Site {
  const char *what, *file;
  int line;
  bool operator==(const Site& o) const {
    return line == o.line && (what == o.what || !std::strcmp(what, o.what)) &&
           (file == o.file || !std::strcmp(file, o.file));
  }
};

struct Thread {
  Context context;
  char* stack = nullptr;
  uint3 index{};
  // What it waits for:
  Site site{};
  unsigned mask = 0;   // lanes of its collective
  int source = 0;      // the lane whose value it wants, or one of the two below
  uint64_t value = 0;  // what it gives; then what it gets
};
constexpr int kBallot = -1, kNothing = -2;

// Every lane is in one of four sets.
struct Warp {
  unsigned ready, collective, barrier, exited;
};

class Scheduler {
 public:
  // Runs call(kernel) for every thread of the grid. touch() returns an address in the thread-local memory of the
  // kernel's library.
  void launch(dim3 grid, dim3 block, void (*call)(void*), void* kernel, char* (*touch)());
  void seed(unsigned value) {
    const std::lock_guard<std::mutex> lock(launching_);
    set_seed(value);
  }
  unsigned long launches() const { return launches_; }

  // Called by the thread that runs.
  void wait_for_block(Site site);
  uint64_t meet_warp(Site site, unsigned mask, uint64_t value, int source);
  unsigned lane() const { return running_ % kWarp; }
  void check_aligned(const void* p, size_t bytes, const char* what) const {
    if (reinterpret_cast<uintptr_t>(p) % bytes == 0) return;
    fail("thread (%u,%u,%u): misaligned %s of %zu bytes at %p", threadIdx.x, threadIdx.y, threadIdx.z, what, bytes, p);
  }

 private:
  void run();
  void run_block();
  bool step(unsigned warp);
  bool release_collective(unsigned warp);
  bool release_barrier();
  void resume(unsigned thread);
  static void fiber_main();
  void find_shared(char* (*touch)());
  void check_inside(const Site& site) const;
  [[noreturn]] void fail(const char* format, ...) const __attribute__((format(printf, 2, 3)));
  void report_waiting() const;
  void set_seed(uint64_t value) { random_ = (value + 1) * 0x9e3779b97f4a7c15u, seeded_ = true; }
  unsigned random(unsigned below) {  // xorshift64*
    random_ ^= random_ >> 12, random_ ^= random_ << 25, random_ ^= random_ >> 27;
    return static_cast<unsigned>((random_ * 0x2545f4914f6cdd1du >> 32) * below >> 32);
  }

  std::mutex launching_;
  std::atomic<unsigned long> launches_{0};
  std::atomic<unsigned long> progress_{0};  // grows whenever a thread goes on
  bool seeded_ = false;
  uint64_t random_ = 0;
  // The launch:
  std::atomic<std::thread::id> worker_{std::thread::id()};  // the thread it runs on; none: no launch
  void (*call_)(void*) = nullptr;
  void* kernel_ = nullptr;
  char* shared_ = nullptr;
  size_t shared_size_ = 0;
  // The block:
  unsigned threads_ = 0, warps_ = 0, running_ = 0;
  Context self_{};
  Thread thread_[kMaxThreads]{};
  Warp warp_[kMaxThreads / kWarp]{};
  unsigned active_[kMaxThreads / kWarp]{}, active_count_ = 0;  // warps with a ready lane
  StackPool stacks_;
  char block_clock_ = 0, barrier_clock_ = 0, warp_clock_[kMaxThreads / kWarp]{};
};

inline Scheduler scheduler;

[[noreturn]] inline void die(const char* message) {
  std::fprintf(stderr, "SIMT: %s\n", message);
  std::fflush(stderr);
  std::abort();
}

SIMT_UNSEEN inline void Scheduler::fail(const char* format, ...) const {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "SIMT: block (%u,%u,%u) of (%u,%u,%u), %u threads: %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
               gridDim.x, gridDim.y, gridDim.z, threads_, message);
  report_waiting();
  std::fflush(stderr);
  std::abort();
}

// Who waits where, warp by warp.
SIMT_UNSEEN inline void Scheduler::report_waiting() const {
  for (unsigned w = 0; w < warps_; ++w) {
    const Warp& warp = warp_[w];
    if (warp.ready) std::fprintf(stderr, "SIMT:   warp %u, lanes %08x: ready to run\n", w, warp.ready);
    if (warp.exited) std::fprintf(stderr, "SIMT:   warp %u, lanes %08x: exited\n", w, warp.exited);
    for (unsigned left = warp.collective | warp.barrier; left;) {
      const Thread& first = thread_[w * kWarp + __builtin_ctz(left)];
      unsigned same = 0;
      for (unsigned rest = left; rest; rest &= rest - 1) {
        const Thread& other = thread_[w * kWarp + __builtin_ctz(rest)];
        if (other.site == first.site && other.mask == first.mask) same |= rest & -rest;
      }
      std::fprintf(stderr, "SIMT:   warp %u, lanes %08x: wait in %s (%s:%d)", w, same, first.site.what, first.site.file,
                   first.site.line);
      std::fprintf(stderr, first.mask ? " for lanes %08x\n" : "\n", first.mask);
      left &= ~same;
    }
  }
}

SIMT_UNSEEN inline void Scheduler::launch(dim3 grid, dim3 block, void (*call)(void*), void* kernel, char* (*touch)()) {
  char message[160];
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    std::snprintf(message, sizeof message, "invalid launch: a grid of (%u,%u,%u) blocks", grid.x, grid.y, grid.z);
    die(message);
  }
  if (threads == 0 || threads > kMaxThreads || block.x > kMaxThreads || block.y > kMaxThreads || block.z > 64) {
    std::snprintf(message, sizeof message, "invalid launch: a block of (%u,%u,%u) threads", block.x, block.y, block.z);
    die(message);
  }
  if (worker_ == std::this_thread::get_id()) die("a launch inside a kernel");

  const std::lock_guard<std::mutex> lock(launching_);
  if (!seeded_) {
    const char* const text = std::getenv("IOUBAL_SIMT_SEED");
    set_seed(text ? std::strtoul(text, nullptr, 10) : 0);
  }
  const char* const limit_text = std::getenv("IOUBAL_SIMT_TIMEOUT");
  const std::chrono::seconds limit(limit_text ? std::strtoul(limit_text, nullptr, 10) : 60);
  gridDim = grid, blockDim = block;
  threads_ = static_cast<unsigned>(threads), warps_ = (threads_ + kWarp - 1) / kWarp;
  call_ = call, kernel_ = kernel;
  ++launches_;

  // A thread of its own: shared memory is that thread's thread-local memory, and no other code uses it there.
  std::mutex mutex;
  std::condition_variable ended;
  bool done = false;
  std::thread worker([&] {
    worker_ = std::this_thread::get_id();
    find_shared(touch);
    run();
    worker_ = std::thread::id();
    const std::lock_guard<std::mutex> hold(mutex);
    done = true;
    ended.notify_one();
  });
  std::unique_lock<std::mutex> hold(mutex);
  while (!done) {
    const unsigned long before = progress_.load(std::memory_order_relaxed);
    ended.wait_for(hold, limit.count() ? limit : std::chrono::seconds(3600), [&] { return done; });
    if (!done && limit.count() && progress_.load(std::memory_order_relaxed) == before) {
      fail("thread (%u,%u,%u) runs for %ld s without a barrier, a collective or an end: it waits for another thread?",
           threadIdx.x, threadIdx.y, threadIdx.z, static_cast<long>(limit.count()));
    }
  }
  hold.unlock();
  worker.join();
}

// The thread-local memory of the library that holds the kernel: all __shared__ variables are there.
inline void Scheduler::find_shared(char* (*touch)()) {
  struct Search {
    const char* inside;
    char* begin;
    size_t size;
  } search{touch(), nullptr, 0};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        Search& s = *static_cast<Search*>(data);
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          char* const begin = static_cast<char*>(info->dlpi_tls_data);
          const size_t size = info->dlpi_phdr[i].p_memsz;
          if (info->dlpi_phdr[i].p_type == PT_TLS && begin && s.inside >= begin && s.inside < begin + size) {
            s.begin = begin, s.size = size;
          }
        }
        return s.begin ? 1 : 0;
      },
      &search);
  if (!search.begin) die("the memory of __shared__ variables is not found");
  shared_ = search.begin, shared_size_ = search.size;
}

// Blocks in the order (step * i + first) mod count, step prime to count.
SIMT_UNSEEN inline void Scheduler::run() {
#if defined(__SANITIZE_THREAD__)
  self_.fiber = __tsan_get_current_fiber();
  for (unsigned i = 0; i < threads_; ++i) {
    if (!thread_[i].context.fiber) thread_[i].context.fiber = __tsan_create_fiber(0);
  }
#endif
  const uint64_t count = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  const unsigned range = count < 0xffffffffu ? static_cast<unsigned>(count) : 0xffffffffu;
  const auto divisor = [](uint64_t a, uint64_t b) {
    while (b) {
      const uint64_t rest = a % b;
      a = b, b = rest;
    }
    return a;
  };
  uint64_t stride = random(range) | 1;
  while (divisor(stride, count) != 1) ++stride;
  uint64_t at = random(range);
  for (uint64_t i = 0; i < count; ++i) {
    blockIdx = {static_cast<unsigned>(at % gridDim.x), static_cast<unsigned>(at / gridDim.x % gridDim.y),
                static_cast<unsigned>(at / gridDim.x / gridDim.y)};
    run_block();
    at = (at + stride) % count;
  }
  observe(&block_clock_);
}

SIMT_UNSEEN inline void Scheduler::run_block() {
  observe(&block_clock_);
  size_t at = 0;
  for (; at + 8 <= shared_size_; at += 8) std::memcpy(shared_ + at, &kPoison64, 8);
  for (; at + 2 <= shared_size_; at += 2) std::memcpy(shared_ + at, &kPoison, 2);
  signal(&block_clock_);
  uint3 index{0, 0, 0};
  for (unsigned i = 0; i < threads_; ++i) {
    thread_[i].index = index;
    thread_[i].context.pointer = nullptr;
    if (++index.x == blockDim.x) index.x = 0, ++index.y;
    if (index.y == blockDim.y) index.y = 0, ++index.z;
  }
  for (unsigned w = 0; w < warps_; ++w) {
    const unsigned lanes = threads_ - w * kWarp;
    warp_[w] = {lanes < kWarp ? (1u << lanes) - 1 : ~0u, 0, 0, 0};
    active_[w] = w;
  }
  active_count_ = warps_;
  const bool greedy = random(2);  // a warp runs as far as it can, or all of them take turns
  do {
    for (unsigned pick = random(active_count_); active_count_;) {
      const bool goes_on = step(active_[pick]);
      if (!goes_on) active_[pick] = active_[--active_count_];
      if (!goes_on || !greedy) pick = random(active_count_);
    }
  } while (release_barrier());
}

// Runs the ready lanes of a warp until each waits or has exited; then a collective that is complete. False: none is
// ready.
SIMT_UNSEEN inline bool Scheduler::step(unsigned warp) {
  const unsigned stride = random(16) * 2 + 1, first = random(32), ready = warp_[warp].ready;
  for (unsigned i = 0; i < kWarp; ++i) {
    const unsigned lane = (stride * i + first) % kWarp;
    if (ready >> lane & 1) resume(warp * kWarp + lane);
  }
  return warp_[warp].collective && release_collective(warp);
}

SIMT_UNSEEN inline void Scheduler::resume(unsigned index) {
  Thread& thread = thread_[index];
  progress_.store(progress_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  warp_[index / kWarp].ready &= ~(1u << index % kWarp);
  if (!thread.context.pointer) {
    if (!thread.stack) thread.stack = stacks_.take();
    prepare(thread.context, thread.stack, index, &fiber_main);
  }
  running_ = index;
  threadIdx = thread.index;
  switch_context(self_, thread.context);
}

__attribute__((no_sanitize("address"))) SIMT_UNSEEN inline void Scheduler::fiber_main() {
  Scheduler& s = scheduler;
  fiber_started(s.self_);
  observe(&s.block_clock_);
  s.call_(s.kernel_);
  signal(&s.block_clock_);
  Thread& thread = s.thread_[s.running_];
  s.warp_[s.running_ / kWarp].exited |= 1u << s.running_ % kWarp;
#if !defined(__SANITIZE_THREAD__)  // there, a stack would pass between threads that are not ordered
  s.stacks_.give_back(thread.stack);
  thread.stack = nullptr;
#endif
  switch_context(thread.context, s.self_, true);
  __builtin_unreachable();
}

inline void Scheduler::check_inside(const Site& site) const {
  if (worker_.load(std::memory_order_relaxed) != std::this_thread::get_id()) {
    std::fprintf(stderr, "SIMT: %s outside of a kernel (%s:%d)\n", site.what, site.file, site.line);
    std::abort();
  }
}

SIMT_UNSEEN inline void Scheduler::wait_for_block(Site site) {
  check_inside(site);
  Thread& thread = thread_[running_];
  thread.site = site, thread.mask = 0;
  warp_[running_ / kWarp].barrier |= 1u << lane();
  signal(&barrier_clock_);
  switch_context(thread.context, self_);
  observe(&barrier_clock_);
}

SIMT_UNSEEN inline uint64_t Scheduler::meet_warp(Site site, unsigned mask, uint64_t value, int source) {
  check_inside(site);
  if (!(mask >> lane() & 1))
    fail("lane %u calls %s (%s:%d) for lanes %08x", lane(), site.what, site.file, site.line, mask);
  const unsigned warp = running_ / kWarp;
  Thread& thread = thread_[running_];
  thread.site = site, thread.mask = mask, thread.value = value, thread.source = source;
  warp_[warp].collective |= 1u << lane();
  if (source == kNothing) signal(&warp_clock_[warp]);  // only __syncwarp orders memory
  switch_context(thread.context, self_);
  if (source == kNothing) observe(&warp_clock_[warp]);
  return thread.value;
}

// No lane of the warp is ready. Lets the lanes go on that wait for each other, in the same call and for the same lanes.
SIMT_UNSEEN inline bool Scheduler::release_collective(unsigned index) {
  Warp& warp = warp_[index];
  Thread* const lanes = &thread_[index * kWarp];
  const unsigned live = warp.collective | warp.barrier;
  for (unsigned left = warp.collective; left; left &= left - 1) {
    const Thread& first = lanes[__builtin_ctz(left)];
    const unsigned group = first.mask & live;
    bool complete = (group & ~warp.collective) == 0;
    for (unsigned rest = group; rest && complete; rest &= rest - 1) {
      const Thread& other = lanes[__builtin_ctz(rest)];
      complete = other.mask == first.mask && other.site == first.site;
    }
    if (!complete) continue;
    uint64_t given[kWarp], ballot = 0;
    for (uint64_t& value : given) value = kPoison64;  // read from a lane that does not take part
    for (unsigned rest = group; rest; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      given[lane] = lanes[lane].value;
      ballot |= uint64_t{given[lane] != 0} << lane;
    }
    for (unsigned rest = group; rest; rest &= rest - 1) {
      Thread& thread = lanes[__builtin_ctz(rest)];
      thread.value = thread.source < 0 ? ballot : given[thread.source];
    }
    warp.collective &= ~group;
    warp.ready |= group;
    return true;
  }
  fail("divergence: warp %u cannot go on, its live lanes are not in the same collective", index);
}

// No lane of the block is ready: all wait at a barrier, or all have exited (false).
SIMT_UNSEEN inline bool Scheduler::release_barrier() {
  bool waits = false, exited = false;
  const Thread* first = nullptr;
  for (unsigned w = 0; w < warps_; ++w) {
    exited |= warp_[w].exited != 0;
    for (unsigned left = warp_[w].barrier; left; left &= left - 1) {
      const Thread& thread = thread_[w * kWarp + __builtin_ctz(left)];
      if (!first) first = &thread;
      if (!(thread.site == first->site)) fail("divergence: the threads wait at different barriers");
      waits = true;
    }
  }
  if (!waits) return false;
  if (exited) fail("divergence: some threads wait at a barrier, others have exited");
  for (unsigned w = 0; w < warps_; ++w) {
    warp_[w].ready = warp_[w].barrier;
    warp_[w].barrier = 0;
    active_[w] = w;
  }
  active_count_ = warps_;
  return true;
}

}  // namespace simt
