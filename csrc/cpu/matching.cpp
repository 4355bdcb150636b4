// Matching of anchors with gt boxes, without the matrix of their IoUs.
//
// Anchors are taken in blocks; a block computes only the boxes that overlap its bounds, and blocks are handed to
// threads in chunks. The first pass writes every anchor's decision, and keeps each box's largest IoU in each chunk.
// What depends on a box's largest IoU over all anchors (low-quality and forced matches) happens in a second pass over
// the chunks that have it, which computes their pairs again. Maxima do not depend on an order, so neither does the
// result.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>

#include "cpu/isa.h"
#include "cpu/matching_input.h"

namespace ioubal {
namespace {

constexpr int64_t kChunkBlocks = 8, kMaxChunks = 64;  // per set of anchors: bounds the memory of the maxima
constexpr int64_t kGrain = 1 << 14;                   // pairs of anchor and image for which a thread is worth it

// ----------------------------------------------------------------------------------------------- kernels in double

MatchBounds<double> double_bounds(const double* anchors, int64_t count) {
  MatchBounds<double> bounds = {anchors[0], anchors[1], anchors[2], anchors[3], true};
  for (int64_t i = 0; i < count; ++i, anchors += 4) {
    bounds.x1 = std::min(bounds.x1, anchors[0]);
    bounds.y1 = std::min(bounds.y1, anchors[1]);
    bounds.x2 = std::max(bounds.x2, anchors[2]);
    bounds.y2 = std::max(bounds.y2, anchors[3]);
    const Quad<double> anchor = {{anchors[0], anchors[1], anchors[2], anchors[3]}};
    bounds.regular = bounds.regular && is_regular_anchor(anchor);
  }
  return bounds;
}

int64_t double_overlapping(const MatchBoxes<double>& boxes, const MatchBounds<double>& bounds, int32_t* list) {
  int64_t found = 0;
  for (int64_t g = 0; g < boxes.count(); ++g) {
    if (boxes.overlaps(g, bounds)) list[found++] = static_cast<int32_t>(g);
  }
  return found;
}

void double_load(const double* anchors, int64_t count, MatchBlock<double>& block) {
  for (int64_t i = 0; i < count; ++i, anchors += 4) {
    block.x1[i] = anchors[0];
    block.y1[i] = anchors[1];
    block.x2[i] = anchors[2];
    block.y2[i] = anchors[3];
    block.area[i] = matching_area(block.anchor(i));
  }
  block.count = count;
}

template <class T>
void write_indices(const MatchBest<T>& best, int64_t count, T high, T low, int64_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = matched_index(best.iou[i], int64_t{best.index[i]}, high, low);
}

// The plain form of `pairs`, for any block and any box: knows that an IoU may be NaN. Returns the largest one, 0 at
// least; a NaN is the largest.
template <class T>
T plain_pairs(const MatchBlock<T>& block, const Quad<T>& box, T area, int32_t index, MatchBest<T>& best) {
  T top = T(0);
  for (int64_t i = 0; i < block.count; ++i) {
    const T iou = matching_iou(box, area, block.anchor(i), block.area[i]);
    if (takes_over(iou, best.iou[i])) {
      best.iou[i] = iou;
      best.index[i] = index;
    }
    if (takes_over(iou, top)) top = iou;
  }
  return top;
}

template <class T>
bool same_iou(T a, T b) {
  return a == b || (is_nan(a) && is_nan(b));
}

template <class T>
bool plain_equal(const MatchBlock<T>& block, const Quad<T>& box, T area, T iou, uint8_t* hit) {
  bool any = false;
  for (int64_t i = 0; i < block.count; ++i) {
    if (!same_iou(matching_iou(box, area, block.anchor(i), block.area[i]), iou)) continue;
    hit[i] = 1;
    any = true;
  }
  return any;
}

const MatchKernels<double> double_kernels = {
    double_bounds,
    double_overlapping,
    double_load,
    plain_pairs<double>,
    plain_equal<double>,
    [](const MatchBest<double>& best, int64_t count, double high, double low, int32_t* out) {
      for (int64_t i = 0; i < count; ++i) {
        out[i] = static_cast<int32_t>(matched_index(best.iou[i], int64_t{best.index[i]}, high, low));
      }
    },
    write_indices<double>};

template <class T>
const MatchKernels<T>& match_kernels() {
  if constexpr (std::is_same_v<T, double>) {
    return double_kernels;
  } else {
#if defined(__x86_64__)
    const int isa = kernels().isa;
    if (isa >= 4) return avx512_match_kernels();
    if (isa >= 2) return avx2_match_kernels();
#endif
    return portable_match_kernels();
  }
}

// ------------------------------------------------------------------------------------------------------- the two
// passes

struct Rule {
  double high, low;
  bool allow_low_quality, force_best;
};

template <class T>
class Matching {
 public:
  Matching(const Tensor& anchors, const TensorList& gt_boxes, const TensorList& gt_labels, const Rule& rule,
           const Tensor& matched_idxs)
      : kernels_(match_kernels<T>()),
        anchors_(anchors),
        plain_(anchors.scalar_type() == (std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float)
                   ? static_cast<const T*>(anchors.const_data_ptr())
                   : nullptr),
        rule_(rule),
        out_(matched_idxs),
        images_(matched_idxs.size(0)),
        rows_(matched_idxs.size(1)),
        sets_(anchors.dim() == 3 ? images_ : 1) {
    const int64_t blocks = (rows_ + kMatchBlock - 1) / kMatchBlock;
    chunk_rows_ = kMatchBlock * std::max(kChunkBlocks, (blocks + kMaxChunks - 1) / kMaxChunks);
    chunks_ = (rows_ + chunk_rows_ - 1) / chunk_rows_;
    first_box_.push_back(0);
    for (int64_t n = 0; n < images_; ++n) {
      boxes_.push_back(match_boxes<T>(gt_boxes, gt_labels, n));
      first_box_.push_back(first_box_.back() + boxes_.back().count());
      most_boxes_ = std::max(most_boxes_, boxes_.back().count());
    }
  }

