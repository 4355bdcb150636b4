#include "cuda/focal_fill.h"

#include <atomic>
#include <limits>

namespace ioubal::cuda {
namespace {

uintptr_t address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

// What tests and bench/gpu/tune.py choose instead of the rules below; a negative number: by the rule.
struct Chosen {
  std::atomic<int64_t> table{-1}, iterations{-1}, apart{-1}, blocks{-1};
};
Chosen chosen;

void cuda_plan(int64_t table, int64_t iterations, int64_t apart, int64_t blocks) {
  STD_TORCH_CHECK(iterations != 0 && iterations <= kMostIterations && apart != 0 && apart <= 4096 && blocks != 0,
                  "ioubal_kernels: cuda_plan: no such plan");
  chosen.table = table;
  chosen.iterations = iterations;
  chosen.apart = apart;
  chosen.blocks = blocks;
}

u32 choose(const std::atomic<int64_t>& number, u32 by_rule) {
  const int64_t value = number;
  return value < 0 ? by_rule : static_cast<u32>(value);
}

// From how many 16-bit logits on their losses and gradients are looked up: never, as it has not been measured yet.
constexpr int64_t kTableFrom = std::numeric_limits<int64_t>::max();

bool take_table(const OnDevice& device, const DenseTable& tb, const FillVariant& v, int64_t logits) {
  const int64_t from = chosen.table;
  if (logits < (from < 0 ? kTableFrom : from) || v.output != kGradient || v.may_skip || !v.same_scale ||
      tb.row_weight.data) {
    return false;
  }
  if (v.type == Dtype::kBFloat16) return device.most_shared() >= kTableShared<BFloat16> + kTableStatic;
  return v.type == Dtype::kFloat16 && device.most_shared() >= kTableShared<Float16> + kTableStatic;
}

// The order of the sums follows from the sizes alone: no question to the device here.
// Long tiles amortise a block's start, short ones fill the device with a small batch.
u32 rows_iterations(int64_t elements) {
  return elements >= (1 << 27) ? kMostIterations : elements >= (1 << 26) ? 4 : elements >= (1 << 23) ? 2 : 1;
}
// A table's tiles are shorter by far: a warp's, not a block's.
u32 table_iterations(int64_t elements) {
  return elements >= (1 << 27) ? 8 : elements >= (1 << 26) ? 4 : elements >= (1 << 25) ? 2 : 1;
}
// At most 32, a bit each.
u32 planes_classes(int64_t elements) { return elements >= (1 << 26) ? 32 : 16; }

}  // namespace

void plan_rows(const OnDevice& device, DenseTable& tb, FillVariant& v, u32 images) {
  const u32 size = size_of(v.type), width = 16 / size, classes = tb.classes.divisor;
  bool aligned = classes % width == 0, together = true;
  int64_t elements = 0;
  for (int l = 0; l < tb.levels; ++l) {
    const DenseLevel& level = tb.level[l];
    const uintptr_t x = address(level.x), out = level.out ? address(level.out) : x;
    aligned = aligned && x % 16 == 0 && out % 16 == 0 && level.image_stride * size % 16 == 0;
    together = together && x % size == 0 && x % 16 == out % 16;
    elements += static_cast<int64_t>(level.rows) * classes * images;
  }
  v.layout = aligned ? DenseLayout::kRows : together ? DenseLayout::kSpanningRows : DenseLayout::kSingleRows;
  v.table = v.layout != DenseLayout::kSingleRows && take_table(device, tb, v, elements);
  tb.iterations = choose(chosen.iterations, v.table ? table_iterations(elements) : rows_iterations(elements));
  tb.apart = FastDiv::make(choose(chosen.apart, 1));
  v.blocks = choose(chosen.blocks, 0);
  const u32 group =
      (v.table ? kWarp : kThreads) * kVectorsInFlight * (v.layout == DenseLayout::kSingleRows ? 1 : width);
  tb.tiles = 0;
  for (int l = 0; l < tb.levels; ++l) {
    DenseLevel& level = tb.level[l];
    level.tile0 = tb.tiles;
    const u32 groups = divide_up(count32(static_cast<int64_t>(level.rows) * classes, "an image's logits"), group);
    const u32 apart = tb.apart.divisor, whole = groups / (tb.iterations * apart) * apart;
    level.tiles = whole + std::min(groups - whole * tb.iterations, apart);
    tb.tiles += level.tiles * images;
  }
}

void plan_planes(const OnDevice& device, DenseTable& tb, FillVariant& v, u32 images) {
  const u32 size = size_of(v.type), classes = tb.classes.divisor;
  int64_t elements = 0;
  for (int l = 0; l < tb.levels; ++l) {
    elements += static_cast<int64_t>(images) * tb.level[l].anchors * tb.level[l].locations * classes;
  }
  v.layout = DenseLayout::kPlanes;
  v.table = take_table(device, tb, v, elements);
  v.blocks = choose(chosen.blocks, 0);
  const u32 chunks = divide_up(classes, 4 * choose(chosen.iterations, planes_classes(elements) / 4));
  tb.class_chunk = (divide_up(classes, chunks) + 3) / 4 * 4;
  tb.chunks = FastDiv::make(divide_up(classes, tb.class_chunk));
  tb.tiles = 0;
  for (int l = 0; l < tb.levels; ++l) {
    DenseLevel& level = tb.level[l];
    u32 vector = 16 / size;
    const auto fits = [&](u32 width) {
      return level.locations % width == 0 && address(level.x) % (width * size) == 0 &&
             (!level.out || address(level.out) % (width * size) == 0);
    };
    while (vector > 1 && !fits(vector)) vector /= 2;
    level.vector = vector;
    level.per_plane = FastDiv::make(level.locations / vector);
    level.columns = count32(static_cast<int64_t>(images) * level.anchors * (level.locations / vector), "a level");
    level.tile0 = tb.tiles;
    level.tiles = divide_up(level.columns, v.table ? kWarp : kThreads) * tb.chunks.divisor;
    tb.tiles += level.tiles;
  }
}

}  // namespace ioubal::cuda

STABLE_TORCH_LIBRARY_IMPL(ioubal, CompositeExplicitAutograd, m) {
  m.impl(IOUBAL_CUDA_OP("cuda_plan"), TORCH_BOX(&ioubal::cuda::cuda_plan));
}
