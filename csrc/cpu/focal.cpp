// IoU-balanced sigmoid focal loss and binary cross entropy over flat logits (R, K).
#include <torch/csrc/stable/library.h>

#include "cpu/checks.h"
#include "cpu/classification.h"
#include "cpu/dtypes.h"
#include "cpu/large_pages.h"
#include "cpu/power.h"
#include "cpu/scan.h"

namespace ioubal {
namespace {

struct FlatFocal {
  const Tensor &logits, &labels, &iou;
  OptionalFloats weight;
  Scopes scopes;
  FocalParameters focal;

  std::vector<PositiveEntry> positives;
  std::vector<int64_t> ignored, bad;

  void collect() {
    const int64_t rows = logits.size(0), columns = logits.size(1);
    const FloatReader overlap(iou);
    if (scopes) {
      for (int64_t r = 0; r < rows; ++r) {
        if (scopes.get(r) < 0) bad.push_back(r);
      }
    }
    for (const Exceptional& e : find_exceptional(IntReader(labels), rows, kBackground)) {
      const int64_t scope = scopes.get(e.index);
      if (e.value == kIgnore) {
        ignored.push_back(e.index);
      } else if (e.value < 0 || e.value >= columns) {
        bad.push_back(e.index);  // never used as an index; poisons the loss
      } else if (scope >= 0) {
        positives.push_back({0, e.index * columns + e.value, scope, 0, fast_iou_power(overlap[e.index], focal.eta),
                             weight.get(e.index, 1.0)});
      }
    }
  }

  // Counts alone; the losses follow when the logits are known.
  void begin(const Sums& sums) const {
    std::fill(sums.data, sums.data + 4 * (1 + scopes.count()), 0.0);
    sums.shared(Sums::kCount) = static_cast<double>(positives.size());
    sums.shared(Sums::kBad) = static_cast<double>(bad.size());
  }

  // One run, or with sample weights one per stretch of equal weights; with weights where those are short.
  DensePass dense(const Tensor* out, double loss_scale, double out_scale) const {
    const int64_t rows = logits.size(0), columns = logits.size(1), size = logits.element_size();
    const size_t most =
        static_cast<size_t>(rows * columns / 128);  // of runs: each takes time and memory as 128 entries
    DensePass pass;
    if (out) ask_for_large_pages(*out);
    const auto add_run = [&](int64_t first, int64_t last, double w) {
      Run run;
      run.x = static_cast<const char*>(logits.const_data_ptr()) + first * columns * size;
      if (out) run.out = static_cast<char*>(out->mutable_data_ptr()) + first * columns * size;
      run.count = (last - first) * columns;
      run.loss_scale = focal.negative_factor() * loss_scale * w;
      run.out_scale = focal.negative_factor() * out_scale * w;
      pass.runs.push_back(run);
    };
    std::vector<int64_t> starts = {0};
    std::vector<double> weights;
    if (weight) {
      const FloatReader& w = weight.reader();
      auto next = ignored.begin();
      for (int64_t r = 0; r < rows && weights.size() <= most; ++r) {
        if (next != ignored.end() && *next == r) {  // in any run: its weight, which may be NaN, does not count
          ++next;
        } else if (weights.empty() || w[r] != weights.back()) {
          if (!weights.empty()) starts.push_back(r);
          weights.push_back(w[r]);
        }
      }
    }
    if (weights.size() > most) {
      starts = {0};
      add_run(0, rows, 1.0);
      pass.runs[0].weights = &weight.reader();
      pass.runs[0].columns = columns;
    } else if (weight) {
      if (weights.empty()) weights.push_back(0.0);
      for (size_t i = 0; i < starts.size() && rows > 0; ++i) {
        add_run(starts[i], i + 1 < starts.size() ? starts[i + 1] : rows, weights[i]);
      }
    } else {
      add_run(0, rows, 1.0);
    }
    const auto run_of = [&](int64_t row) {
      return std::upper_bound(starts.begin(), starts.end(), row) - starts.begin() - 1;
    };
    for (const PositiveEntry& p : positives) {
      const int64_t run = run_of(p.entry / columns);
      pass.skip_positive(run, p.entry - starts[run] * columns);
    }
    for (int64_t row : ignored) {
      const int64_t run = run_of(row);
      pass.skip(run, (row - starts[run]) * columns, columns);
    }
    return pass;
  }

