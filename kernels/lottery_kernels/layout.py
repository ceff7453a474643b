"""Activations that stay batch-innermost through a whole model on a CPU.

The CPU kernels return images `[N, C, H, W]` that lie in memory as `[C, H, W, N]`, and take such without a transpose.
Elementwise operations, dropout, additions and flatten keep that layout. torch's BatchNorm and pooling do not, they
convert; but they run natively on a permuted view: BatchNorm on `[1, C, H·W, N]`, contiguous, pooling on `[C, N, H, W]`,
which is then channels_last. The classes here do that, or call kernels of this package. Inputs in any other layout go
the usual way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from . import operators
from .fuse import fuses, is_bare_relu
from .surgery import change_classes


def is_batch_innermost(x: Tensor) -> bool:
    """Whether an image `[N, C, H, W]` lies in memory as `[C, H, W, N]`, and in no usual layout besides."""
    return x.dim() == 4 and x.device.type == "cpu" and x.shape[0] > 1 and x.permute(1, 2, 3, 0).is_contiguous()


def _kernel_serves(name: str, x: Tensor) -> bool:
    """Whether the compiled kernel `name` takes such an image here and now."""
    return (
        x.dtype in (torch.float32, torch.float64)
        and not operators.transformed()
        and operators._backend_serves(name, "cpu")
    )


class BatchInnermostBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that keeps batch-innermost images so; in training by kernels of this package's own."""

    def forward(self, input: Tensor) -> Tensor:
        """`[N, C, H, W] -> [N, C, H, W]`."""
        if not is_batch_innermost(input):
            return super().forward(input)
        if self._has_kernel(input):
            return self._normalize(input)
        n, c, h, w = input.shape
        y = super().forward(input.permute(1, 2, 3, 0).view(1, c, h * w, n))
        return y.view(c, h, w, n).permute(3, 0, 1, 2)

    def _has_kernel(self, input: Tensor) -> bool:
        n, c, h, w = input.shape
        if not (self.training or self.running_mean is None) or n * h * w < 2 or c != self.num_features:
            return False
        same = self.weight is None or self.weight.dtype == input.dtype
        return same and _kernel_serves("batch_norm", input)

    def _normalize(self, input: Tensor, relu: bool = False) -> Tensor:
        y, mean, var = torch.ops.lottery_kernels.batch_norm(input, self.weight, self.bias, self.eps, relu)
        if self.training and self.running_mean is not None and self.running_var is not None:
            factor = self.momentum
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
                factor = 1 / float(self.num_batches_tracked) if factor is None else factor
            count = input.numel() // input.shape[1]
            with torch.no_grad():
                self.running_mean.lerp_(mean, factor or 0.0)
                self.running_var.lerp_(var * (count / (count - 1)), factor or 0.0)
        return y


@fuses(BatchInnermostBatchNorm2d)
def _batch_norm_relu(modules: Sequence[nn.Module], i: int, x: Tensor) -> tuple[Tensor, int] | None:
    """BatchNorm in training with a ReLU behind it: no image between them is written, kept or read."""
    norm = modules[i]
    assert isinstance(norm, BatchInnermostBatchNorm2d)
    if not is_bare_relu(modules, i + 1) or not is_batch_innermost(x) or not norm._has_kernel(x):
        return None
    return norm._normalize(x, relu=True), i + 2


class _BatchInnermostPool(nn.Module):
    """Mixed into a pooling class: exchanges batch and channels, which pooling treats alike."""

    def forward(self, input: Tensor) -> Any:
        """`[N, C, H, W] -> [N, C, OH, OW]`, or a pair of such with `return_indices`."""
        if not is_batch_innermost(input):
            return super().forward(input)
        result = super().forward(input.transpose(0, 1))
        return tuple(part.transpose(0, 1) for part in result) if isinstance(result, tuple) else result.transpose(0, 1)


class BatchInnermostMaxPool2d(_BatchInnermostPool, nn.MaxPool2d):
    """`nn.MaxPool2d` that keeps batch-innermost images so; where windows do not overlap, by a kernel of this package's
    own, which keeps no indices."""

    def forward(self, input: Tensor) -> Any:
        """`[N, C, H, W] -> [N, C, OH, OW]`, or a pair of such with `return_indices`."""
        kernel, stride = _pair(self.kernel_size), _pair(self.stride)
        if is_batch_innermost(input) and self._has_kernel(input, kernel, stride):
            return torch.ops.lottery_kernels.max_pool2d(input, kernel, stride)
        return super().forward(input)

    def _has_kernel(self, input: Tensor, kernel: tuple[int, int], stride: tuple[int, int]) -> bool:
        plain = _pair(self.padding) == (0, 0) and _pair(self.dilation) == (1, 1)
        if not plain or self.ceil_mode or self.return_indices:
            return False
        if any(not 0 < k <= min(s, size) for k, s, size in zip(kernel, stride, input.shape[2:], strict=True)):
            return False
        return _kernel_serves("max_pool2d", input)


class BatchInnermostAvgPool2d(_BatchInnermostPool, nn.AvgPool2d):
    """`nn.AvgPool2d` that keeps batch-innermost images so."""


class BatchInnermostAdaptiveAvgPool2d(_BatchInnermostPool, nn.AdaptiveAvgPool2d):
    """`nn.AdaptiveAvgPool2d` that keeps batch-innermost images so."""


class BatchInnermostAdaptiveMaxPool2d(_BatchInnermostPool, nn.AdaptiveMaxPool2d):
    """`nn.AdaptiveMaxPool2d` that keeps batch-innermost images so."""


_BATCH_INNERMOST: dict[type, type] = {
    nn.BatchNorm2d: BatchInnermostBatchNorm2d,
    nn.MaxPool2d: BatchInnermostMaxPool2d,
    nn.AvgPool2d: BatchInnermostAvgPool2d,
    nn.AdaptiveAvgPool2d: BatchInnermostAdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d: BatchInnermostAdaptiveMaxPool2d,
}
_USUAL = {batch_innermost: usual for usual, batch_innermost in _BATCH_INNERMOST.items()}


def to_batch_innermost(model: nn.Module) -> nn.Module:
    """Makes BatchNorm and pooling of a model keep batch-innermost images so, in place.

    Modules only change their class, to a subclass: parameters, buffers, keys, hooks and mode are untouched. Subclasses
    of a user's own are left alone.
    """
    return change_classes(model, _BATCH_INNERMOST)


def to_usual_layout(model: nn.Module) -> nn.Module:
    """Undoes `to_batch_innermost`, in place."""
    return change_classes(model, _USUAL)
