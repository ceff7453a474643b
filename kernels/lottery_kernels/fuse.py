"""Neighbours in an `nn.Sequential` that run as one operator.

`sparsify` makes every plain `nn.Sequential` a `FusedSequential`. Modules, keys and results stay; only where nobody
could see what passes between two modules (no hooks, eager mode) does one operator compute several of them. A fusion is
a function registered for the class of the first module that it replaces.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from . import operators
from .layers import SparseConv2d, SparseLinear
from .replay import is_recording
from .surgery import change_classes

# (modules, i, x) -> (what modules[i:j] make of x, j); None where they had better run one by one.
Fusion = Callable[[Sequence[nn.Module], int, Tensor], tuple[Tensor, int] | None]

_fusions: dict[type[nn.Module], Fusion] = {}


def fuses(first: type[nn.Module]) -> Callable[[Fusion], Fusion]:
    """Registers a fusion of sequences that begin with a module of exactly this class."""

    def register(fusion: Fusion) -> Fusion:
        _fusions[first] = fusion
        return fusion

    return register


class FusedSequential(nn.Sequential):
    """`nn.Sequential` that runs neighbours as one operator where it can."""

    def forward(self, input: Tensor) -> Tensor:
        """What `nn.Sequential` returns."""
        if not _unobserved(input):
            return super().forward(input)
        x, modules, i = input, [*self._modules.values()], 0
        while i < len(modules):
            module = modules[i]
            assert module is not None
            fusion = _fusions.get(type(module))
            fused = fusion(modules, i, x) if fusion is not None and is_bare(module) else None
            x, i = (module(x), i + 1) if fused is None else fused
        return x


def to_fused(model: nn.Module) -> nn.Module:
    """Makes every `nn.Sequential` in a model a `FusedSequential`, in place; subclasses of a user's own stay."""
    return change_classes(model, {nn.Sequential: FusedSequential})


def to_unfused(model: nn.Module) -> nn.Module:
    """Undoes `to_fused`, in place."""
    return change_classes(model, {FusedSequential: nn.Sequential})


def is_bare(module: nn.Module) -> bool:
    """Whether calling a module is running its class's `forward` and nothing else."""
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def is_bare_relu(modules: Sequence[nn.Module], i: int) -> bool:
    """Whether modules[i] is there, and a ReLU that nobody looks at."""
    return i < len(modules) and type(modules[i]) is nn.ReLU and is_bare(modules[i])


def _unobserved(x: Tensor) -> bool:
    """Whether plain eager mode is on for a dense tensor on a CPU, whose kernels alone fuse: no compiler or tracer looks
    on, no global hook, no mode that changes types."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.is_cpu
        and x.layout is torch.strided
        and not torch.compiler.is_compiling()
        and not torch_module._has_any_global_hook()
        and not operators.transformed()
        and (_no_mode() or is_recording())
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_tracing_state() is None
    )


def _no_mode() -> bool:
    return not torch._C._len_torch_dispatch_stack() and not torch._C._is_torch_function_mode_enabled()


@functools.cache
def _operator(name: str) -> Callable[..., Tensor] | None:
    served = operators._backend_serves(name, "cpu")
    return getattr(torch.ops.lottery_kernels, name).default if served else None


@fuses(SparseLinear)
def _mlp(modules: Sequence[nn.Module], i: int, x: Tensor) -> tuple[Tensor, int] | None:
    """`SparseLinear` layers one behind another, with or without ReLU between and behind them, on a CPU."""
    operator, dtype = _operator("mlp"), x.dtype
    if operator is None or x.dim() != 2 or dtype not in (torch.float32, torch.float64):
        return None
    begin, features = i, x.shape[1]
    parameters: list[Tensor] = []
    index: list[Tensor] = []
    layers: list[int] = []
    while i < len(modules):
        layer = modules[i]
        if type(layer) is not SparseLinear or not is_bare(layer):
            break
        own = layer._parameters  # a module's own lookup of them is slow; replicas of DataParallel have none
        values, bias, arrays = own.get("values"), own.get("bias"), layer.pattern.index
        if values is None or layer.in_features != features or values.dtype != dtype or not values.is_cpu:
            break
        with_relu, out = is_bare_relu(modules, i + 1), layer.out_features
        parameters += (values,) if bias is None else (values, bias)
        index += arrays
        layers += (out, features, bias is not None, with_relu, len(arrays))
        features = out
        i += 1 + with_relu
    return (operator(x, parameters, index, layers), i) if i - begin > 1 else None


@fuses(SparseConv2d)
def _conv2d_relu(modules: Sequence[nn.Module], i: int, x: Tensor) -> tuple[Tensor, int] | None:
    """A `SparseConv2d` with a ReLU behind it, on a CPU: no image between them is written or read."""
    operator, layer = _operator("conv2d_relu"), modules[i]
    assert isinstance(layer, SparseConv2d)
    if operator is None or x.dim() != 4 or not is_bare_relu(modules, i + 1):
        return None
    values = layer.values
    if x.shape[1] != layer.in_channels or layer._pad_first or values.dtype != x.dtype or not values.is_cpu:
        return None
    shape, index = layer.pattern.weight_shape, layer.pattern.index
    geometry = (layer.stride, layer._padding, layer.dilation, layer.groups)
    return operator(x, values, layer.bias, index, shape, *geometry), i + 2
