// IoU-balanced softmax cross entropy over logits (R, K).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "cpu/classification.h"
#include "math/softmax.h"

namespace ioubal {
namespace {

struct SoftmaxLoss {
  const Tensor &logits, &labels, &iou;
  OptionalFloats weight;
  Scopes scopes;
  int64_t background;
  double eta, eps;

  // pow costs as much as a row's exponentials.
  double power(double overlap) const {
    if (eta != 1.5) return iou_power(overlap, eta);
    const double clamped = clamp(overlap, 0.0, 1.0);
    return clamped * std::sqrt(clamped);
  }

  const int64_t rows = logits.size(0), columns = logits.size(1);
  const int64_t tile_rows = softmax_tile_rows(columns);
  const int64_t rows_per_block = std::max<int64_t>(1, kBlockEntries / columns / tile_rows) * tile_rows;
  const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
  const SoftmaxRows kernel = kernels().softmax[dtype_index(logits)];

  // f(block, first row, last row) for fixed blocks of rows.
  template <class F>
  void for_blocks(const F& f) const {
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      FlushDenormals flush;
      for (int64_t b = begin; b < end; ++b) f(b, b * rows_per_block, std::min(rows, (b + 1) * rows_per_block));
    });
  }

  // A row whose loss is not finite, by the rules for infinite logits and NaN.
  double not_finite(int64_t r, int64_t y, double scale, const Tensor* out) const {
    const FloatReader x(logits);
    const int64_t first = r * columns;
    std::optional<FloatWriter> gradient;
    if (out) gradient.emplace(*out);
    return softmax_limit<double>([&](int64_t k) { return x[first + k]; }, columns, y,
                                 [&](int64_t k, double slope) {
                                   if (gradient) gradient->set(first + k, slope != slope ? slope : scale * slope);
                                 });
  }

