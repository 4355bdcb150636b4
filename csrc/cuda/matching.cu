// Matching of anchors and cells with gt boxes on CUDA: integers, decided in float32.
#include "cuda/fovea.cuh"
#include "cuda/ground_truth.h"

namespace ioubal::cuda {
namespace {

IntOut int_out(const Tensor& t) { return {t.mutable_data_ptr(), t.scalar_type() == ScalarType::Long}; }

// The decisions are those of float32 arithmetic; of float64 inputs they would be other ones.
void refuse_float64(const char* op, const char* name, Dtype type) {
  STD_TORCH_CHECK(type != Dtype::kFloat64, op, ": ", name,
                  " must be float32, bfloat16 or float16 on CUDA, got float64;", " use backend='reference'");
}

int64_t most_boxes(const GroundTruth& truth, const TensorList& gt_boxes) {
  return gt_boxes.empty() ? 0 : *std::max_element(truth.counts, truth.counts + gt_boxes.size());
}

void match_anchors(Tensor anchors, TensorList gt_boxes, TensorList gt_labels, double high, double low,
                   bool allow_low_quality, bool force_best, Tensor matched_idxs, TensorList workspace) {
  const GroundTruth truth = ground_truth(gt_boxes, gt_labels);
  refuse_float64("match_anchors", "anchors", dtype_of(anchors));
  refuse_float64("match_anchors", "gt_boxes", truth.box_type);
  MatchTable tb{};
  tb.anchors = float_ref(anchors);
  tb.own = anchors.dim() == 3;
  tb.aligned = reinterpret_cast<uintptr_t>(tb.anchors.data) % (4 * size_of(tb.anchors.type)) == 0;
  tb.images = count32(matched_idxs.size(0), "the images");
  tb.rows = count32(matched_idxs.size(1), "the anchors of an image");
  if (tb.images == 0 || tb.rows == 0) return;
  tb.units = divide_up(tb.rows, kWarp);
  tb.images_per_warp = tb.own ? 1 : kImagesPerWarp;
  const int64_t groups = divide_up(tb.images, tb.images_per_warp);
  tb.places = count32(most_boxes(truth, gt_boxes), "the boxes of an image");
  const int64_t all_places = count32(static_cast<int64_t>(tb.images) * tb.places, "the boxes of a batch");
  Workspace memory(workspace);
  tb.boxes = memory.take<float4>(all_places);
  const bool second = (allow_low_quality || force_best) && all_places > 0;
  if (second) tb.keys = memory.take<Key>(all_places);
  if (second && allow_low_quality) tb.contends = memory.take<u32>(groups * tb.units);
  tb.high = static_cast<float>(high);
  tb.low = static_cast<float>(low);
  tb.force_best = force_best;
  tb.out = int_out(matched_idxs);
  const u32 blocks = divide_up(count32(groups * tb.units * kWarp, "the work of a batch"), kThreads);
  const OnDevice device(matched_idxs);
  device.launch(prepare_boxes_kernel, divide_up(all_places, kThreads), tb, truth);
  device.launch(match_anchors_kernel, blocks, tb);
  if (second) device.launch(restore_matches_kernel, blocks, tb);
}

void match_fovea(TensorList gt_boxes, TensorList gt_labels, std::vector<int64_t> heights, std::vector<int64_t> widths,
                 std::vector<int64_t> strides, std::vector<double> min_sizes, std::vector<double> max_sizes,
                 double sigma, Tensor matched_idxs) {
  const GroundTruth truth = ground_truth(gt_boxes, gt_labels);
  refuse_float64("match_fovea", "gt_boxes", truth.box_type);
  FoveaTable tb{};
  const int64_t images = matched_idxs.size(0);
  int64_t first_cell = 0, tiles = 0;
  for (size_t i = 0; i < heights.size(); ++i) {
    const int64_t cells = heights[i] * widths[i];
    if (cells == 0) continue;
    STD_TORCH_CHECK(tb.levels < kMaxLevels, "match_fovea: at most ", kMaxLevels, " levels, got ", heights.size());
    FoveaLevel& level = tb.level[tb.levels++];
    level.width = static_cast<u32>(widths[i]);
    level.height = static_cast<u32>(heights[i]);
    level.first_cell = static_cast<u32>(first_cell);
    level.tile0 = static_cast<u32>(tiles);
    level.tiles = divide_up(cells, kThreads);
    level.stride = static_cast<float>(strides[i]);
    level.smallest_squared = static_cast<float>(min_sizes[i] * min_sizes[i]);
    level.largest_squared = static_cast<float>(max_sizes[i] * max_sizes[i]);
    first_cell += cells;
    count32(first_cell, "the cells of an image");
    tiles = count32(tiles + level.tiles * images, "the tiles of a batch");
  }
  tb.cells_per_image = first_cell;
  tb.places = count32(most_boxes(truth, gt_boxes), "the boxes of an image");
  tb.from = static_cast<float>(1 - sigma);
  tb.to = static_cast<float>(1 + sigma);
  tb.out = int_out(matched_idxs);
  const OnDevice device(matched_idxs);
  device.launch(match_fovea_kernel, static_cast<u32>(tiles), tb, truth);
}

}  // namespace
}  // namespace ioubal::cuda

STABLE_TORCH_LIBRARY_IMPL(ioubal, IOUBAL_CUDA_KEY, m) {
  m.impl(IOUBAL_CUDA_OP("match_anchors"), TORCH_BOX(&ioubal::cuda::match_anchors));
  m.impl(IOUBAL_CUDA_OP("match_fovea"), TORCH_BOX(&ioubal::cuda::match_fovea));
}
