#include "cuda/focal_fill.h"

#include <atomic>

namespace ioubal::cuda {
namespace {

// Groups of a tile: what tests and bench/gpu/tune.py choose; a negative number: by the rule below.
std::atomic<int64_t> chosen_iterations{-1};

void cuda_plan(int64_t iterations) {
  STD_TORCH_CHECK(iterations != 0 && iterations <= kMostIterations, "ioubal_kernels: cuda_plan: no such plan");
  chosen_iterations = iterations;
}

// The order of the sums follows from the sizes alone: no question to the device here. Small batches fill the device
// with short tiles. With longer ones a block's start costs less, which counts for 16 bits, where arithmetic binds; in
// float32 memory does, and slows down when blocks stream through many places for long. Measured on an H200.
u32 iterations_of(int64_t elements, u32 element) {
  const int64_t chosen = chosen_iterations;
  if (chosen > 0) return static_cast<u32>(chosen);
  if (element == 4) return elements >= (1 << 23) ? 2 : 1;
  return elements >= (1 << 24) ? 4 : 2;
}

// Tiles of strips with a positive, about, and more for large batches: enough to do many side by side where classes are
// few and most strips have one, and few enough not to count where hardly any has.
constexpr u32 kPositiveTiles = 512;

// Blocks of the launch that marks strips, besides the one of the coefficients.
constexpr u32 kMostMarkBlocks = 512;

// Beside the one block of the coefficients, for which all else waits, what memory can do meanwhile.
__global__ void __launch_bounds__(kCoefficientThreads, 1)
    coefficients_and_strips_kernel(const IOUBAL_GRID_CONSTANT CoefficientsTable tb,
                                   const IOUBAL_GRID_CONSTANT DenseTable dense, const u32 words, const u32 mark_blocks,
                                   const IOUBAL_GRID_CONSTANT ZerosTable zeros) {
  if (blockIdx.x == 0) return coefficients_block(tb);
  if (blockIdx.x > mark_blocks) return zeros_tile(zeros, blockIdx.x - 1 - mark_blocks);
  const u32 step = mark_blocks * kCoefficientThreads;
  for (u32 i = (blockIdx.x - 1) * kCoefficientThreads + threadIdx.x; i < words; i += step) mark_word(dense, i);
}

// After the pass of a forward: the sum of its losses, and the gradient of the positives' deltas.
constexpr u32 kFinishThreads = 512;
__global__ void __launch_bounds__(kFinishThreads, 1)
    focal_finish_kernel(const IOUBAL_GRID_CONSTANT FillTable tb, const IOUBAL_GRID_CONSTANT LossSum losses) {
  __shared__ double scratch[kFinishThreads / kWarp];
  if (blockIdx.x == 0) return add_losses<kFinishThreads, 16>(losses, scratch);
  positive_deltas(tb, (blockIdx.x - 1) * kFinishThreads + threadIdx.x);
}

}  // namespace

void plan_dense(DenseTable& tb, Dtype type, u32 images) {
  tb.element = size_of(type);
  const u32 vector = 16 / tb.element;
  int64_t elements = 0;
  for (int l = 0; l < tb.levels; ++l) elements += static_cast<int64_t>(tb.level[l].size) * images;
  tb.iterations = iterations_of(elements, tb.element);
  tb.tiles = tb.groups = 0;
  for (int l = 0; l < tb.levels; ++l) {
    DenseLevel& level = tb.level[l];
    const bool aligned = reinterpret_cast<uintptr_t>(level.x) % 16 == 0 && level.image_stride % vector == 0;
    level.plane = FastDiv::make(level.locations);
    level.group0 = tb.groups;
    level.tile0 = tb.tiles;
    level.groups = divide_up(static_cast<int64_t>(level.size) + (aligned ? 0 : vector - 1), kGroupVectors * vector);
    level.tiles = divide_up(level.groups, tb.iterations);
    level.per_image = FastDiv::make(level.tiles);
    tb.groups += level.groups * images;
    tb.tiles += level.tiles * images;
  }
  tb.positive_groups = 1;
  while (tb.positive_groups < kMostPositiveGroups && tb.positive_groups * kPositiveTiles < tb.groups) {
    tb.positive_groups *= 2;
  }
  tb.positive_tiles = divide_up(tb.groups, tb.positive_groups);
}

void launch_focal_finish(const OnDevice& device, const FillTable& tb, const LossSum& losses, bool deltas) {
  const u32 blocks = 1 + (deltas ? divide_up(tb.dense.words, kFinishThreads) : 0);
  device.launch<kFinishThreads>(focal_finish_kernel, blocks, tb, losses);
}

StripMemory::StripMemory(Workspace& workspace, DenseTable& tb) {
  ignored = workspace.take<u32>(tb.words);
  clear_words = 1 + 2 * tb.groups;
  clear = workspace.take<u32>(clear_words);
  tb.ignored = ignored;
  tb.ignored_strips = clear + 1;
  tb.positive_strips = tb.ignored_strips + tb.groups;
}

void launch_coefficients_and_strips(const OnDevice& device, const CoefficientsTable& tb, const DenseTable& dense,
                                    bool found, const ZerosTable& zeros) {
  const u32 words = found ? dense.words : 0, marks = std::min(divide_up(words, kCoefficientThreads), kMostMarkBlocks);
  device.launch<kCoefficientThreads>(coefficients_and_strips_kernel, 1 + marks + zeros.tiles, tb, dense, words, marks,
                                     zeros);
}

}  // namespace ioubal::cuda

STABLE_TORCH_LIBRARY_IMPL(ioubal, CompositeExplicitAutograd, m) {
  m.impl(IOUBAL_CUDA_OP("cuda_plan"), TORCH_BOX(&ioubal::cuda::cuda_plan));
}
