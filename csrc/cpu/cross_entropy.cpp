// IoU-balanced softmax cross entropy over logits (R, K).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

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

  int64_t rows() const { return logits.size(0); }
  int64_t columns() const { return logits.size(1); }
  int64_t rows_per_block() const { return std::max<int64_t>(1, kBlockEntries / columns()); }
  int64_t blocks() const { return (rows() + rows_per_block() - 1) / rows_per_block(); }
  std::vector<float> buffer() const { return std::vector<float>(columns() + 16); }

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
    const SoftmaxRow row = kernels().softmax[dtype_index(logits)];
    const char* x = static_cast<const char*>(logits.const_data_ptr());
    const int64_t stride = columns() * logits.element_size();
    const IntReader label(labels);
    const FloatReader overlap(iou);
    for_blocks([&](int64_t b, int64_t first, int64_t last) {
      const Sums sums{parts.data() + b * per_block};
      std::vector<float> scratch = buffer();
      for (int64_t r = first; r < last; ++r) {
        const int64_t y = label[r], scope = scopes.get(r);
        if (y >= 0) sums.shared(Sums::kCount) += 1;
        if (y >= columns() || scope < 0) {
          sums.shared(Sums::kBad) += 1;  // never used as an index; poisons the loss
          continue;
        }
        if (y < 0 || y == background) continue;
        const double plain = row(x + r * stride, nullptr, columns(), y, 1.0, scratch.data());
        const double limit = plain - plain == 0 ? plain : not_finite(r, y, 1.0, nullptr);
        sums.add(scope, Sums::kClsPlain, weight.get(r, 1.0) * limit, iou_power(overlap[r], eta));
      }
    });
    double* total = static_cast<double*>(sums_tensor.mutable_data_ptr());
    std::fill(total, total + per_block, 0.0);
    for (int64_t b = 0; b < blocks(); ++b) {
      for (int64_t i = 0; i < per_block; ++i) total[i] += parts[b * per_block + i];
    }
  }

  // Every row's weight times loss, in order: returns their sum. each: the rows' losses; out: out_scale (or the row's
  // element of grad_rows) times the gradient. Rows with an unusable label give NaN.
  double run(const Tensor& sums_tensor, const Tensor* each, const Tensor* out, double out_scale,
             const Tensor* grad_rows) const {
    const Sums sums = sums_of(sums_tensor);
    const SoftmaxRow row = kernels().softmax[dtype_index(logits)];
    const int64_t stride = columns() * logits.element_size();
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
      std::vector<float> scratch = buffer();
      double sum = 0;
      for (int64_t r = first; r < last; ++r) {
        const int64_t y = label[r], scope = scopes.get(r);
        for (int64_t o = 0; o < stride; o += 64) {
          __builtin_prefetch(x + r * stride + 2048 + o, 0, 3);
          if (g) __builtin_prefetch(g + r * stride + 2048 + o, 1, 3);
        }
        double loss = 0;
        if (y < 0 || y >= columns() || scope < 0) {
          if (g) std::fill(g + r * stride, g + (r + 1) * stride, 0);
          if (y >= columns() || scope < 0) loss = NAN;
        } else {
          const double balance = y == background ? 1.0 : normalizers[scope] * iou_power(overlap[r], eta);
          const double sample = weight.get(r, 1.0);
          const double scale = sample * balance * (grad_row ? (*grad_row)[r] : out_scale);
          double plain = row(x + r * stride, g ? g + r * stride : nullptr, columns(), y, scale, scratch.data());
          if (plain - plain != 0) plain = not_finite(r, y, scale, out);
          loss = weighted_loss(balance, sample * plain);
        }
        if (each_row) each_row->set(r, loss);
        sum += loss;
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
