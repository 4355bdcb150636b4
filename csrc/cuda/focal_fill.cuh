// The pass over all logits of a sigmoid focal loss and, for the detection loss, over the deltas.
#pragma once

#include "cuda/coefficients.cuh"
#include "cuda/focal_dense.cuh"
#include "math/iou.h"
#include "math/smooth_l1.h"

namespace ioubal::cuda {

// The deltas of a level and their gradient.
struct LocLevel {
  const void* deltas;
  void* out;
  DeltaPlace place, out_place;
  u32 locations, width, anchors, first_anchor;
  u32 tile0, tiles;     // tiles per image
  u32 word0, words;     // of `special`, as in Level
  bool special_planes;  // how they lie: as the logits do
  bool planes;          // neighbouring threads at neighbouring locations (NCHW), else at neighbouring anchors
  bool vector;          // a row of the gradient is one aligned access
};

constexpr u32 kLocRepeat = 4;  // anchors of a thread, rows

// What a tile of the deltas is. kPositives: words of `special`, the zeros are there already. kAll: anchors, zeros and
// positives.
enum class DeltaTiles : int { kPositives, kAll };

struct LocTable {
  LocLevel level[kMaxLevels];
  int levels;
  DeltaTiles kind;
  u32 tiles;  // 0: the gradient is not wanted, or not in this launch
  Dtype type;
  const float* weight;  // per anchor; see DetectionProblem
  NumberRef scale, expected;
  bool skip_expected;
  IOUBAL_DEVICE bool filled() const { return skip_expected && scale.get() == expected.get(); }
};

struct FillTable {
  AnchorRef anchors;
  LocNumbers loc;
  LocTable deltas;
  DenseTable dense;
  FastDiv turn;  // one tile of the deltas in so many tiles: writing zeros waits for memory, logits for arithmetic

  // Which of all tiles are the deltas'; for the others, which of the logits' it is.
  IOUBAL_DEVICE bool is_deltas(u32 tile, u32& number) const {
    const u32 round = turn.div(tile);
    const bool here = tile == round * turn.divisor && round < deltas.tiles;
    number = here ? round : tile - (round < deltas.tiles ? round + 1 : deltas.tiles);
    return here;
  }
};

IOUBAL_DEVICE void store_quad(const LocTable& tb, const LocLevel& level, int64_t at, const Quad<float>& value) {
  if (level.vector && tb.type == Dtype::kFloat32) {
    Vec<float, 4>::store(static_cast<float*>(level.out) + at, value.v);
  } else if (level.vector && tb.type == Dtype::kBFloat16) {
    Vec<BFloat16, 4>::store(static_cast<BFloat16*>(level.out) + at, value.v);
  } else if (level.vector && tb.type == Dtype::kFloat16) {
    Vec<Float16, 4>::store(static_cast<Float16*>(level.out) + at, value.v);
  } else {
    const FloatOut out = {level.out, tb.type};
    for (int j = 0; j < 4; ++j) out.set(at + j * level.out_place.coordinate, value.v[j]);
  }
}

// The gradient of a positive's deltas.
IOUBAL_DEVICE Quad<float> delta_gradient(const FillTable& tb, const LocLevel& level, int l, int64_t image, u32 location,
                                         u32 a, int64_t anchor, int64_t matched) {
  const LocTable& deltas = tb.deltas;
  const float weight = deltas.weight[anchor];
  Quad<float> out = {{0.f, 0.f, 0.f, 0.f}};
  if (weight == 0.f) return out;
  const Coefficients& c = tb.dense.coefficients;
  const int64_t scope = tb.dense.scope.get(tb.dense.level[l].scope_level, image, anchor);
  const float w = c.location[image] * c.loc_norm[scope] * weight * static_cast<float>(deltas.scale.get());
  const FloatRef all = {level.deltas, deltas.type};
  const Quad<double> pred = all.four(level.place.offset(image, location, level.width, a), level.place.coordinate);
  const Quad<double> target = encode_box(tb.dense.labels.truth.box<double>(image, matched),
                                         tb.anchors.get(image, anchor), tb.loc.weights, tb.loc.coder);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const double difference = pred.v[j] - target.v[j];
    out.v[j] = w * static_cast<float>(smooth_l1(difference, tb.loc.beta).grad);
  }
  return out;
}