  // Row 0 of the sums counts the rows that are not ignored: the default divisor of a softmax loss.
  void add_up(const Tensor& sums_tensor) const {
    const int64_t per_block = 4 * (1 + scopes.count());
    std::vector<double> parts(blocks * per_block);
    const IntReader label(labels);
    for_blocks([&](int64_t b, int64_t first, int64_t last) {
      const Sums sums{parts.data() + b * per_block};
      std::vector<int64_t> positives(last - first + 2 * tile_rows);
      int64_t found = 0, counted = 0, bad = 0;
      for (int64_t r = first; r < last; ++r) {  // no branches: which rows are positive cannot be predicted
        const int64_t y = label[r];
        const bool wrong = (y >= columns) | (scopes.get(r) < 0);  // never used as an index; poisons the loss
        positives[found] = r;
        found += !wrong & (y >= 0) & (y != background);
        counted += y >= 0;
        bad += wrong;
      }
      sums.shared(Sums::kCount) = static_cast<double>(counted);
      sums.shared(Sums::kBad) = static_cast<double>(bad);
      std::fill(positives.begin() + found, positives.end(), found ? positives[found - 1] : first);
      add_positives(positives.data(), found, sums);
    });
    double* total = static_cast<double*>(sums_tensor.mutable_data_ptr());
    std::fill(total, total + per_block, 0.0);
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t i = 0; i < per_block; ++i) total[i] += parts[b * per_block + i];
    }
  }

  // The losses of these rows; a tile's number of rows more can be read behind them.
  void add_positives(const int64_t* positives, int64_t count, const Sums& sums) const {
    std::vector<float> buffer(softmax_buffer(columns));
    const IntReader label(labels);
    const FloatReader overlap(iou);
    SoftmaxTile tile;
    tile.x = logits.const_data_ptr();
    tile.out = nullptr;
    tile.columns = columns;
    tile.all_rows = rows;
    tile.stream = false;
    for (int64_t first = 0; first < count; first += tile.rows) {
      tile.rows = std::min(tile_rows, count - first);
      tile.order = positives + first;
      for (int64_t i = 0; i < tile.rows; ++i) tile.target[i] = label[tile.order[i]];
      std::fill(tile.scale, tile.scale + tile.rows, 0.0);
      kernel(tile, buffer.data());
      for (int64_t i = 0; i < tile.rows; ++i) {
        const int64_t r = tile.order[i];
        const double plain = tile.loss[i];
        const double limit = plain - plain == 0 ? plain : not_finite(r, tile.target[i], 1.0, nullptr);
        sums.add(scopes.get(r), Sums::kClsPlain, weight.get(r, 1.0) * limit, power(overlap[r]));
      }
    }
  }

  // Targets and scales of the tile's rows, which begin at row `first`; balance and sample: a row's two weights.
  void describe(SoftmaxTile& tile, int64_t first, const std::vector<double>& normalizers, double out_scale,
                const FloatReader* grad_row, double* balance, double* sample) const {
    const IntReader label(labels);
    const FloatReader overlap(iou);
    int64_t positives[kSoftmaxRows], found = 0;
    for (int64_t i = 0; i < tile.rows; ++i) {
      const int64_t y = label[first + i];
      const bool wrong = (y >= columns) | (scopes.get(first + i) < 0), counted = !wrong & (y >= 0);
      tile.target[i] = counted ? y : -1;
      sample[i] = wrong ? NAN : 1.0;
      balance[i] = 1.0;
      positives[found] = i;
      found += counted & (y != background);
    }
    for (int64_t j = 0; j < found; ++j) {
      const int64_t i = positives[j], r = first + i;
      balance[i] = normalizers[scopes.get(r)] * power(overlap[r]);
    }
    if (weight) {
      for (int64_t i = 0; i < tile.rows; ++i) sample[i] *= tile.target[i] < 0 ? 1.0 : weight.get(first + i, 1.0);
    }
    for (int64_t i = 0; i < tile.rows; ++i) {
      tile.scale[i] = sample[i] * balance[i] * (grad_row ? (*grad_row)[first + i] : out_scale);
    }
  }

  // Every row's weight times loss, in order: returns their sum. each: the rows' losses; out: out_scale (or the row's
  // element of grad_rows) times the gradient. Rows with an unusable label give NaN.
  double run(const Tensor& sums_tensor, const Tensor* each, const Tensor* out, double out_scale,
             const Tensor* grad_rows) const {
    const Sums sums = sums_of(sums_tensor);
    const int64_t stride = columns * logits.element_size();
    const char* x = static_cast<const char*>(logits.const_data_ptr());
    char* g = out ? static_cast<char*>(out->mutable_data_ptr()) : nullptr;
    std::optional<FloatWriter> each_row;
    std::optional<FloatReader> grad_row;
    if (each) each_row.emplace(*each);
    if (grad_rows) grad_row.emplace(*grad_rows);
    std::vector<double> normalizers;
    for (int64_t s = 0; s < scopes.count(); ++s) normalizers.push_back(sums.cls_normalizer(s, eps));
    std::vector<double> parts(blocks);
    const bool stream = g && g != x && dtype_index(logits) == kFloat32 && stream_gradient(rows * stride);
    for_blocks([&](int64_t b, int64_t first, int64_t last) {
      std::vector<float> buffer(softmax_buffer(columns));
      double balance[kSoftmaxRows], sample[kSoftmaxRows], losses[kSoftmaxRows];
      SoftmaxTile tile;
      tile.columns = columns;
      tile.order = nullptr;
      tile.stream = stream;
      double sum = 0;
      for (int64_t at = first; at < last; at += tile.rows) {
        tile.rows = std::min(tile_rows, last - at);
        tile.x = x + at * stride;
        tile.out = g ? g + at * stride : nullptr;
        describe(tile, at, normalizers, out_scale, grad_row ? &*grad_row : nullptr, balance, sample);
        kernel(tile, buffer.data());
        for (int64_t i = 0; i < tile.rows; ++i) {
          double plain = tile.loss[i];
          if (plain - plain != 0) plain = not_finite(at + i, tile.target[i], tile.scale[i], out);
          losses[i] = weighted_loss(balance[i], sample[i] * plain);
        }
        for (int64_t i = 0; i < tile.rows; ++i) sum += losses[i];
        for (int64_t i = 0; each && i < tile.rows; ++i) each_row->set(at + i, losses[i]);
      }
      parts[b] = sum;
      if (stream) fence_streams();
    });
    double total = 0;
    for (double part : parts) total += part;
    return sums.shared(Sums::kBad) != 0 ? NAN : total;
  }
};

