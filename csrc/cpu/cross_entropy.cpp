// IoU-balanced softmax cross entropy over logits (R, K).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "cpu/checks.h"
#include "cpu/classification.h"
#include "cpu/dtypes.h"
#include "cpu/large_pages.h"
#include "cpu/power.h"
#include "cpu/sum.h"
#include "math/softmax.h"

namespace ioubal {
namespace {

// A positive row: iou^eta, and its plain loss with the sample's weight.
struct PositiveRow {
  int64_t row, scope;
  double balance, loss;
};

// Rows of some tiles that follow each other, as many as branches that cannot be predicted, how many positives there
// are, are worth. sample: a row's weight, NaN for an unusable label. balance and scope: of the positives, in their
// order.
struct RowGroup {
  static constexpr int64_t kRows = 256;
  int64_t target[kRows];
  double scale[kRows], sample[kRows], loss[kRows];
  int64_t positives[kRows], scope[kRows], found;
  double balance[kRows];
  bool unusable;  // whether a row is
};

// Copies the labels of some rows to `target`; lists those that are not background, without branches, since which ones
// they are cannot be predicted. Returns how many.
template <class Int>
int64_t find_special(const Int* labels, int64_t rows, int64_t background, int64_t* target, int64_t* special) {
  int64_t found = 0;
  for (int64_t i = 0; i < rows; ++i) {
    target[i] = labels[i];
    special[found] = i;
    found += labels[i] != background;
  }
  return found;
}

template <class Int>
int64_t count_not_negative(const Int* labels, int64_t rows) {
  int64_t count = 0;
  for (int64_t i = 0; i < rows; ++i) count += labels[i] >= 0;
  return count;
}

struct SoftmaxLoss {
  const Tensor &logits, &labels, &iou;
  OptionalFloats weight;
  Scopes scopes;
  int64_t background;
  double eta, eps;

  const int64_t rows = logits.size(0), columns = logits.size(1);
  const DtypeIndex dtype = dtype_index(logits.scalar_type());
  const int64_t stride = columns * logits.element_size();
  const char* const x = static_cast<const char*>(logits.const_data_ptr());
  const IntReader label{labels};
  const FloatReader overlap{iou};
  const int64_t tile_rows = softmax_tile_rows(columns);
  const int64_t rows_per_block = std::max<int64_t>(1, kBlockEntries / columns / tile_rows) * tile_rows;
  const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
  const SoftmaxRows kernel = kernels().softmax[dtype];

  // What is asked of all rows. normalizers: of the scopes, if they are known. each: the rows' losses; out: out_scale
  // (or the row's element of grad_rows) times the gradient.
  struct Request {
    const std::vector<double>* normalizers;
    const Tensor *each, *out;
    double out_scale;
    const Tensor* grad_rows;
  };

  // f(block, first row, last row) for fixed blocks of rows.
  template <class F>
  void for_blocks(const F& f) const {
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      FlushDenormals flush;
      for (int64_t b = begin; b < end; ++b) f(b, b * rows_per_block, std::min(rows, (b + 1) * rows_per_block));
    });
  }

  int64_t find_special_rows(int64_t first, int64_t count, int64_t* target, int64_t* special) const {
    return label.visit([&](const auto* all) { return find_special(all + first, count, background, target, special); });
  }

  // A row whose loss is not finite, by the rules for infinite logits and NaN.
  double not_finite(int64_t r, int64_t y, double scale, const Tensor* out) const {
    const FloatReader logit(logits);
    const int64_t first = r * columns;
    std::optional<FloatWriter> gradient;
    if (out) gradient.emplace(*out);
    return softmax_limit<double>([&](int64_t k) { return logit[first + k]; }, columns, y,
                                 [&](int64_t k, double slope) {
                                   if (gradient) gradient->set(first + k, slope != slope ? slope : scale * slope);
                                 });
  }

  int64_t sums_size() const { return 4 * (1 + scopes.count()); }

