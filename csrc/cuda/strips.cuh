// The stream of vectors that the dense pass goes through, and the strips of it that are not plain background.
//
// A run, the logits of one level and image, is cut at multiples of 16 bytes into vectors; the first and the last may be
// partial. 32 neighbouring vectors are a strip, a warp's load; 16 strips a group, a block's. A bit per strip says
// whether it holds a positive entry, and one, of rows only, whether it holds an ignored one: a word of each a group.
#pragma once

#include "cuda/tables.cuh"

namespace ioubal::cuda {

// Small blocks: the next one starts when the last warp of one is done.
constexpr u32 kFillThreads = 128, kFillWarps = kFillThreads / kWarp;
constexpr u32 kStripsPerWarp = 4, kWarpStrips = (1u << kStripsPerWarp) - 1;
constexpr u32 kGroupStrips = kFillWarps * kStripsPerWarp, kGroupVectors = kGroupStrips * kWarp;
static_assert(kGroupStrips <= 32);
constexpr u32 kMostIterations = 32 / kStripsPerWarp;  // groups of a tile: a bit each for a thread's vectors

// The logits of a level: of every image, rows of K (flat, channels_last) or planes of H * W (NCHW).
struct DenseLevel {
  const void* x;
  void* out;
  int64_t image_stride;    // elements
  u32 size;                // of an image, less than 2^31
  u32 locations, anchors;  // planes: H * W and A; rows: anchors is 1
  u32 first_anchor;
  u32 scope_level;     // number of the level among all of them
  u32 word0, words;    // of `special` and `ignored`; words per image (rows) or plane
  u32 group0, groups;  // first group; groups per image
  u32 tile0, tiles;    // first tile; tiles per image
  FastDiv plane;       // by locations
  FastDiv per_image;   // by tiles
  bool planes;
  bool narrow;  // the output lies differently to multiples of 16 bytes than the logits

  void write_to(void* output) {
    out = output;
    narrow = reinterpret_cast<uintptr_t>(x) % 16 != reinterpret_cast<uintptr_t>(out) % 16;
  }
  // How many elements of the image's first vector lie before it.
  IOUBAL_HD u32 missing(u32 image, u32 size_of_element) const {
    const uintptr_t start = reinterpret_cast<uintptr_t>(x) + image * image_stride * size_of_element;
    return static_cast<u32>(start % 16) / size_of_element;
  }
  IOUBAL_HD u32 strips(u32 image) const { return group0 + image * groups; }
  IOUBAL_HD u32 word(u32 image) const { return word0 + image * (planes ? anchors * words : words); }
};

struct DenseTable {
  DenseLevel level[kMaxLevels];
  int levels;
  u32 tiles, groups;                    // of all levels
  u32 positive_tiles, positive_groups;  // and tiles of the strips with a positive, of so many groups each
  u32 words;                            // of `special`
  u32 element;                          // bytes
  int64_t anchors_per_image;
  FastDiv classes;
  u32 iterations;      // groups of a tile
  const u32* special;  // a bit per anchor: not plain background
  const u32* ignored;  // a bit per anchor; one more word follows
  u32 *ignored_strips, *positive_strips;
  Labels labels;
  ScopeOf scope;
  Coefficients coefficients;
  const float* weight;  // per anchor: iou^eta, times the sample's weight; read at positives only
  FloatRef row_weight;  // per row, or none: of the negatives too
  float gamma;
  NumberRef scale;     // the gradient's factor: grad_output, or in the forward what is expected of it
  float plain_scale;   // the same where it is no tensor: blocks start sooner without the conversion
  NumberRef expected;  // backward: nothing to do if the scale is this
  bool skip_expected;
  float* partial;  // per tile: the negatives' loss; nullptr: not wanted

  IOUBAL_HD u32 all_tiles() const { return positive_tiles + tiles; }
  void set_scale(const NumberRef& now, const NumberRef& then, bool may_skip) {
    scale = now;
    plain_scale = static_cast<float>(now.value);
    expected = then;
    skip_expected = may_skip;
  }
  IOUBAL_DEVICE float scale_now() const { return scale.tensor.data ? static_cast<float>(scale.get()) : plain_scale; }
  // Whether the buffers hold what is asked for already.
  IOUBAL_DEVICE bool filled() const { return skip_expected && scale.get() == expected.get(); }
};

// Sets the bits of the strips that hold entries [first, first + count) of a run.
IOUBAL_DEVICE void mark_strips(const DenseTable& tb, const DenseLevel& level, u32 image, u32 first, u32 count,
                               u32* strips) {
  const u32 vector = 16 / tb.element, missing = level.missing(image, tb.element);
  const u32 last = (first + count - 1 + missing) / vector / kWarp;
  u32* const words = strips + level.strips(image);
  for (u32 strip = (first + missing) / vector / kWarp; strip <= last; ++strip) {
    atomicOr(words + strip / kGroupStrips, 1u << strip % kGroupStrips);
  }
}

// The anchor of a bit of `special`.
struct AnchorOfWord {
  int level;
  u32 image, a, position;  // rows: a is 0, position the row
  int64_t anchor;          // in the whole batch
  IOUBAL_DEVICE AnchorOfWord(const DenseTable& tb, u32 number, u32 bit) : level(0) {
    while (level + 1 < tb.levels && number >= tb.level[level + 1].word0) ++level;
    const DenseLevel& of = tb.level[level];
    const u32 per_image = of.word(1) - of.word(0), local = number - of.word0;
    image = local / per_image;
    a = (local - image * per_image) / of.words;
    position = (local - image * per_image - a * of.words) * kWarp + bit;
    anchor = image * tb.anchors_per_image + of.first_anchor + position * of.anchors + a;
  }
};

// Marks the strips of one word of `special`: of what is collected the strip of its positive entry, or where a label or
// scope is none all of its row's; of rows that are ignored all as well.
IOUBAL_DEVICE void mark_word(const DenseTable& tb, u32 number) {
  const u32 ignored = tb.ignored[number], classes = tb.classes.divisor;
#pragma unroll 1
  for (u32 left = tb.special[number]; left; left &= left - 1) {
    const u32 bit = __ffs(static_cast<int>(left)) - 1;
    const AnchorOfWord at(tb, number, bit);
    const DenseLevel& level = tb.level[at.level];
    if (ignored >> bit & 1) {
      if (!level.planes) mark_strips(tb, level, at.image, at.position * classes, classes, tb.ignored_strips);
      continue;
    }
    const int64_t label = tb.labels.get(at.image, at.anchor);
    if (level.planes) {
      if (label < 0) continue;
      const u32 plane = at.a * classes + static_cast<u32>(label);
      mark_strips(tb, level, at.image, plane * level.locations + at.position, 1, tb.positive_strips);
    } else if (label < 0 || tb.scope.get(level.scope_level, at.image, at.anchor) < 0) {
      mark_strips(tb, level, at.image, at.position * classes, classes, tb.positive_strips);
    } else {
      mark_strips(tb, level, at.image, at.position * classes + static_cast<u32>(label), 1, tb.positive_strips);
    }
  }
}

}  // namespace ioubal::cuda