  // Writes the gradient (kGradient) or the element-wise loss (kLoss), both times out_scale; returns the loss times
  // loss_scale. compute_sums: completes the sums.
  double run(const Sums& sums, bool compute_sums, const Tensor* out, double loss_scale, double out_scale,
             Output output) {
    DensePass pass = dense(out, loss_scale, out_scale);
    double total = pass(dtype_index(logits.scalar_type()), focal.gamma, output);
    for (size_t i = 0; i < positives.size(); ++i) {
      positives[i].meet(pass.positives()[i], focal);
      if (compute_sums) positives[i].add_to(sums);
    }
    std::optional<FloatWriter> writer;
    if (out) writer.emplace(*out);
    for (const PositiveEntry& p : positives) {
      const double w = sums.cls_normalizer(p.scope, focal.eps) * p.balance;
      const double loss = weighted_loss(w, p.term.loss);
      if (loss_scale != 0) total += loss_scale * loss;
      if (out) writer->set(p.entry, out_scale * (output == Output::kLoss ? loss : w * p.term.grad));
    }
    if (output == Output::kLoss) {
      const int64_t columns = logits.size(1);
      for (int64_t row : bad) {
        for (int64_t k = 0; k < columns; ++k) writer->set(row * columns + k, NAN);
      }
    }
    return sums.shared(Sums::kBad) != 0 ? NAN : total;
  }
};

void focal_sums(Tensor logits, Tensor labels, Tensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                int64_t num_scopes, double eta, double alpha, double gamma, Tensor sums, TensorList) {
  FlatFocal op{logits, labels, iou, weight, {scope_ids, num_scopes}, {eta, alpha, gamma, 0.0}, {}, {}, {}};
  op.collect();
  const Sums s = sums_of(sums);
  op.begin(s);
  const FloatReader x(logits);
  for (PositiveEntry& p : op.positives) {
    p.meet(x[p.entry], op.focal);
    p.add_to(s);
  }
}

// Loss and, with a buffer in grads, its gradient. compute_sums false: `sums` holds the positives' sums of all ranks.
void focal_fill(Tensor logits, Tensor labels, Tensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                int64_t num_scopes, double eta, double alpha, double gamma, double eps, OptionalTensor avg_factor,
                double divisor, double world_size, OptionalTensor grad_scale_tensor, double grad_scale,
                bool compute_sums, Tensor sums, Tensor loss, TensorList grads, TensorList) {
  FlatFocal op{logits, labels, iou, weight, {scope_ids, num_scopes}, {eta, alpha, gamma, eps}, {}, {}, {}};
  op.collect();
  const Sums s = sums_of(sums);
  if (compute_sums) op.begin(s);
  const double divide_by = divisor_of(avg_factor, divisor, s.default_divisor(world_size));
  const double expected = Number(grad_scale_tensor, grad_scale).get();
  const Tensor* out = grads.empty() ? nullptr : &grads[0];
  FloatWriter(loss).set(
      0, op.run(s, compute_sums, out, 1.0 / divide_by, expected / divide_by, out ? Output::kGradient : Output::kNone));
}

// check_labels of labels and scope_ids and, if it finds nothing, focal_fill for one process, whose arguments come
// packed. Returns the position it found, -1 for none.
int64_t focal_checked_fill(TensorList read, TensorList written, std::vector<int64_t> integers,
                           std::vector<double> numbers) {
  enum : int { kEta, kAlpha, kGamma, kEps, kDivisor, kGradScale };
  const std::vector<double>& n = numbers;
  const PackedRows p(read, written, integers, kIgnore);
  if (p.first_bad < 0) {
    focal_fill(p.logits, p.labels, p.iou, p.weight, p.scope_ids, p.num_scopes, n[kEta], n[kAlpha], n[kGamma], n[kEps],
               p.avg_factor, n[kDivisor], 1.0, p.grad_scale, n[kGradScale], true, p.sums, p.loss, p.grads, {});
  }
  return p.first_bad;
}

// Leaves a gradient filled for the expected grad_output as it is, else computes it anew.
void focal_backward(Tensor logits, Tensor labels, Tensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                    int64_t num_scopes, double eta, double alpha, double gamma, double eps, OptionalTensor avg_factor,
                    double divisor, double world_size, OptionalTensor grad_scale_tensor, double grad_scale, bool filled,
                    Tensor sums, Tensor grad_output, Tensor grad, TensorList) {
  const double scale = FloatReader(grad_output)[0];
  if (filled && scale == Number(grad_scale_tensor, grad_scale).get()) return;
  FlatFocal op{logits, labels, iou, weight, {scope_ids, num_scopes}, {eta, alpha, gamma, eps}, {}, {}, {}};
  op.collect();
  const Sums s = sums_of(sums);
  const double divide_by = divisor_of(avg_factor, divisor, s.default_divisor(world_size));
  op.run(s, false, &grad, 0.0, scale / divide_by, Output::kGradient);
}

// reduction = "none": the loss of every entry (`gradient` false) or its derivative.
void focal_elementwise(Tensor logits, Tensor labels, Tensor iou, OptionalTensor weight, OptionalTensor scope_ids,
                       int64_t num_scopes, double eta, double alpha, double gamma, double eps, bool gradient,
                       bool compute_sums, Tensor sums, Tensor out, TensorList) {
  FlatFocal op{logits, labels, iou, weight, {scope_ids, num_scopes}, {eta, alpha, gamma, eps}, {}, {}, {}};
  op.collect();
  const Sums s = sums_of(sums);
  if (compute_sums) op.begin(s);
  op.run(s, compute_sums, &out, 0.0, 1.0, gradient ? Output::kGradient : Output::kLoss);
}

}  // namespace
}  // namespace ioubal

STABLE_TORCH_LIBRARY_IMPL(ioubal, CPU, m) {
  m.impl("focal_sums.cpp", TORCH_BOX(&ioubal::focal_sums));
  m.impl("focal_fill.cpp", TORCH_BOX(&ioubal::focal_fill));
  m.impl("focal_checked_fill.cpp", TORCH_BOX(&ioubal::focal_checked_fill));
  m.impl("focal_backward.cpp", TORCH_BOX(&ioubal::focal_backward));
  m.impl("focal_elementwise.cpp", TORCH_BOX(&ioubal::focal_elementwise));
}
