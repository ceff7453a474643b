"""The spec: every operator in a few lines of dense torch. Kernels are tested against these, and where no kernel runs,
these do. Shapes are those of `operators.py`; W is the dense weight that `values` unpack to."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from .pattern import pack, unpack


def linear(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Sequence[Tensor], weight_shape: Sequence[int]
) -> Tensor:
    """y = x Wᵀ + bias: `[N, in] -> [N, out]`."""
    return F.linear(x, unpack(values, index, weight_shape), bias)


def linear_dgrad(dy: Tensor, values: Tensor, index: Sequence[Tensor], weight_shape: Sequence[int]) -> Tensor:
    """dx = dy W: `[N, out] -> [N, in]`."""
    return dy @ unpack(values, index, weight_shape)


def linear_wgrad(
    dy: Tensor, x: Tensor, index: Sequence[Tensor], weight_shape: Sequence[int], block: Sequence[int]
) -> Tensor:
    """dW = dyᵀ x at the live positions: `[nnz, r, c]`."""
    return pack(dy.T @ x, index, (block[0], block[1]))


def conv2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Sequence[Tensor],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """y = x ∗ W + bias: `[N, in, H, W] -> [N, out, OH, OW]`."""
    return F.conv2d(x, unpack(values, index, weight_shape, groups), bias, stride, padding, dilation, groups)


def conv2d_dgrad(
    dy: Tensor,
    values: Tensor,
    index: Sequence[Tensor],
    weight_shape: Sequence[int],
    x_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradient of `conv2d` in x: `[N, out, OH, OW] -> [N, in, H, W]`."""
    weight = unpack(values, index, weight_shape, groups)
    return conv2d_input(list(x_shape), weight, dy, stride, padding, dilation, groups)


def conv2d_wgrad(
    dy: Tensor,
    x: Tensor,
    index: Sequence[Tensor],
    weight_shape: Sequence[int],
    block: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradient of `conv2d` in W at the live positions: `[nnz, r, c]`."""
    dense = conv2d_weight(x, list(weight_shape), dy, stride, padding, dilation, groups)
    return pack(dense, index, (block[0], block[1]), groups)
