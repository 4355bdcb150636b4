// Tensors of rows read and written tile by tile, as doubles.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "cpu/box_rows.h"
#include "cpu/dtypes.h"

namespace ioubal {

// A tile of rows of up to four columns.
struct BoxTile {
  alignas(64) double v[4 * kBoxRows];

  // The lanes beyond the last row compute as well: with numbers.
  void pad(int64_t rows, int64_t columns) {
    const int64_t padded = (rows + kBoxLanes - 1) / kBoxLanes * kBoxLanes;
    std::fill(v + rows * columns, v + padded * columns, 0.0);
  }
};

class RowReader {
 public:
  RowReader(const torch::stable::Tensor& t, int64_t columns)
      : data_(static_cast<const char*>(t.const_data_ptr())), columns_(columns) {
    const DtypeIndex dtype = dtype_index(t.scalar_type());
    row_bytes_ = columns * size_of(dtype);
    load_ = box_kernels().load[dtype];
  }
  int64_t columns() const { return columns_; }
  // The tile's values, filled with `rows` rows from row `first` on.
  const double* read(int64_t first, int64_t rows, BoxTile& tile) const {
    load_(data_ + first * row_bytes_, rows * columns_, tile.v);
    tile.pad(rows, columns_);
    return tile.v;
  }

 private:
  const char* data_;
  int64_t columns_, row_bytes_;
  void (*load_)(const void*, int64_t, double*);
};

class RowWriter {
 public:
  RowWriter(const torch::stable::Tensor& t, int64_t columns)
      : data_(static_cast<char*>(t.mutable_data_ptr())), columns_(columns) {
    const DtypeIndex dtype = dtype_index(t.scalar_type());
    row_bytes_ = columns * size_of(dtype);
    store_ = box_kernels().store[dtype];
  }
  void write(int64_t first, int64_t rows, const double* values) const {
    store_(values, rows * columns_, data_ + first * row_bytes_);
  }

 private:
  char* data_;
  int64_t columns_, row_bytes_;
  void (*store_)(const double*, int64_t, void*);
};

// f(first row, rows) for the tiles of rows [begin, end).
template <class F>
void for_tiles(int64_t begin, int64_t end, const F& f) {
  for (int64_t r = begin; r < end; r += kBoxRows) f(r, std::min(kBoxRows, end - r));
}

}  // namespace ioubal
