// How the heads' outputs and the ground truth of the fused detection loss lie in memory.
#pragma once

#include <vector>

#include "common/tensor_access.h"
#include "cpu/classification.h"
#include "math/box.h"

namespace ioubal {

// Where the coordinates of an anchor's deltas lie, whatever the strides: flat (N, R, 4) or maps (N, A * 4, H, W).
struct DeltaStrides {
  int64_t image = 0, anchor = 0, row = 0, column = 0, coordinate = 0;
  DeltaStrides() = default;
  explicit DeltaStrides(const Tensor& t) : image(t.stride(0)) {
    if (t.dim() == 3) {
      row = t.stride(1);
      coordinate = t.stride(2);
    } else {
      coordinate = t.stride(1);
      anchor = 4 * coordinate;
      row = t.stride(2);
      column = t.stride(3);
    }
  }
};

struct Place {
  int64_t level, image, location, anchor;
};

// One level of the heads' outputs: rows of K logits (flat, channels_last) or planes of H * W (NCHW).
struct Level {
  const char* logits;
  DtypeIndex dtype;
  int64_t item;                    // bytes of a logit
  FloatReader logit_at, delta_at;  // kept: every question to a stable-ABI tensor is a call
  DeltaStrides delta_strides;
  int64_t anchors, locations, width, classes, first_anchor, first_run;
  bool planes;

  int64_t size() const { return anchors * locations; }
  int64_t run(int64_t image, int64_t a) const { return first_run + (planes ? image * anchors + a : image); }
  int64_t run_entries() const { return classes * locations * (planes ? 1 : anchors); }
  // Of a positive, in the level: its runs follow each other in memory.
  int64_t entry_of(const PositiveEntry& p) const { return (p.run - first_run) * run_entries() + p.entry; }
  // Offset of the first coordinate of an anchor's deltas.
  int64_t delta_offset(const DeltaStrides& s, const Place& p) const {
    return p.image * s.image + p.anchor * s.anchor + p.location / width * s.row + p.location % width * s.column;
  }
};

class GroundTruth {
 public:
  GroundTruth(const TensorList& boxes, const TensorList& labels)
      : padded_(boxes.size() == 1 && boxes[0].dim() == 3), padding_(padded_ ? boxes[0].size(1) : 0) {
    for (size_t i = 0; i < boxes.size(); ++i) {
      boxes_.emplace_back(boxes[i]);
      labels_.emplace_back(labels[i]);
      counts_.push_back(boxes[i].size(0));
    }
  }
  int64_t count(int64_t image) const { return padded_ ? padding_ : counts_[image]; }
  int64_t label(int64_t image, int64_t i) const {
    return padded_ ? labels_[0][image * padding_ + i] : labels_[image][i];
  }
  Quad<double> box(int64_t image, int64_t i) const {
    return padded_ ? boxes_[0].quad((image * padding_ + i) * 4, 1) : boxes_[image].quad(i * 4, 1);
  }

 private:
  bool padded_;
  int64_t padding_;
  std::vector<FloatReader> boxes_;
  std::vector<IntReader> labels_;
  std::vector<int64_t> counts_;
};

}  // namespace ioubal