void cross_entropy_sums(Tensor logits, Tensor labels, Tensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                        int64_t num_scopes, int64_t background, double eta, Tensor sums, TensorList) {
  SoftmaxLoss{logits, labels, iou, weight, {scope_ids, num_scopes}, background, eta, 0.0}.add_up(sums);
}

void cross_entropy_fill(Tensor logits, Tensor labels, Tensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                        int64_t num_scopes, int64_t background, double eta, double eps, OptionalTensor avg_factor,
                        double divisor, double world_size, OptionalTensor grad_scale_tensor, double grad_scale,
                        bool compute_sums, Tensor sums, Tensor loss, TensorList grads, TensorList) {
  const SoftmaxLoss op{logits, labels, iou, weight, {scope_ids, num_scopes}, background, eta, eps};
  if (compute_sums) op.add_up(sums);
  const double divide_by = divisor_of(avg_factor, divisor, sums_of(sums).default_divisor(world_size));
  const double expected = Number(grad_scale_tensor, grad_scale).get();
  const Tensor* out = grads.empty() ? nullptr : &grads[0];
  FloatWriter(loss).set(0, op.run(sums, nullptr, out, expected / divide_by, nullptr) / divide_by);
}

void cross_entropy_backward(Tensor logits, Tensor labels, Tensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                            int64_t num_scopes, int64_t background, double eta, double eps, OptionalTensor avg_factor,
                            double divisor, double world_size, OptionalTensor grad_scale_tensor, double grad_scale,
                            bool filled, Tensor sums, Tensor grad_output, Tensor grad, TensorList) {
  const double scale = FloatReader(grad_output)[0];
  if (filled && scale == Number(grad_scale_tensor, grad_scale).get()) return;
  const SoftmaxLoss op{logits, labels, iou, weight, {scope_ids, num_scopes}, background, eta, eps};
  op.run(sums, nullptr, &grad, scale / divisor_of(avg_factor, divisor, sums_of(sums).default_divisor(world_size)),
         nullptr);
}

// reduction = "none": the rows' losses, or with grad_output (R,) the gradient.
void cross_entropy_elementwise(Tensor logits, Tensor labels, Tensor iou, OptionalTensor weight,
                               OptionalTensor scope_ids, int64_t num_scopes, int64_t background, double eta, double eps,
                               OptionalTensor grad_output, bool compute_sums, Tensor sums, Tensor out, TensorList) {
  const SoftmaxLoss op{logits, labels, iou, weight, {scope_ids, num_scopes}, background, eta, eps};
  if (compute_sums) op.add_up(sums);
  if (grad_output) {
    op.run(sums, nullptr, &out, 0.0, &*grad_output);
  } else {
    op.run(sums, &out, nullptr, 0.0, nullptr);
  }
}

}  // namespace
}  // namespace ioubal

STABLE_TORCH_LIBRARY_IMPL(ioubal, CPU, m) {
  m.impl("cross_entropy_sums.cpp", TORCH_BOX(&ioubal::cross_entropy_sums));
  m.impl("cross_entropy_fill.cpp", TORCH_BOX(&ioubal::cross_entropy_fill));
  m.impl("cross_entropy_backward.cpp", TORCH_BOX(&ioubal::cross_entropy_backward));
  m.impl("cross_entropy_elementwise.cpp", TORCH_BOX(&ioubal::cross_entropy_elementwise));
}