  // Adds the blocks' sums up; the count stays.
  void finish_sums(const Sums& sums, const std::vector<double>& parts) const {
    const double count = sums.shared(Sums::kCount);
    std::fill(sums.data, sums.data + sums_size(), 0.0);
    sums.shared(Sums::kCount) = count;
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t i = 0; i < sums_size(); ++i) sums.data[i] += parts[b * sums_size() + i];
    }
  }

  // The rows that are not ignored: the default divisor of a softmax loss.
  void count_rows(const Sums& sums) const {
    const int64_t count = label.visit([&](const auto* all) { return count_not_negative(all, rows); });
    sums.shared(Sums::kCount) = static_cast<double>(count);
  }

  // The sums alone, but for the count, from the positives' rows.
  void add_up(const Sums& total) const {
    std::vector<double> parts(blocks * sums_size());
    for_blocks([&](int64_t b, int64_t first, int64_t last) {
      const Sums sums{parts.data() + b * sums_size()};
      std::vector<int64_t> target(last - first), special(last - first), positives;
      const int64_t found = find_special_rows(first, last - first, target.data(), special.data());
      positives.reserve(found + 2 * tile_rows);
      for (int64_t j = 0; j < found; ++j) {
        const int64_t y = target[special[j]];
        if (y >= columns) {
          sums.shared(Sums::kBad) += 1;  // never used as an index; poisons the loss
        } else if (y >= 0 && scopes.get(first + special[j]) >= 0) {
          positives.push_back(first + special[j]);
        }
      }
      for (int64_t r = first; scopes && r < last; ++r) sums.shared(Sums::kBad) += scopes.get(r) < 0;
      const int64_t count = static_cast<int64_t>(positives.size());
      positives.resize(count + 2 * tile_rows, count ? positives.back() : first);
      add_positives(positives.data(), count, sums);
    });
    finish_sums(total, parts);
  }

  // The losses of these rows; a tile's number of rows more can be read behind them.
  void add_positives(const int64_t* positives, int64_t count, const Sums& sums) const {
    std::vector<float> buffer(softmax_buffer(columns));
    int64_t target[kSoftmaxRows];
    double scale[kSoftmaxRows] = {}, loss[kSoftmaxRows];
    SoftmaxTile tile;
    tile.buffer = buffer.data();
    tile.target = target;
    tile.scale = scale;
    tile.loss = loss;
    tile.x = x;
    tile.out = nullptr;
    tile.columns = columns;
    tile.all_rows = rows;
    tile.stream = false;
    for (int64_t first = 0; first < count; first += tile.rows) {
      tile.rows = std::min(tile_rows, count - first);
      tile.order = positives + first;
      for (int64_t i = 0; i < tile.rows; ++i) target[i] = label[tile.order[i]];
      kernel(&tile, nullptr);
      for (int64_t i = 0; i < tile.rows; ++i) {
        const int64_t r = tile.order[i];
        const double limit = loss[i] - loss[i] == 0 ? loss[i] : not_finite(r, target[i], 1.0, nullptr);
        sums.add(scopes.get(r), Sums::kClsPlain, weight.get(r, 1.0) * limit, fast_iou_power(overlap[r], eta));
      }
    }
  }

  // What is known of `count` rows from `first` on before their losses. Without normalizers a positive's scale is that
  // of any other row.
  void describe(RowGroup& g, int64_t first, int64_t count, const Request& q, const FloatReader* grad_row) const {
    for (int64_t r = first + count; r < first + 2 * count; r += 8) {  // of the next rows, which the pass has driven out
      label.prefetch(r);
      overlap.prefetch(r);
    }
    std::fill(g.sample, g.sample + count, 1.0);
    std::fill(g.scale, g.scale + count, q.out_scale);
    int64_t special[RowGroup::kRows];
    const int64_t found = find_special_rows(first, count, g.target, special);
    g.found = 0;
    g.unusable = false;
    const auto leave_out = [&](int64_t i, bool unusable) {
      g.target[i] = -1;
      if (unusable) g.sample[i] = NAN;
      g.unusable |= unusable;
    };
    for (int64_t j = 0; j < found; ++j) {
      const int64_t i = special[j], r = first + i, y = g.target[i], scope = scopes.get(r);
      if (y < 0 || y >= columns || scope < 0) {
        leave_out(i, y >= columns || scope < 0);
        continue;
      }
      g.balance[g.found] = fast_iou_power(overlap[r], eta) * (q.normalizers ? (*q.normalizers)[scope] : 1.0);
      g.positives[g.found] = i;
      g.scope[g.found++] = scope;
    }
    for (int64_t i = 0; scopes && i < count; ++i) {
      if (scopes.get(first + i) < 0) leave_out(i, true);
    }
    for (int64_t i = 0; weight && i < count; ++i) {
      g.sample[i] *= g.target[i] < 0 ? 1.0 : weight.get(first + i, 1.0);
    }
    const bool plain = !weight && !scopes && !grad_row;
    for (int64_t i = 0; !plain && i < count; ++i) {
      g.scale[i] = g.sample[i] * (grad_row ? (*grad_row)[first + i] : q.out_scale);
    }
    for (int64_t j = 0; q.normalizers && j < g.found; ++j) g.scale[g.positives[j]] *= g.balance[j];
  }

  // The losses of a block's rows with their weights, added up. Without normalizers those of the positives are left out
  // and listed; their sums go to `sums`.
  double block(int64_t first, int64_t last, const Request& q, bool stream, const Sums* sums,
               std::vector<PositiveRow>* positives) const {
    std::vector<float> buffers(2 * softmax_buffer(columns));
    std::optional<FloatWriter> each_row;
    std::optional<FloatReader> grad_row;
    if (q.each) each_row.emplace(*q.each);
    if (q.grad_rows) grad_row.emplace(*q.grad_rows);
    char* out = q.out ? static_cast<char*>(q.out->mutable_data_ptr()) : nullptr;
    SoftmaxTile tiles[2];  // in turn
    for (int64_t k = 0; k < 2; ++k) {
      tiles[k].buffer = buffers.data() + k * softmax_buffer(columns);
      tiles[k].columns = columns;
      tiles[k].order = nullptr;
      tiles[k].stream = stream;
    }
    SoftmaxTile *now = &tiles[0], *before = &tiles[1];
    RowGroup g;
    const int64_t group_rows = RowGroup::kRows / tile_rows * tile_rows;
    double total = 0;
    for (int64_t at = first; at < last; at += group_rows) {
      const int64_t count = std::min(group_rows, last - at);
      describe(g, at, count, q, grad_row ? &*grad_row : nullptr);
      for (int64_t i = 0; i < count; i += before->rows) {
        now->rows = std::min(tile_rows, count - i);
        now->x = x + (at + i) * stride;
        now->out = out ? out + (at + i) * stride : nullptr;
        now->target = g.target + i;
        now->scale = g.scale + i;
        now->loss = g.loss + i;
        kernel(now, before);
        std::swap(now, before);
      }
      const double all = sum_of(g.loss, count);
      const bool finite = all - all == 0;
      if (!finite) kernel(nullptr, before);  // what it writes is written over
      for (int64_t i = 0; !finite && i < count; ++i) {
        if (g.loss[i] - g.loss[i] != 0) g.loss[i] = not_finite(at + i, g.target[i], g.scale[i], q.out);
      }
      for (int64_t i = 0; i < count; ++i) g.loss[i] *= g.sample[i];
      for (int64_t j = 0; j < g.found; ++j) {
        double& loss = g.loss[g.positives[j]];
        if (q.normalizers) {
          loss = weighted_loss(g.balance[j], loss);
        } else {
          positives->push_back({at + g.positives[j], g.scope[j], g.balance[j], loss});
          sums->add(g.scope[j], Sums::kClsPlain, loss, g.balance[j]);
          loss = 0;
        }
      }
      if (sums && g.unusable) sums->shared(Sums::kBad) += 1;
      total += sum_of(g.loss, count);
      for (int64_t i = 0; q.each && i < count; ++i) each_row->set(at + i, g.loss[i]);
    }
    kernel(nullptr, before);
    return total;
  }

  bool streams(const Tensor* out) const {
    return out && out->const_data_ptr() != x && dtype == kFloat32 && stream_gradient(rows * stride);
  }

  std::vector<double> normalizers(const Sums& sums) const {
    std::vector<double> found;
    for (int64_t s = 0; s < scopes.count(); ++s) found.push_back(sums.cls_normalizer(s, eps));
    return found;
  }

  // Every row's weight times loss, added up, and `out`; an unusable label makes it NaN. compute_sums: what `sums` holds
  // is the count alone.
  double run(const Sums& sums, bool compute_sums, const Tensor* out, double out_scale) const {
    if (!out || dtype == kFloat32 || dtype == kFloat64) return sweep(sums, compute_sums, out, out_scale);
    if (compute_sums) add_up(sums);
    return with_sums(sums, nullptr, out, out_scale, nullptr);
  }

  // The same with sums that are known; or the rows' losses, or gradients of their own.
  double with_sums(const Sums& sums, const Tensor* each, const Tensor* out, double out_scale,
                   const Tensor* grad_rows) const {
    const std::vector<double> of_scopes = normalizers(sums);
    const bool stream = streams(out);
    std::vector<double> parts(blocks);
    if (out) ask_for_large_pages(*out);
    for_blocks([&](int64_t b, int64_t first, int64_t last) {
      parts[b] = block(first, last, {&of_scopes, each, out, out_scale, grad_rows}, stream, nullptr, nullptr);
      if (stream) fence_streams();
    });
    return total_of(parts, sums);
  }

  // One pass for sums, loss and gradient. A positive's gradient waits for the sums and is scaled where it lies, rather
  // than its logits read twice: their pages are small, those of the gradient large. Not for 16 bits, which would be
  // rounded twice. With sums that are known no pass is saved, but the bits are the same.
  double sweep(const Sums& sums, bool compute_sums, const Tensor* out, double out_scale) const {
    const bool stream = streams(out);
    std::vector<double> parts(blocks), sums_parts(blocks * sums_size());
    std::vector<std::vector<PositiveRow>> positives(blocks);
    if (out) ask_for_large_pages(*out);
    for_blocks([&](int64_t b, int64_t first, int64_t last) {
      const Sums own{sums_parts.data() + b * sums_size()};
      positives[b].reserve((last - first) / 4);
      parts[b] = block(first, last, {nullptr, nullptr, out, out_scale, nullptr}, stream, &own, &positives[b]);
      if (stream) fence_streams();
    });
    if (compute_sums) finish_sums(sums, sums_parts);
    const std::vector<double> of_scopes = normalizers(sums);
    constexpr double kMost = 1e6;  // what a larger factor meets may have been too small for its dtype
    std::vector<int> too_large(blocks);
    char* const g = out ? static_cast<char*>(out->mutable_data_ptr()) : nullptr;
    for_blocks([&](int64_t b, int64_t, int64_t) {
      constexpr size_t kAhead = 16;
      const auto row_ahead = [&](size_t i) -> const char* {
        const std::vector<PositiveRow>* of_block = &positives[b];
        if (i >= of_block->size() && b + 1 < blocks) i -= of_block->size(), ++of_block;
        return i < of_block->size() ? g + (*of_block)[i].row * stride : nullptr;
      };
      for (size_t i = 0; i < positives[b].size(); ++i) {
        const PositiveRow& p = positives[b][i];
        const double factor = p.balance * of_scopes[p.scope];
        parts[b] += weighted_loss(factor, p.loss);
        if (!g) continue;
        too_large[b] |= !(factor <= kMost);
        if (const char* ahead = row_ahead(i + kAhead)) prefetch_row(ahead);
        if (dtype == kFloat32) {
          scale(reinterpret_cast<float*>(g + p.row * stride), static_cast<float>(factor));
        } else {
          scale(reinterpret_cast<double*>(g + p.row * stride), factor);
        }
      }
    });
    if (std::count(too_large.begin(), too_large.end(), 1)) return with_sums(sums, nullptr, out, out_scale, nullptr);
    return total_of(parts, sums);
  }

  IOUBAL_PREFETCHES void prefetch_row(const char* row) const {
    for (int64_t k = 0; k < stride; k += 64) __builtin_prefetch(row + k, 1, 3);
  }

  template <class T>
  void scale(T* row, T factor) const {
    for (int64_t k = 0; k < columns; ++k) row[k] *= factor;
  }

  static double total_of(const std::vector<double>& parts, const Sums& sums) {
    double total = 0;
    for (double part : parts) total += part;
    return sums.shared(Sums::kBad) != 0 ? NAN : total;
  }
};

