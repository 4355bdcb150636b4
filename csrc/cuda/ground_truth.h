// Boxes and labels of the images, from tensors to what kernels take by value.
#pragma once

#include "cuda/launch.h"

namespace ioubal::cuda {

// gt_labels may be empty: then no image has labels, and the kernels must not ask for them.
inline GroundTruth ground_truth(const TensorList& gt_boxes, const TensorList& gt_labels) {
  STD_TORCH_CHECK(gt_boxes.size() <= kMaxImages, "ioubal_kernels: at most ", kMaxImages,
                  " images with boxes as a list");
  GroundTruth out{};
  out.padded = gt_boxes.size() == 1 && gt_boxes[0].dim() == 3;
  for (size_t i = 0; i < gt_boxes.size(); ++i) {
    out.boxes[i] = gt_boxes[i].const_data_ptr();
    if (!gt_labels.empty()) out.labels[i] = gt_labels[i].const_data_ptr();
    out.counts[i] = gt_boxes[i].size(out.padded ? 1 : 0);
  }
  if (gt_boxes.empty()) return out;
  out.box_type = dtype_of(gt_boxes[0]);
  out.wide_labels = !gt_labels.empty() && gt_labels[0].scalar_type() == ScalarType::Long;
  for (size_t i = 0; i < gt_boxes.size(); ++i) {
    STD_TORCH_CHECK(dtype_of(gt_boxes[i]) == out.box_type &&
                        (gt_labels.empty() || gt_labels[i].scalar_type() == gt_labels[0].scalar_type()),
                    "ioubal_kernels: the images' boxes, and their labels, must have one dtype");
  }
  return out;
}

}  // namespace ioubal::cuda
