// The arrays of a convolution's pattern and the sizes they speak of.
#pragma once

#include <ATen/ATen.h>

#include "alive.h"
#include "conv_geometry.h"
#include "conv_panel.h"
#include "sparse_matmul.h"

namespace lottery {

// Checked when made.
struct ConvWeight {
  int64_t groups, outputs, inputs, r, c;  // outputs and inputs of one group
  AxisGeometry down, across;
  Entries rows, columns;
  at::Tensor alive;  // undefined: every position

  ConvWeight(at::TensorList index, at::IntArrayRef shape, at::IntArrayRef block, at::IntArrayRef x_shape,
             at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups)
      : groups(groups), outputs(shape[0] / groups), inputs(shape[1]), r(block[0]), c(block[1]) {
    TORCH_CHECK(x_shape.size() == 4 && x_shape[1] == inputs * groups, "x must be [N, ", inputs * groups,
                ", H, W], got ", x_shape);
    const auto axis = [&](int64_t i) {
      const int64_t padded = x_shape[2 + i] + 2 * padding[i], reach = dilation[i] * (shape[2 + i] - 1) + 1;
      TORCH_CHECK(padded >= reach, "Calculated padded input size per channel: (", x_shape[2] + 2 * padding[0], " x ",
                  x_shape[3] + 2 * padding[1], "). Kernel size: (", dilation[0] * (shape[2] - 1) + 1, " x ",
                  dilation[1] * (shape[3] - 1) + 1, "). Kernel size can't be greater than actual input size");
      return AxisGeometry{x_shape[2 + i], (padded - reach) / stride[i] + 1, shape[2 + i], stride[i], padding[i],
                          dilation[i]};
    };
    down = axis(0), across = axis(1);
    TORCH_CHECK(index.size() == 5 || index.size() == 6, "index must hold 5 or 6 tensors, got ", index.size());
    for (size_t i = 0; i < 5; ++i)
      TORCH_CHECK(index[i].scalar_type() == at::kInt && index[i].is_contiguous() && index[i].is_cpu(),
                  "index[", i, "] must be a contiguous int32 tensor on the CPU");
    const int64_t nnz = index[1].numel();
    rows = {index[0].const_data_ptr<int32_t>(), index[1].const_data_ptr<int32_t>(), nullptr, groups * row_blocks()};
    columns = {index[2].const_data_ptr<int32_t>(), index[3].const_data_ptr<int32_t>(),
               index[4].const_data_ptr<int32_t>(), groups * column_blocks()};
    TORCH_CHECK(index[0].numel() == rows.lines + 1 && index[2].numel() == columns.lines + 1 &&
                    index[3].numel() == nnz && index[4].numel() == nnz,
                "index does not belong to a weight of shape ", shape, " with blocks of ", block);
    if (index.size() == 6) alive = index[5];
  }

  int64_t nnz() const { return rows.nnz(); }
  int64_t row_blocks() const { return (outputs + r - 1) / r; }
  int64_t column_blocks() const { return (inputs + c - 1) / c; }
  bool single() const { return r * c == 1; }
  BlockShape forward() const { return {r, c, c, 1}; }
  BlockShape transposed() const { return {c, r, 1, c}; }
  ChannelGroups out_channels() const { return {groups, outputs, row_blocks() * r}; }
  ChannelGroups in_channels() const { return {groups, inputs, column_blocks() * c}; }

  at::Tensor alive_only(const at::Tensor& values) const {
    TORCH_CHECK(values.dim() == 3 && values.size(0) == nnz(), "values must be [", nnz(), ", ", r, ", ", c,
                "], got ", values.sizes());
    return lottery::alive_only(alive, values);
  }
};

}  // namespace lottery