  void run() {
    if (images_ == 0 || rows_ == 0) return;
    const bool second = (rule_.allow_low_quality || rule_.force_best) && first_box_.back() > 0;
    if (second) maxima_.assign(chunks_ * first_box_.back(), T(0));
    for_chunks([&](int64_t set, int64_t chunk, Scratch& scratch) {
      match_chunk(set, chunk, scratch, nullptr, static_cast<T>(rule_.high), static_cast<T>(rule_.low));
    });
    if (!second) return;
    find_highest();
    if (rule_.force_best) first_hit_.assign(chunks_ * first_box_.back(), rows_);
    for_chunks([&](int64_t set, int64_t chunk, Scratch& scratch) {
      if (any_unmet_) match_chunk(set, chunk, scratch, unmet_.data(), T(0), T(0));
      restore_chunk(set, chunk, scratch);
    });
    if (rule_.force_best) force_best();
  }

 private:
  struct Scratch {
    explicit Scratch(int64_t boxes) : list(boxes + kMatchLanes), flagged(boxes) {}
    std::vector<int32_t> list, flagged;
    MatchBlock<T> block;
    MatchBest<T> best;
    alignas(64) T anchors[4 * kMatchBlock];
    uint8_t hit[kMatchBlock], any_hit[kMatchBlock];
  };

  template <class F>
  void for_chunks(const F& f) const {
    const int64_t work = std::max<int64_t>(chunk_rows_ * (images_ / sets_), 1);
    torch::stable::parallel_for(0, sets_ * chunks_, std::max<int64_t>(kGrain / work, 1),
                                [&](int64_t begin, int64_t end) {
                                  Scratch scratch(most_boxes_);
                                  for (int64_t i = begin; i < end; ++i) f(i / chunks_, i % chunks_, scratch);
                                });
  }

  // Each block of a chunk: visit(first anchor, anchors, their padded memory, padded count, bounds).
  template <class F>
  void for_blocks(int64_t set, int64_t chunk, Scratch& scratch, const F& visit) const {
    const int64_t end = std::min((chunk + 1) * chunk_rows_, rows_);
    for (int64_t first = chunk * chunk_rows_; first < end; first += kMatchBlock) {
      const int64_t count = std::min(kMatchBlock, end - first), offset = 4 * (set * rows_ + first);
      const int64_t whole = (count + kMatchLanes - 1) / kMatchLanes * kMatchLanes;
      const T* memory = plain_ + offset;
      if (plain_ == nullptr || count < whole) {  // converted, or padded by copies of the last anchor
        for (int64_t i = 0; i < 4 * whole; ++i) {
          const int64_t from = offset + (i < 4 * count ? i : 4 * (count - 1) + i % 4);
          scratch.anchors[i] = plain_ ? plain_[from] : static_cast<T>(anchors_[from]);
        }
        memory = scratch.anchors;
      }
      visit(first, count, memory, whole, kernels_.bounds(memory, whole));
    }
  }

