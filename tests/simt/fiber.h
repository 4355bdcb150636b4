// Fibers for the SIMT emulation: stacks, and a switch between them without a system call. Test-only; Linux on x86-64 or
// aarch64, g++. Right under AddressSanitizer, and under ThreadSanitizer, which then sees every fiber as a thread.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#elif defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

// The emulation's own data is handed from fiber to fiber: no race, so ThreadSanitizer must not look at it.
#define SIMT_UNSEEN __attribute__((no_sanitize("thread")))

// void simt_switch(void** save, void* load): keeps the callee-saved registers on the stack, its pointer in *save, and
// goes on where `load` was saved. One copy per library: every translation unit emits the same section group.
extern "C" __attribute__((visibility("hidden"))) void simt_switch(void** save, void* load);

#define SIMT_SWITCH_BEGIN                                                 \
  ".pushsection .text.simt_switch,\"axG\",%progbits,simt_switch,comdat\n" \
  ".weak simt_switch\n.hidden simt_switch\n.type simt_switch,%function\nsimt_switch:\n"
#define SIMT_SWITCH_END ".size simt_switch,.-simt_switch\n.popsection\n"

#if defined(__linux__) && defined(__x86_64__)
asm(SIMT_SWITCH_BEGIN
    "push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
    "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n pop %rcx\n jmp *%rcx\n" SIMT_SWITCH_END);
#elif defined(__linux__) && defined(__aarch64__)
asm(SIMT_SWITCH_BEGIN
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp, #0]\n stp x21, x22, [sp, #16]\n stp x23, x24, [sp, #32]\n stp x25, x26, [sp, #48]\n"
    "stp x27, x28, [sp, #64]\n stp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\n stp d10, d11, [sp, #112]\n stp d12, d13, [sp, #128]\n stp d14, d15, [sp, #144]\n"
    "mov x9, sp\n str x9, [x0]\n mov sp, x1\n"
    "ldp x19, x20, [sp, #0]\n ldp x21, x22, [sp, #16]\n ldp x23, x24, [sp, #32]\n ldp x25, x26, [sp, #48]\n"
    "ldp x27, x28, [sp, #64]\n ldp x29, x30, [sp, #80]\n"
    "ldp d8, d9, [sp, #96]\n ldp d10, d11, [sp, #112]\n ldp d12, d13, [sp, #128]\n ldp d14, d15, [sp, #144]\n"
    "add sp, sp, #160\n ret\n" SIMT_SWITCH_END);
#else
#error "the SIMT emulation knows Linux on x86-64 and aarch64"
#endif

namespace simt {

// Where a flow of control stands while another one runs.
struct Context {
  void* pointer = nullptr;    // of the stack, registers saved below it
  const void* low = nullptr;  // the stack's memory, for AddressSanitizer
  size_t size = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* fiber = nullptr;       // ThreadSanitizer's
};

constexpr size_t kStackSize = 64 << 10;
constexpr size_t kMaxStacks = 1024;  // threads of a block

// Stacks of exited fibers, kept for the life of the process; the one used last is taken first, being in the cache.
class StackPool {
 public:
  // The low end of a stack of kStackSize bytes, with an inaccessible page below.
  SIMT_UNSEEN char* take() {
    if (free_count_) return free_[--free_count_];
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* const memory = mmap(nullptr, page + kStackSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
      std::fprintf(stderr, "SIMT: no memory for a stack\n");
      std::abort();
    }
    return static_cast<char*>(memory) + page;
  }
  SIMT_UNSEEN void give_back(char* low) { free_[free_count_++] = low; }

 private:
  char* free_[kMaxStacks] = {};
  size_t free_count_ = 0;
};

// Makes `context` start with entry(), which must never return, on the stack at `low`. `colour`: shifts the start, lest
// all stacks compete for the same few cache lines.
SIMT_UNSEEN inline void prepare(Context& context, char* low, unsigned colour, void (*entry)()) {
  void** const top = reinterpret_cast<void**>(low + kStackSize - colour % 32 * 128);
#if defined(__x86_64__)
  constexpr int kSaved = 8, kReturn = 2;  // six registers, the address to return to, and none for entry itself
#else
  constexpr int kSaved = 20, kReturn = 9;  // as simt_switch saves them; x30 is the address to return to
#endif
  for (int i = 1; i <= kSaved; ++i) top[-i] = nullptr;
  top[-kReturn] = reinterpret_cast<void*>(entry);
  context = {top - kSaved, low, kStackSize, nullptr, context.fiber};
}

// Leaves `from`, goes on with `to`. Returns when somebody switches back; never, if `ends`.
SIMT_UNSEEN inline void switch_context(Context& from, Context& to, [[maybe_unused]] bool ends = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.low, to.size);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.fiber, __tsan_switch_to_fiber_no_sync);
#endif
  simt_switch(&from.pointer, to.pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// The first thing a new fiber does; `from` is where it was switched from.
SIMT_UNSEEN inline void fiber_started([[maybe_unused]] Context& from) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &from.low, &from.size);
#endif
}

// What happened before signal(&x) happened before what follows a later observe(&x): for ThreadSanitizer only.
inline void signal([[maybe_unused]] void* clock) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(clock);
#endif
}
inline void observe([[maybe_unused]] void* clock) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(clock);
#endif
}

}  // namespace simt