void cross_entropy_sums(Tensor logits, Tensor labels, Tensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                        int64_t num_scopes, int64_t background, double eta, Tensor sums, TensorList) {
  const SoftmaxLoss op{logits, labels, iou, weight, {scope_ids, num_scopes}, background, eta, 0.0};
  op.count_rows(sums_of(sums));
  op.add_up(sums_of(sums));
}

void cross_entropy_fill(Tensor logits, Tensor labels, Tensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                        int64_t num_scopes, int64_t background, double eta, double eps, OptionalTensor avg_factor,
                        double divisor, double world_size, OptionalTensor grad_scale_tensor, double grad_scale,
                        bool compute_sums, Tensor sums, Tensor loss, TensorList grads, TensorList) {
  const SoftmaxLoss op{logits, labels, iou, weight, {scope_ids, num_scopes}, background, eta, eps};
  const Tensor* out = grads.empty() ? nullptr : &grads[0];
  const Sums s = sums_of(sums);
  if (compute_sums) op.count_rows(s);
  const double divide_by = divisor_of(avg_factor, divisor, s.default_divisor(world_size));
  const double out_scale = Number(grad_scale_tensor, grad_scale).get() / divide_by;
  FloatWriter(loss).set(0, op.run(s, compute_sums, out, out_scale) / divide_by);
}

