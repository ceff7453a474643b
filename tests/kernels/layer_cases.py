"""Small sparse layers, and their comparison with dense masked ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lottery_kernels import SparseConv2d, SparseLinear

BLOCKS = [(1, 1), (4, 4), (3, 2)]


def dense_masked(layer: nn.Module) -> nn.Module:
    """The dense layer of the same weight, masked by `torch.nn.utils.prune`."""
    return prune.custom_from_mask(layer.to_dense(), "weight", layer.mask)


def sparse_linear(block=(1, 1), density=0.3, dtype=torch.float64, **options) -> SparseLinear:
    return SparseLinear(13, 11, mask=torch.rand(11, 13) < density, block=block, dtype=dtype, **options)


def sparse_conv(block=(1, 1), density=0.3, dtype=torch.float64, groups=2, **options) -> SparseConv2d:
    mask = torch.rand(6, 8 // groups, 3, 3) < density
    return SparseConv2d(8, 6, 3, mask=mask, block=block, dtype=dtype, groups=groups, **options)


LAYERS = [pytest.param(sparse_linear, (5, 13), id="linear"), pytest.param(sparse_conv, (2, 8, 6, 6), id="conv")]


def assert_same_training(sparse: nn.Module, dense: nn.Module, x: torch.Tensor) -> None:
    """Output, input gradient and parameter gradients equal those of the dense masked layer."""
    sparse.zero_grad()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(batch) for layer, batch in zip((sparse, dense), inputs, strict=True)]
    torch.testing.assert_close(*outputs)
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(sparse.values.grad, sparse.pattern.pack(dense.weight_orig.grad))
    if dense.bias is not None:
        torch.testing.assert_close(sparse.bias.grad, dense.bias.grad)
