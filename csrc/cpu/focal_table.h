// The dense pass of 16-bit logits by table. Such a logit has 65,536 values: a large run looks up each one's loss and
// gradient instead of computing them, for any gamma alike.
#pragma once

#include <cstdint>
#include <memory>

#include "cpu/isa.h"

namespace ioubal {

class FocalTable {
 public:
  // dtype: kBFloat16 or kFloat16. The entries are what the kernels of the instruction set in use give for every
  // value: what is written is the same, to the last bit, but for 0 at minus infinity.
  FocalTable(int dtype, double scale, double gamma, Output output);

  // As FocalDense, with the scale, gamma and output of the table.
  double operator()(const void* x, void* out, int64_t n, const PeriodicMask& mask) const;

 private:
  std::unique_ptr<double[]> entries_;
  uint16_t minus_infinity_;
  bool writes_;
};

// Logits that share a scale from which on a table pays, this one or an OctaveTable. With kernels that compute these
// gammas faster than this one: none.
int64_t table_threshold(double gamma, bool octaves);

// Sets it for every gamma (for tests and benchmarks; negative: back to the default). Returns the one in use where
// looking up is faster.
int64_t set_table_threshold(int64_t entries);

}  // namespace ioubal