// check_labels of labels and scope_ids and, if it finds nothing, cross_entropy_fill for one process, whose arguments
// come packed. Returns the position it found, -1 for none.
int64_t cross_entropy_checked_fill(TensorList read, TensorList written, std::vector<int64_t> integers,
                                   std::vector<double> numbers) {
  enum : int { kBackground, kEta, kEps, kDivisor, kGradScale };
  const std::vector<double>& n = numbers;
  const PackedRows p(read, written, integers, std::numeric_limits<int64_t>::min());
  if (p.first_bad < 0) {
    cross_entropy_fill(p.logits, p.labels, p.iou, p.weight, p.scope_ids, p.num_scopes,
                       static_cast<int64_t>(n[kBackground]), n[kEta], n[kEps], p.avg_factor, n[kDivisor], 1.0,
                       p.grad_scale, n[kGradScale], true, p.sums, p.loss, p.grads, {});
  }
  return p.first_bad;
}

void cross_entropy_backward(Tensor logits, Tensor labels, Tensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                            int64_t num_scopes, int64_t background, double eta, double eps, OptionalTensor avg_factor,
                            double divisor, double world_size, OptionalTensor grad_scale_tensor, double grad_scale,
                            bool filled, Tensor sums, Tensor grad_output, Tensor grad, TensorList) {
  const double scale = FloatReader(grad_output)[0];
  if (filled && scale == Number(grad_scale_tensor, grad_scale).get()) return;
  const SoftmaxLoss op{logits, labels, iou, weight, {scope_ids, num_scopes}, background, eta, eps};
  const Sums s = sums_of(sums);
  op.run(s, false, &grad, scale / divisor_of(avg_factor, divisor, s.default_divisor(world_size)));
}

