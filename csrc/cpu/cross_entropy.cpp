// IoU-balanced softmax cross entropy over logits (R, K).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>

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

  static constexpr int64_t kAhead = 8;  // rows

  // pow costs as much as a row's exponentials.
  double power(double overlap) const {
    if (eta != 1.5) return iou_power(overlap, eta);
    const double clamped = clamp(overlap, 0.0, 1.0);
    return clamped * std::sqrt(clamped);
  }

  int64_t rows() const { return logits.size(0); }
  int64_t columns() const { return logits.size(1); }
  int64_t rows_per_block() const { return std::max<int64_t>(1, kBlockEntries / columns()); }
  int64_t blocks() const { return (rows() + rows_per_block() - 1) / rows_per_block(); }
  // f(block, first row, last row) for fixed blocks of rows.
  template <class F>
  void for_blocks(const F& f) const {
    torch::stable::parallel_for(0, blocks(), 1, [&](int64_t begin, int64_t end) {
      FlushDenormals flush;
      for (int64_t b = begin; b < end; ++b) f(b, b * rows_per_block(), std::min(rows(), (b + 1) * rows_per_block()));
    });
  }

  // A row whose loss is not finite, by the rules for infinite logits and NaN.
  double not_finite(int64_t r, int64_t y, double scale, const Tensor* out) const {
    const FloatReader x(logits);
    const int64_t first = r * columns();
    std::optional<FloatWriter> gradient;
    if (out) gradient.emplace(*out);
    return softmax_limit<double>([&](int64_t k) { return x[first + k]; }, columns(), y,
                                 [&](int64_t k, double slope) {
                                   if (gradient) gradient->set(first + k, slope != slope ? slope : scale * slope);
                                 });
  }

  // Row 0 of the sums counts the rows that are not ignored: the default divisor of a softmax loss.
  void add_up(const Tensor& sums_tensor) const {
    const int64_t per_block = 4 * (1 + scopes.count());
    std::vector<double> parts(blocks() * per_block);
    const IntReader label(labels);
    for_blocks([&](int64_t b, int64_t first, int64_t last) {
      const Sums sums{parts.data() + b * per_block};
      std::vector<int64_t> positives;
      positives.reserve(last - first);
      for (int64_t r = first; r < last; ++r) {
        const int64_t y = label[r], scope = scopes.get(r);
        if (y >= 0) sums.shared(Sums::kCount) += 1;
        if (y >= columns() || scope < 0) {
          sums.shared(Sums::kBad) += 1;  // never used as an index; poisons the loss
        } else if (y >= 0 && y != background) {
          positives.push_back(r);
        }
      }
      add_positives(positives, sums);
    });
    double* total = static_cast<double*>(sums_tensor.mutable_data_ptr());
    std::fill(total, total + per_block, 0.0);
    for (int64_t b = 0; b < blocks(); ++b) {
      for (int64_t i = 0; i < per_block; ++i) total[i] += parts[b * per_block + i];
    }
  }

  // The losses of these rows, whose logits are put together for the kernel.
  void add_positives(const std::vector<int64_t>& rows, const Sums& sums) const {
    const SoftmaxRows kernel = kernels().softmax[dtype_index(logits)];
    const int64_t stride = columns() * logits.element_size(), per_tile = softmax_tile_rows(columns());
    const char* x = static_cast<const char*>(logits.const_data_ptr());
    std::vector<char> together(per_tile * stride);
    std::vector<float> buffer(softmax_buffer(columns()));
    const IntReader label(labels);
    const FloatReader overlap(iou);
    SoftmaxTile tile;
    tile.x = together.data();
    tile.out = nullptr;
    tile.columns = columns();
    const int64_t count = static_cast<int64_t>(rows.size());
    for (int64_t first = 0; first < count; first += tile.rows) {
      tile.rows = std::min(per_tile, count - first);
      for (int64_t i = 0; i < tile.rows; ++i) {
        const int64_t r = rows[first + i];
        std::memcpy(together.data() + i * stride, x + r * stride, stride);
        const int64_t later = first + i + kAhead;
        if (later < count) {
          for (int64_t o = 0; o < stride; o += 64) __builtin_prefetch(x + rows[later] * stride + o, 0, 3);
        }
        tile.target[i] = label[r];
        tile.scale[i] = 0;
      }
      kernel(tile, buffer.data());
      for (int64_t i = 0; i < tile.rows; ++i) {
        const int64_t r = rows[first + i];
        const double plain = tile.loss[i];
        const double limit = plain - plain == 0 ? plain : not_finite(r, tile.target[i], 1.0, nullptr);
        sums.add(scopes.get(r), Sums::kClsPlain, weight.get(r, 1.0) * limit, power(overlap[r]));
      }
    }
  }

  // Every row's weight times loss, in order: returns their sum. each: the rows' losses; out: out_scale (or the row's
  // element of grad_rows) times the gradient. Rows with an unusable label give NaN.
  double run(const Tensor& sums_tensor, const Tensor* each, const Tensor* out, double out_scale,
             const Tensor* grad_rows) const {
    const Sums sums = sums_of(sums_tensor);
    const SoftmaxRows kernel = kernels().softmax[dtype_index(logits)];
    const int64_t stride = columns() * logits.element_size(), per_tile = softmax_tile_rows(columns());
    const char* x = static_cast<const char*>(logits.const_data_ptr());
    char* g = out ? static_cast<char*>(out->mutable_data_ptr()) : nullptr;
    const IntReader label(labels);
    const FloatReader overlap(iou);
    std::optional<FloatWriter> each_row;
    std::optional<FloatReader> grad_row;
    if (each) each_row.emplace(*each);
    if (grad_rows) grad_row.emplace(*grad_rows);
    std::vector<double> normalizers;
    for (int64_t s = 0; s < scopes.count(); ++s) normalizers.push_back(sums.cls_normalizer(s, eps));
    std::vector<double> parts(blocks());
    for_blocks([&](int64_t b, int64_t first, int64_t last) {
      std::vector<float> buffer(softmax_buffer(columns()));
      double balance[kSoftmaxRows], sample[kSoftmaxRows];
      SoftmaxTile tile;
      tile.columns = columns();
      double sum = 0;
      for (int64_t at = first; at < last; at += tile.rows) {
        tile.rows = std::min(per_tile, last - at);
        tile.x = x + at * stride;
        tile.out = g ? g + at * stride : nullptr;
        for (int64_t i = 0; i < tile.rows; ++i) {
          const int64_t r = at + i, y = label[r], scope = scopes.get(r);
          const bool usable = y >= 0 && y < columns() && scope >= 0;
          tile.target[i] = usable ? y : -1;
          balance[i] = !usable ? 0.0 : y == background ? 1.0 : normalizers[scope] * power(overlap[r]);
          sample[i] = y < 0 && scope >= 0 ? 0.0 : usable ? weight.get(r, 1.0) : NAN;
          tile.scale[i] = usable ? sample[i] * balance[i] * (grad_row ? (*grad_row)[r] : out_scale) : 0.0;
        }
        kernel(tile, buffer.data());
        for (int64_t i = 0; i < tile.rows; ++i) {
          const int64_t y = tile.target[i];
          double loss = sample[i];
          if (y >= 0) {
            double plain = tile.loss[i];
            if (plain - plain != 0) plain = not_finite(at + i, y, tile.scale[i], out);
            loss = weighted_loss(balance[i], sample[i] * plain);
          }
          if (each_row) each_row->set(at + i, loss);
          sum += loss;
        }
      }
      parts[b] = sum;
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
