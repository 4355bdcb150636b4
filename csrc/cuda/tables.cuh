// What launchers tell kernels about a problem: level maps, labels, scopes, coefficients. Plain data, by value.
#pragma once

#include "common/sums.h"
#include "cuda/device.cuh"
#include "math/box.h"

namespace ioubal::cuda {

constexpr int kMaxLevels = 16, kMaxImages = 64;  // of one call; kMaxImages: of ground truth given as a list
constexpr int64_t kBackground = -1, kIgnore = -2;

// Boxes and labels of the images: padded (N, G, 4) and (N, G), or one tensor per image.
struct GroundTruth {
  const void* boxes[kMaxImages];
  const void* labels[kMaxImages];
  int64_t counts[kMaxImages];
  bool padded;  // then entry 0 holds every image
  Dtype box_type;
  bool wide_labels;

  IOUBAL_DEVICE int64_t count(int64_t image) const { return counts[padded ? 0 : image]; }
  IOUBAL_DEVICE int64_t label(int64_t image, int64_t i) const {
    return IntRef{labels[padded ? 0 : image], wide_labels}[padded ? image * counts[0] + i : i];
  }
  template <class T>
  IOUBAL_DEVICE Quad<T> box(int64_t image, int64_t i) const {
    const FloatRef ref = {boxes[padded ? 0 : image], box_type};
    const Quad<double> box = ref.four(4 * (padded ? image * counts[0] + i : i));
    return {{T(box.v[0]), T(box.v[1]), T(box.v[2]), T(box.v[3])}};
  }
};

// The class of every anchor (row): given directly, or through its ground-truth box.
struct Labels {
  IntRef values;  // labels (R,) or matched_idxs (N, R)
  bool direct;    // `values` are classes
  int64_t classes;
  GroundTruth truth;

  // The class of anchor `at` of the whole batch, kIgnore, or kBackground, which out-of-range values count as: they are
  // never used as an index, and the positives' kernel makes the loss NaN.
  IOUBAL_DEVICE int64_t get(int64_t image, int64_t at) const {
    const int64_t value = values[at];
    if (value < 0) return value == kIgnore ? kIgnore : kBackground;
    int64_t label = value;
    if (!direct) label = value < truth.count(image) ? truth.label(image, value) : kBackground;
    return label >= 0 && label < classes ? label : kBackground;
  }
  // Whether a class given directly is one of them, background or ignored.
  IOUBAL_DEVICE bool valid(int64_t at) const { return values[at] >= kIgnore && values[at] < classes; }
};

// Which of the sums of Eq. 4 and 7 a positive belongs to; -1 for an id out of range.
struct ScopeOf {
  IntRef ids;  // data nullptr: by level and image
  int64_t count;
  int level_step, image_step;
  IOUBAL_DEVICE int64_t get(int64_t level, int64_t image, int64_t at) const {
    if (!ids.data) return level * level_step + image * image_step;
    const int64_t id = ids[at];
    return id >= 0 && id < count ? id : -1;
  }
};

// The focal loss's numbers; alpha < 0: none.
struct FocalNumbers {
  double eta, alpha, gamma;
  IOUBAL_DEVICE double positive_factor() const { return alpha < 0 ? 1.0 : alpha; }
  IOUBAL_DEVICE double negative_factor() const { return alpha < 0 ? 1.0 : 1.0 - alpha; }
};

struct LocNumbers {
  double lambda, beta;
  Quad<double> weights;
  BoxCoder coder;
};

// Anchors (R, 4), or (N, R, 4): `own`.
struct AnchorRef {
  FloatRef boxes;
  bool own;
  int64_t per_image;
  IOUBAL_DEVICE Quad<double> get(int64_t image, int64_t anchor) const {  // anchor: in the whole batch
    return boxes.four(4 * (own ? anchor : anchor - image * per_image));
  }
};

// What the positives' sums come to, in device memory: written by the coefficients' kernel, read by the dense one.
struct Coefficients {
  const float* negative;  // per image: factor of the negatives' loss
  const float* positive;  // per image: factor of the positives' loss
  const float* location;  // per image: factor of the localisation loss
  const float* cls_norm;  // per scope: normaliser of Eq. 4
  const float* loc_norm;  // per scope: normaliser of Eq. 7, or 1
};

// Where the coordinates of an anchor's deltas lie, whatever the strides: flat (N, R, 4) or maps (N, A * 4, H, W).
struct DeltaPlace {
  int64_t image, anchor, row, column, coordinate;  // strides in elements
  IOUBAL_DEVICE int64_t offset(int64_t n, u32 location, u32 width, u32 a) const {
    return n * image + a * anchor + location / width * row + location % width * column;
  }
};

// A level of a head as the positives see it. Its anchors come in units of 32, one bit each in `special` (set where the
// label is not background): 32 neighbouring locations of one anchor of planes (NCHW), else 32 neighbouring rows.
struct Level {
  const void* logits;
  int64_t image_stride;  // elements from one image's logits to the next one's
  const void* deltas;
  DeltaPlace delta_place;
  u32 locations, width, anchors;  // H * W, W, anchors per location
  u32 first_anchor;               // of the level in (N, R)
  u32 word0, words;               // first word of `special`; words of one plane (NCHW) or image
  u32 tile0, tiles;               // first tile of the positives' kernel; tiles per image
  bool planes;

  IOUBAL_HD u32 groups() const { return planes ? anchors : 1; }
  IOUBAL_HD u32 positions() const { return planes ? locations : locations * anchors; }
};

}  // namespace ioubal::cuda