// reduction = "none": the rows' losses, or with grad_output (R,) the gradient.
void cross_entropy_elementwise(Tensor logits, Tensor labels, Tensor iou, OptionalTensor weight,
                               OptionalTensor scope_ids, int64_t num_scopes, int64_t background, double eta, double eps,
                               OptionalTensor grad_output, bool compute_sums, Tensor sums, Tensor out, TensorList) {
  const SoftmaxLoss op{logits, labels, iou, weight, {scope_ids, num_scopes}, background, eta, eps};
  const Sums s = sums_of(sums);
  if (compute_sums) {
    op.count_rows(s);
    op.add_up(s);
  }
  if (grad_output) {
    op.with_sums(s, nullptr, &out, 0.0, &*grad_output);
  } else {
    op.with_sums(s, &out, nullptr, 0.0, nullptr);
  }
}

}  // namespace
}  // namespace ioubal

STABLE_TORCH_LIBRARY_IMPL(ioubal, CPU, m) {
  m.impl("cross_entropy_sums.cpp", TORCH_BOX(&ioubal::cross_entropy_sums));
  m.impl("cross_entropy_fill.cpp", TORCH_BOX(&ioubal::cross_entropy_fill));
  m.impl("cross_entropy_checked_fill.cpp", TORCH_BOX(&ioubal::cross_entropy_checked_fill));
  m.impl("cross_entropy_backward.cpp", TORCH_BOX(&ioubal::cross_entropy_backward));
  m.impl("cross_entropy_elementwise.cpp", TORCH_BOX(&ioubal::cross_entropy_elementwise));
}
