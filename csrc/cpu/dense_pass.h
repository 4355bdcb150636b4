// The dense pass over all logits: every entry as a negative, except the skipped ones.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "common/tensor_access.h"
#include "cpu/focal_table.h"
#include "cpu/isa.h"
#include "cpu/octave_table.h"

namespace ioubal {

// Logits that lie together in memory and share their scales: a level's rows of one image (flat and channels_last), or
// the K planes of one anchor of one image (NCHW). Positives are skipped entries, and so are whole ignored rows; ignored
// anchors of planes are a mask of period H * W.
struct Run {
  const char* x = nullptr;
  char* out = nullptr;
  int64_t count = 0;
  double out_scale = 0;   // of the gradient or loss that is written
  double loss_scale = 0;  // of the run's sum in the total
  int64_t first_skip = 0, last_skip = 0;
  int64_t mask_offset = -1, bits_offset = 0, mask_period = 0;
  // Or with a weight for each row of `columns` entries, which both scales are multiplied by; an ignored row's is not
  // looked at.
  const FloatReader* weights = nullptr;
  int64_t columns = 1;
  // At most one of them: 16-bit logits are looked up.
  const FocalTable* table = nullptr;
  const OctaveTable* octaves = nullptr;
};

class DensePass {
 public:
  std::vector<Run> runs;

  // Ignored and positive entries may be added in any order.
  void skip(int64_t run, int64_t first, int64_t count) { added_.push_back({run, {first, count}}); }
  void skip_positive(int64_t run, int64_t entry) {
    added_.push_back({run, {entry, 1, static_cast<int64_t>(positives_.size())}});
    positives_.push_back(0);
  }
  void mask_anchor(int64_t run, int64_t location, int64_t locations);

  // Returns the sum of loss_scale * plain negative losses of logits of this DtypeIndex. The same result for any number
  // of threads.
  double operator()(int dtype, double gamma, Output output);
  // After the pass: the logits of the positives, in the order in which they were added, as they were before it. They
  // lie far from each other; the pass, which comes by anyway, finds their lines and pages at hand.
  const std::vector<double>& positives() const { return positives_; }

 private:
  struct Added {
    int64_t run;
    Skip skip;
  };
  // Of the logits that share a scale: one of the two, if they are many.
  struct ScaleTable {
    int64_t logits = 0;
    std::unique_ptr<FocalTable> table;
    std::unique_ptr<OctaveTable> octaves;
  };
  void prepare();
  void make_tables(int dtype, double gamma, Output output);
  LeftOut left_out_of(const Run& run, int64_t first, int64_t last);
  template <class C, class T>
  double weighted_block(const Run& run, int64_t first, int64_t last, double gamma, Output output);
  double block(const Run& run, int64_t first, int64_t last, int dtype, double gamma, Output output, bool stream);

  std::vector<Added> added_;
  std::vector<Skip> skips_;
  std::vector<double> positives_;
  std::vector<uint8_t> masks_, mask_bits_;
  std::map<double, ScaleTable> tables_;
};

}  // namespace ioubal
