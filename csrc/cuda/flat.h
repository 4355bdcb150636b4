// What the launchers of the flat losses share: arguments, and the coefficients of rows without images.
#pragma once

#include "cuda/launch.h"

namespace ioubal::cuda {

inline ScopeOf flat_scope(const OptionalTensor& ids, int64_t count) { return {int_ref(ids), count, 0, 0}; }

// One segment per scope, over all tiles of the positives' kernel.
struct FlatCoefficients {
  CoefficientsTable table{};
  CoefficientMemory memory;

  FlatCoefficients(Workspace& workspace, double* partial, u32 tiles, int64_t scopes, const Tensor& sums,
                   bool compute_sums)
      : memory(workspace, 1, scopes) {
    table.images = 1;
    table.by_slot = true;
    table.all_tiles = tiles;
    table.scopes = scopes;
    table.partial = partial;
    table.segment_sums = workspace.take<double>(scopes * kPartials);
    table.sums = data_of<double>(sums);
    table.compute_sums = compute_sums;
    table.focal = {0, -1, 0};
    table.cls_weight = table.w_loc = table.world_size = 1;
    table.cls_divisor = table.loc_divisor = number_ref(1.0);
    memory.fill(table);
  }
  // The divisor of a loss: a tensor, a number > 0, or the default.
  void divide_by(const OptionalTensor& avg_factor, double divisor, double world_size) {
    table.cls_divisor = table.loc_divisor = number_ref(avg_factor, divisor);
    table.world_size = world_size;
  }
  void launch(const OnDevice& device) const { launch_coefficients(device, table); }
};

}  // namespace ioubal::cuda
