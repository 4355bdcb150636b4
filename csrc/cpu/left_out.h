// Entries that a dense pass does not count: positives, and ignored anchors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace ioubal {

// positive: its number, if the entry is one.
struct Skip {
  int64_t first, count, positive = -1;
};

// Entry i is counted when bytes[(start + i) % period] is 0xff; period 0: all are. kMaskPad bytes past the period repeat
// its beginning, so that what belongs to a chunk of entries can be read at any phase. bits: the same, a bit each, for
// AVX-512, with which the mask then stays in the L1 cache beside the logits that stream through it; 4 bytes are
// readable past the pad's.
struct PeriodicMask {
  const uint8_t* bytes = nullptr;
  int64_t start = 0, period = 0;
  const uint8_t* bits = nullptr;
};
constexpr int64_t kMaskPad = 256;

// What is left out of some contiguous entries. Skips are few, and a pass comes by them in their order: it asks whether
// the next one lies in what it is about to compute, and has a mask made for that if so.
struct LeftOut {
  PeriodicMask mask = {};
  const Skip *skip = nullptr, *end = nullptr;  // ascending, disjoint, none before the entries
  int64_t start = 0;                           // the entries' first, as the skips count
  double* positives = nullptr;                 // by number: receives their logits

  bool any() const { return skip != end; }
  // Whether a skip begins before entry `last`.
  bool reaches(int64_t last) const { return any() && skip->first - start < last; }

  // 0xff in bytes[i] where entry first + i counts, else 0, for `count` entries from x on, which follow those of the
  // call before. Hands on the positives among them, whose places may be overwritten afterwards.
  template <class T>
  void fill_mask(const T* x, int64_t first, int64_t count, uint8_t* bytes) {
    if (mask.period == 0) {
      std::memset(bytes, 0xff, count);
    } else {
      for (int64_t i = 0, phase = (mask.start + first) % mask.period; i < count; phase = 0) {
        const int64_t part = std::min(count - i, mask.period - phase);
        std::memcpy(bytes + i, mask.bytes + phase, part);
        i += part;
      }
    }
    for (; reaches(first + count); ++skip) {
      const int64_t from = skip->first - start - first, to = from + skip->count;
      std::memset(bytes + std::max<int64_t>(from, 0), 0, std::min(to, count) - std::max<int64_t>(from, 0));
      if (skip->positive >= 0) positives[skip->positive] = static_cast<double>(x[from]);
      if (to > count) break;  // it goes on
    }
  }
};

}  // namespace ioubal
