#include "cuda/focal_fill.h"

namespace ioubal::cuda {
namespace {

uintptr_t address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

// The order of the sums follows from the sizes alone: no question to the device here.
// Long tiles amortise a block's start, short ones fill the device with a small batch.
u32 rows_iterations(int64_t elements) {
  return elements >= (1 << 27) ? kMostIterations : elements >= (1 << 26) ? 4 : elements >= (1 << 23) ? 2 : 1;
}
// At most 32, a bit each.
u32 planes_classes(int64_t elements) { return elements >= (1 << 26) ? 32 : 16; }

}  // namespace

DenseLayout plan_rows(DenseTable& tb, Dtype type, u32 images) {
  const u32 size = size_of(type), width = 16 / size, classes = tb.classes.divisor;
  bool aligned = classes % width == 0, together = true;
  int64_t elements = 0;
  for (int l = 0; l < tb.levels; ++l) {
    const DenseLevel& level = tb.level[l];
    const uintptr_t x = address(level.x), out = level.out ? address(level.out) : x;
    aligned = aligned && x % 16 == 0 && out % 16 == 0 && level.image_stride * size % 16 == 0;
    together = together && x % size == 0 && x % 16 == out % 16;
    elements += static_cast<int64_t>(level.rows) * classes * images;
  }
  const DenseLayout layout = aligned    ? DenseLayout::kRows
                             : together ? DenseLayout::kSpanningRows
                                        : DenseLayout::kSingleRows;
  tb.iterations = rows_iterations(elements);
  const int64_t per_tile =
      static_cast<int64_t>(kThreads) * 4 * tb.iterations * (layout == DenseLayout::kSingleRows ? 1 : width);
  tb.tiles = 0;
  for (int l = 0; l < tb.levels; ++l) {
    DenseLevel& level = tb.level[l];
    level.tile0 = tb.tiles;
    level.tiles = divide_up(count32(static_cast<int64_t>(level.rows) * classes, "an image's logits"), per_tile);
    tb.tiles += level.tiles * images;
  }
  return layout;
}

DenseLayout plan_planes(DenseTable& tb, Dtype type, u32 images) {
  const u32 size = size_of(type), classes = tb.classes.divisor;
  int64_t elements = 0;
  for (int l = 0; l < tb.levels; ++l) {
    elements += static_cast<int64_t>(images) * tb.level[l].anchors * tb.level[l].locations * classes;
  }
  const u32 chunks = divide_up(classes, planes_classes(elements));
  tb.class_chunk = (divide_up(classes, chunks) + 3) / 4 * 4;
  tb.chunks = FastDiv::make(divide_up(classes, tb.class_chunk));
  tb.tiles = 0;
  for (int l = 0; l < tb.levels; ++l) {
    DenseLevel& level = tb.level[l];
    u32 vector = 16 / size;
    const auto fits = [&](u32 v) {
      return level.locations % v == 0 && address(level.x) % (v * size) == 0 &&
             (!level.out || address(level.out) % (v * size) == 0);
    };
    while (vector > 1 && !fits(vector)) vector /= 2;
    level.vector = vector;
    level.per_plane = FastDiv::make(level.locations / vector);
    level.columns = count32(static_cast<int64_t>(images) * level.anchors * (level.locations / vector), "a level");
    level.tile0 = tb.tiles;
    level.tiles = divide_up(level.columns, kThreads) * tb.chunks.divisor;
    tb.tiles += level.tiles;
  }
  return DenseLayout::kPlanes;
}

}  // namespace ioubal::cuda