  // All boxes in the order of their index, of an image that overlap a block.
  int64_t list_boxes(const MatchBoxes<T>& boxes, const MatchBounds<T>& bounds, std::vector<int32_t>& list) const {
    if (bounds.regular) return kernels_.overlapping(boxes, bounds, list.data());
    for (int64_t g = 0; g < boxes.count(); ++g) list[g] = static_cast<int32_t>(g);
    return boxes.count();
  }

  bool is_regular(const MatchBoxes<T>& boxes, int64_t g, const MatchBounds<T>& bounds) const {
    return bounds.regular && is_regular_box(boxes.area[g]);
  }

  // The best of the listed boxes for each anchor of the loaded block; the first box of the image where none overlaps.
  // top, if given, takes each box's largest IoU.
  void best_boxes(const MatchBoxes<T>& boxes, int64_t listed, const MatchBounds<T>& bounds, Scratch& scratch,
                  T* top) const {
    MatchBest<T>& best = scratch.best;
    std::fill_n(best.iou, scratch.block.count, T(0));
    std::fill_n(best.index, scratch.block.count, boxes.index[0]);
    for (int64_t i = 0; i < listed; ++i) {
      const int64_t g = scratch.list[i];
      const auto pairs = is_regular(boxes, g, bounds) ? kernels_.pairs : plain_pairs<T>;
      const T iou = pairs(scratch.block, boxes.box[g], boxes.area[g], boxes.index[g], best);
      if (top && takes_over(iou, top[g])) top[g] = iou;
    }
  }

  void write(const MatchBest<T>& best, int64_t count, T high, T low, int64_t offset) const {
    if (out_.wide()) {
      kernels_.write64(best, count, high, low, out_.wide_data(offset));
    } else {
      kernels_.write32(best, count, high, low, out_.narrow_data(offset));
    }
  }

  // The decisions by the thresholds for a chunk of all images, or of the `chosen` ones, and the chunk's maxima.
  void match_chunk(int64_t set, int64_t chunk, Scratch& scratch, const uint8_t* chosen, T high, T low) {
    for_blocks(set, chunk, scratch,
               [&](int64_t first, int64_t count, const T* memory, int64_t whole, const MatchBounds<T>& bounds) {
                 bool loaded = false;
                 for (int64_t n = set; n < images_; n += sets_) {
                   if (chosen && !chosen[n]) continue;
                   const MatchBoxes<T>& boxes = boxes_[n];
                   const int64_t offset = n * rows_ + first;
                   const int64_t listed = boxes.count() ? list_boxes(boxes, bounds, scratch.list) : 0;
                   if (listed == 0) {  // every IoU is 0
                     const int64_t own =
                         boxes.count() ? matched_index(T(0), int64_t{boxes.index[0]}, high, low) : kUnmatched;
                     out_.fill(offset, count, own);
                     continue;
                   }
                   if (!loaded) kernels_.load(memory, whole, scratch.block);
                   loaded = true;
                   best_boxes(boxes, listed, bounds, scratch, maxima_.empty() || chosen ? nullptr : maxima(n, chunk));
                   write(scratch.best, count, high, low, offset);
                 }
               });
  }

  // Matches to their own best box the anchors that are the best of some box, and finds the first of them for each box.
  void restore_chunk(int64_t set, int64_t chunk, Scratch& scratch) {
    for (int64_t n = set; n < images_; n += sets_) {
      const MatchBoxes<T>& boxes = boxes_[n];
      const T *highest = highest_.data() + first_box_[n], *top = maxima(n, chunk);
      const bool low_quality = rule_.allow_low_quality && !unmet_[n];
      int64_t flagged = 0;
      for (int64_t g = 0; g < boxes.count(); ++g) {
        // A box that no anchor overlaps is settled elsewhere; one with a NaN equals nothing, but has a first anchor.
        if (highest[g] == T(0) || !same_iou(top[g], highest[g])) continue;
        if (rule_.force_best || (low_quality && !is_nan(highest[g]))) scratch.flagged[flagged++] = g;
      }
      if (flagged == 0) continue;
      for_blocks(set, chunk, scratch,
                 [&](int64_t first, int64_t count, const T* memory, int64_t whole, const MatchBounds<T>& bounds) {
                   restore_block(n, chunk, first, count, memory, whole, bounds, flagged, low_quality, scratch);
                 });
    }
  }

