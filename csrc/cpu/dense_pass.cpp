#include "cpu/dense_pass.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/tensor_access.h"
#include "cpu/dtypes.h"
#include "cpu/sum.h"

namespace ioubal {
namespace {

// Looking up breaks off around each skip; past this many in a block a mask of its entries is cheaper.
constexpr int64_t kManySkips = 128;

template <class T>
double look_up(const FocalTable& table, const void* x_, void* out_, int64_t count, LeftOut left_out) {
  const T* x = static_cast<const T*>(x_);
  T* out = static_cast<T*>(out_);
  if (left_out.end - left_out.skip > kManySkips) {
    std::vector<uint8_t> counted(count + kMaskPad, 0xff);
    left_out.fill_mask(x, 0, count, counted.data());
    return table(x, out, count, {counted.data(), 0, count});
  }
  double sum = 0;
  int64_t at = 0;
  const auto until = [&](int64_t to) {
    if (to <= at) return;
    PeriodicMask mask = left_out.mask;
    if (mask.period != 0) mask.start = (mask.start + at) % mask.period;
    sum += table(x + at, out ? out + at : nullptr, to - at, mask);
  };
  for (; left_out.any(); ++left_out.skip) {
    const Skip& skip = *left_out.skip;
    const int64_t from = skip.first - left_out.start, to = std::min(from + skip.count, count);
    until(from);
    at = std::max<int64_t>(from, 0);
    if (skip.positive >= 0) left_out.positives[skip.positive] = static_cast<float>(x[at]);
    if (out) std::memset(static_cast<void*>(out + at), 0, (to - at) * sizeof(T));
    at = to;
  }
  until(count);
  return sum;
}

}  // namespace

void DensePass::mask_anchor(int64_t run, int64_t location, int64_t locations) {
  Run& r = runs[run];
  if (r.mask_offset < 0) {
    r.mask_offset = static_cast<int64_t>(masks_.size());
    r.mask_period = locations;
    r.bits_offset = static_cast<int64_t>(mask_bits_.size());
    masks_.resize(masks_.size() + locations + kMaskPad, 0xff);
    mask_bits_.resize(mask_bits_.size() + (locations + kMaskPad) / 8 + 5, 0xff);
  }
  for (int64_t i = location; i < locations + kMaskPad; i += locations) {
    masks_[r.mask_offset + i] = 0;
    mask_bits_[r.bits_offset + i / 8] &= static_cast<uint8_t>(~(1 << i % 8));
  }
}

void DensePass::prepare() {
  // Counting sort by run: skips of one run keep the order they were added in.
  for (const Added& a : added_) ++runs[a.run].last_skip;
  int64_t offset = 0;
  for (Run& run : runs) {
    run.first_skip = offset;
    offset += run.last_skip;
    run.last_skip = run.first_skip;
  }
  skips_.resize(added_.size());
  for (const Added& a : added_) skips_[runs[a.run].last_skip++] = a.skip;
  added_.clear();
  for (Run& run : runs) {
    const auto begin = skips_.begin() + run.first_skip, end = skips_.begin() + run.last_skip;
    const auto before = [](const Skip& a, const Skip& b) { return a.first < b.first; };
    // Positives and then ignored rows, each ascending as a rule: of flat heads always.
    const auto second = std::is_sorted_until(begin, end, before);
    if (std::is_sorted(second, end, before)) {
      std::inplace_merge(begin, second, end, before);
    } else {
      std::sort(begin, end, before);
    }
    // Ignored neighbours become one range: an image of ignored anchors is a single skip.
    int64_t kept = run.first_skip;
    for (int64_t i = run.first_skip; i < run.last_skip; ++i) {
      const Skip &s = skips_[i], *last = kept > run.first_skip ? &skips_[kept - 1] : nullptr;
      if (last && s.positive < 0 && last->positive < 0 && last->first + last->count == s.first) {
        skips_[kept - 1].count += s.count;
      } else {
        skips_[kept++] = s;
      }
    }
    run.last_skip = kept;
  }
}

void DensePass::make_tables(int dtype, double gamma, Output output) {
  // Only runs that matter: with sample weights there may be one for each row. NaN cannot be looked for among scales.
  constexpr int64_t kSmallRun = 4096;
  const bool by_octave = dtype == kBFloat16 && output != Output::kLoss && kernels().octaves;
  const int64_t threshold = table_threshold(gamma, by_octave);
  const auto scale_of = [&](const Run& run) { return output == Output::kNone ? 0.0 : run.out_scale; };
  const auto counts = [&](const Run& run) {
    return !run.weights && run.count >= std::min(kSmallRun, threshold) && !std::isnan(scale_of(run));
  };
  for (const Run& run : runs) {
    if (counts(run)) tables_[scale_of(run)].logits += run.count;
  }
  for (Run& run : runs) {
    if (!counts(run)) continue;
    ScaleTable& made = tables_[scale_of(run)];
    if (made.logits < threshold) continue;
    if (by_octave && !made.octaves) {
      const FlushDenormals flush;
      made.octaves = std::make_unique<OctaveTable>(kernels().focal, scale_of(run), gamma, output);
    } else if (!by_octave && !made.table) {
      made.table = std::make_unique<FocalTable>(dtype, scale_of(run), gamma, output);
    }
    run.table = made.table.get();
    run.octaves = made.octaves.get();
  }
}

LeftOut DensePass::left_out_of(const Run& run, int64_t first, int64_t last) {
  const auto ends_before = [](const Skip& s, int64_t entry) { return s.first + s.count <= entry; };
  const auto starts_before = [](const Skip& s, int64_t entry) { return s.first < entry; };
  const Skip* all = skips_.data();
  LeftOut left_out;
  left_out.skip = std::lower_bound(all + run.first_skip, all + run.last_skip, first, ends_before);
  left_out.end = std::lower_bound(left_out.skip, all + run.last_skip, last, starts_before);
  left_out.start = first;
  left_out.positives = positives_.data();
  if (run.mask_offset >= 0) {
    left_out.mask = {masks_.data() + run.mask_offset, first % run.mask_period, run.mask_period,
                     mask_bits_.data() + run.bits_offset};
  }
  return left_out;
}

// Whole rows with a weight each: some at a time, whose losses and unweighted gradients stay in the L1 cache until they
// are multiplied. C: what is computed in, float for 16-bit logits.
template <class C, class T>
double DensePass::weighted_block(const Run& run, int64_t first, int64_t last, double gamma, Output output) {
  constexpr bool kConverts = sizeof(C) != sizeof(T);
  const FocalDense kernel = kernels().focal[sizeof(C) == 8 ? kFloat64 : kFloat32];
  const int64_t columns = run.columns, rows = std::max<int64_t>(1, 2048 / columns), tile = rows * columns;
  std::vector<C> losses(tile), logits(kConverts ? tile : 0), weights(rows);
  double total = 0;
  for (int64_t at = first; at < last; at += tile) {
    const int64_t count = std::min(tile, last - at);
    const T* x = reinterpret_cast<const T*>(run.x) + at;
    T* out = run.out ? reinterpret_cast<T*>(run.out) + at : nullptr;
    const LeftOut left_out = left_out_of(run, at, at + count);
    for (int64_t r = 0; r < count / columns; ++r) weights[r] = static_cast<C>((*run.weights)[at / columns + r]);
    for (const Skip* skip = left_out.skip; skip != left_out.end; ++skip) {
      if (skip->positive >= 0) continue;
      const int64_t from = std::max(skip->first - at, int64_t{0}), to = std::min(skip->first + skip->count - at, count);
      std::fill(weights.begin() + from / columns, weights.begin() + to / columns, C(0));
    }
    for (int64_t i = 0; kConverts && i < count; ++i) logits[i] = static_cast<C>(x[i]);
    const void* from = kConverts ? static_cast<const void*>(logits.data()) : x;
    // The losses first: the gradient may take the logits' place.
    kernel(from, losses.data(), count, 1.0, gamma, left_out, Output::kLoss, false, nullptr);
    for (int64_t r = 0; r < count / columns; ++r) total += weights[r] * sum_of(losses.data() + r * columns, columns);
    if (!out) continue;
    C* written = kConverts || output == Output::kLoss ? losses.data() : reinterpret_cast<C*>(out);
    C scale = static_cast<C>(run.out_scale);
    if (output == Output::kGradient) {
      kernel(from, written, count, run.out_scale, gamma, left_out, output, false, nullptr);
      scale = C(1);
    }
    for (int64_t r = 0; r < count / columns; ++r) {
      const C factor = scale * weights[r];
      C* row = written + r * columns;
      for (int64_t k = 0; k < columns; ++k) row[k] *= factor;
    }
    for (int64_t i = 0; static_cast<void*>(written) != out && i < count; ++i) out[i] = static_cast<T>(written[i]);
  }
  return total;
}

double DensePass::block(const Run& run, int64_t first, int64_t last, int dtype, double gamma, Output output,
                        bool stream) {
  if (run.weights) {
    switch (dtype) {
      case kFloat32: return weighted_block<float, float>(run, first, last, gamma, output);
      case kBFloat16: return weighted_block<float, c10::BFloat16>(run, first, last, gamma, output);
      case kFloat16: return weighted_block<float, c10::Half>(run, first, last, gamma, output);
      default: return weighted_block<double, double>(run, first, last, gamma, output);
    }
  }
  const LeftOut left_out = left_out_of(run, first, last);
  const char* x = run.x + first * size_of(dtype);
  char* out = run.out ? run.out + first * size_of(dtype) : nullptr;
  if (!run.table) {
    return kernels().focal[dtype](x, out, last - first, run.out_scale, gamma, left_out, output, stream, run.octaves);
  }
  return dtype == kBFloat16 ? look_up<c10::BFloat16>(*run.table, x, out, last - first, left_out)
                            : look_up<c10::Half>(*run.table, x, out, last - first, left_out);
}

double DensePass::operator()(int dtype, double gamma, Output output) {
  prepare();
  if (size_of(dtype) == 2) make_tables(dtype, gamma, output);
  struct Block {
    int64_t run, first, last;
  };
  std::vector<Block> blocks;
  for (size_t r = 0; r < runs.size(); ++r) {
    const int64_t columns = runs[r].columns, step = std::max<int64_t>(1, kBlockEntries / columns) * columns;
    for (int64_t i = 0; i < runs[r].count; i += step) {
      blocks.push_back({static_cast<int64_t>(r), i, std::min(i + step, runs[r].count)});
    }
  }
  int64_t written = 0;
  bool in_place = false;
  for (const Run& run : runs) {
    written += run.count * size_of(dtype);
    in_place |= run.out == run.x;
  }
  const bool stream = output == Output::kGradient && !in_place && stream_gradient(written);
  std::vector<double> sums(blocks.size());
  torch::stable::parallel_for(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t begin, int64_t end) {
    FlushDenormals flush;
    for (int64_t b = begin; b < end; ++b) {
      const Run& run = runs[blocks[b].run];
      sums[b] = block(run, blocks[b].first, blocks[b].last, dtype, gamma, output, stream);
    }
    if (stream) fence_streams();
  });
  double total = 0;
  for (size_t b = 0; b < blocks.size(); ++b) total += sums[b] * runs[blocks[b].run].loss_scale;
  return total;
}

}  // namespace ioubal