// The gradient of the positives of words of `special`, `number` the lane's. By whole warps, which share out what there
// is: a positive is a long chain of dependent reads, and they cluster.
IOUBAL_DEVICE void positive_deltas(const FillTable& tb, u32 number) {
  const DenseTable& dense = tb.dense;
  const u32 lane = threadIdx.x % kWarp;
  const u32 own = number < dense.words ? dense.special[number] & ~dense.ignored[number] : 0;
  const u32 end = warp_scan(__popc(own)), count = __shfl_sync(~0u, end, kWarp - 1);
#pragma unroll 1
  for (u32 first = 0; first < count; first += kWarp) {
    const u32 item = first + lane;
    u32 owner = 0;  // how many lanes have none at or after it
#pragma unroll
    for (u32 step = kWarp / 2; step; step /= 2) {
      if (__shfl_sync(~0u, end, owner + step - 1) <= item) owner += step;
    }
    u32 left = __shfl_sync(~0u, own, owner);
    u32 before = item + __popc(left) - __shfl_sync(~0u, end, owner);
    if (item >= count) continue;
#pragma unroll 1
    for (; before; --before) left &= left - 1;
    const AnchorOfWord at(dense, number - lane + owner, __ffs(static_cast<int>(left)) - 1);
    if (dense.labels.get(at.image, at.anchor) < 0) continue;
    const LocLevel& level = tb.deltas.level[at.level];
    const u32 location = dense.level[at.level].planes ? at.position : at.position / level.anchors;
    const u32 a = dense.level[at.level].planes ? at.a : at.position - location * level.anchors;
    const Quad<float> value =
        delta_gradient(tb, level, at.level, at.image, location, a, at.anchor, dense.labels.values[at.anchor]);
    store_quad(tb.deltas, level, level.out_place.offset(at.image, location, level.width, a), value);
  }
}

// A tile of the deltas' gradient: zeros, but for the positives.
IOUBAL_DEVICE void deltas_tile(const FillTable& tb, u32 tile) {
  if (tb.deltas.kind == DeltaTiles::kPositives) return positive_deltas(tb, tile * kFillThreads + threadIdx.x);
  const LocTable& deltas = tb.deltas;
  int l = 0;
  while (l + 1 < deltas.levels && tile >= deltas.level[l + 1].tile0) ++l;
  const LocLevel& level = deltas.level[l];
  const u32 local = tile - level.tile0, image = local / level.tiles, chunk = local - image * level.tiles;
  const u32 repeat = level.planes ? level.anchors : kLocRepeat;
  const Labels& labels = tb.dense.labels;
#pragma unroll 1
  for (u32 k = 0; k < repeat; ++k) {
    u32 location, a;
    if (level.planes) {
      location = chunk * kFillThreads + threadIdx.x;
      a = k;
    } else {
      const u32 row = (chunk * kLocRepeat + k) * kFillThreads + threadIdx.x;
      location = row / level.anchors;
      a = row - location * level.anchors;
    }
    if (location >= level.locations) break;
    const u32 bit = level.special_planes ? (image * level.anchors + a) * level.words * kWarp + location
                                         : image * level.words * kWarp + location * level.anchors + a;
    Quad<float> value = {{0.f, 0.f, 0.f, 0.f}};
    if (tb.dense.special[level.word0 + bit / kWarp] >> bit % kWarp & 1) {
      const int64_t anchor =
          image * tb.dense.anchors_per_image + level.first_anchor + static_cast<int64_t>(location) * level.anchors + a;
      if (labels.get(image, anchor) >= 0) {
        value = delta_gradient(tb, level, l, image, location, a, anchor, labels.values[anchor]);
      }
    }
    store_quad(deltas, level, level.out_place.offset(image, location, level.width, a), value);
  }
}

// The dense pass over the logits and the deltas' gradient. The flat focal loss has no deltas.
template <class T, int kGamma, Output kOutput, Layout kLayout>
__global__ void __launch_bounds__(kFillThreads, kGamma == -1 ? 6 : 8)
    focal_fill_kernel(const IOUBAL_GRID_CONSTANT FillTable tb) {
  __shared__ float kept[kKept * kFillThreads], scratch[kFillWarps];
  if ((tb.deltas.tiles == 0 || tb.deltas.filled()) && tb.dense.filled()) return;  // a backward: there is no loss to add
  for (u32 tile = blockIdx.x; tile < tb.deltas.tiles + tb.dense.all_tiles(); tile += gridDim.x) {
    u32 dense;
    if (tb.is_deltas(tile, dense)) {
      if (!tb.deltas.filled()) deltas_tile(tb, dense);
      continue;
    }
    if (tb.dense.filled()) continue;
    const float loss = dense_tile<T, kGamma, kOutput, kLayout>(tb.dense, dense, kept);
    if (tb.dense.partial == nullptr) continue;
    __syncthreads();  // the scratch of the tile before
    const float total = block_sum<kFillThreads>(loss, scratch);
    if (threadIdx.x == 0) tb.dense.partial[dense] = total;
  }
}

}  // namespace ioubal::cuda