  void restore_block(int64_t n, int64_t chunk, int64_t first, int64_t count, const T* memory, int64_t whole,
                     const MatchBounds<T>& bounds, int64_t flagged, bool low_quality, Scratch& scratch) {
    const MatchBoxes<T>& boxes = boxes_[n];
    bool loaded = false, restore = false;
    for (int64_t i = 0; i < flagged; ++i) {
      const int64_t g = scratch.flagged[i];
      if (bounds.regular && !boxes.overlaps(g, bounds)) continue;
      if (!loaded) {
        kernels_.load(memory, whole, scratch.block);
        std::fill_n(scratch.any_hit, kMatchBlock, uint8_t{0});
        loaded = true;
      }
      const T highest = highest_[first_box_[n] + g];
      std::fill_n(scratch.hit, kMatchBlock, uint8_t{0});
      const auto equal = is_regular(boxes, g, bounds) ? kernels_.equal : plain_equal<T>;
      if (!equal(scratch.block, boxes.box[g], boxes.area[g], highest, scratch.hit)) continue;
      if (rule_.force_best) {
        int64_t& first_hit = first_hit_[first_box_.back() * chunk + first_box_[n] + g];
        const int64_t here = first + (std::find(scratch.hit, scratch.hit + count, 1) - scratch.hit);
        if (here < first + count) first_hit = std::min(first_hit, here);
      }
      if (!low_quality || is_nan(highest)) continue;
      for (int64_t k = 0; k < count; ++k) scratch.any_hit[k] |= scratch.hit[k];
      restore = true;
    }
    if (!restore) return;
    best_boxes(boxes, list_boxes(boxes, bounds, scratch.list), bounds, scratch, nullptr);
    for (int64_t k = 0; k < count; ++k) {
      if (scratch.any_hit[k]) out_.set(n * rows_ + first + k, scratch.best.index[k]);
    }
  }

  // Each box's largest IoU, and the images in which some box has none above 0: there all anchors are its best.
  void find_highest() {
    highest_.assign(first_box_.back(), T(0));
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      for (int64_t g = 0; g < first_box_.back(); ++g) {
        const T iou = maxima_[chunk * first_box_.back() + g];
        if (takes_over(iou, highest_[g])) highest_[g] = iou;
      }
    }
    unmet_.assign(images_, 0);
    for (int64_t n = 0; n < images_ && rule_.allow_low_quality; ++n) {
      const auto begin = highest_.begin() + first_box_[n], end = highest_.begin() + first_box_[n + 1];
      unmet_[n] = std::find(begin, end, T(0)) != end;
      any_unmet_ = any_unmet_ || unmet_[n];
    }
  }

  // In the order of the boxes: the last of several boxes with one best anchor has it.
  void force_best() {
    for (int64_t n = 0; n < images_; ++n) {
      for (int64_t g = 0; g < boxes_[n].count(); ++g) {
        int64_t anchor = highest_[first_box_[n] + g] == T(0) ? 0 : rows_;
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
          anchor = std::min(anchor, first_hit_[chunk * first_box_.back() + first_box_[n] + g]);
        }
        out_.set(n * rows_ + anchor, boxes_[n].index[g]);
      }
    }
  }

  T* maxima(int64_t image, int64_t chunk) { return maxima_.data() + chunk * first_box_.back() + first_box_[image]; }

  const MatchKernels<T>& kernels_;
  const FloatReader anchors_;
  const T* plain_;  // the anchors, if they need no conversion
  const Rule rule_;
  const IndexWriter out_;
  const int64_t images_, rows_, sets_;  // sets of anchors: one, or one for each image
  int64_t chunk_rows_ = 0, chunks_ = 0, most_boxes_ = 0;
  std::vector<MatchBoxes<T>> boxes_;
  std::vector<int64_t> first_box_;   // of each image, among all boxes
  std::vector<T> maxima_, highest_;  // largest IoU of each box: by chunk; over all anchors
  std::vector<int64_t> first_hit_;   // by chunk, the first anchor with a box's largest IoU
  std::vector<uint8_t> unmet_;       // images with a box that no anchor overlaps
  bool any_unmet_ = false;
};

void match_anchors(Tensor anchors, TensorList gt_boxes, TensorList gt_labels, double high, double low,
                   bool allow_low_quality, bool force_best, Tensor matched_idxs, TensorList workspace) {
  (void)workspace;
  const Rule rule = {high, low, allow_low_quality, force_best};
  if (is_float64(anchors) || any_float64(gt_boxes)) {
    Matching<double>(anchors, gt_boxes, gt_labels, rule, matched_idxs).run();
  } else {
    Matching<float>(anchors, gt_boxes, gt_labels, rule, matched_idxs).run();
  }
}

}  // namespace
}  // namespace ioubal

STABLE_TORCH_LIBRARY_IMPL(ioubal, CPU, m) { m.impl("match_anchors.cpp", TORCH_BOX(&ioubal::match_anchors)); }
