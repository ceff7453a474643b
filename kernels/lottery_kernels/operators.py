"""The operators `torch.ops.lottery_kernels.*`: schemas, shape rules, and the gradients and kernels that serve where no
compiled backend does.

The three of a kind (forward, dgrad, wgrad) are each other's derivatives, so gradients of any order work. Backends
register into this namespace: the C++ extension brings the CPU kernels and autograd, Triton the CUDA kernels. They are
loaded when a sparse layer is made on their device, or at the latest when an operator meets a tensor of it; where a
backend cannot be had, the kernels of `reference.py` run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference

_CONV = "int[] stride, int[] padding, int[] dilation, int groups"
SCHEMAS = {
    "linear": "(Tensor x, Tensor values, Tensor? bias, Tensor[] index, int[] weight_shape) -> Tensor",
    "linear_dgrad": "(Tensor dy, Tensor values, Tensor[] index, int[] weight_shape) -> Tensor",
    "linear_wgrad": "(Tensor dy, Tensor x, Tensor[] index, int[] weight_shape, int[] block) -> Tensor",
    "conv2d": f"(Tensor x, Tensor values, Tensor? bias, Tensor[] index, int[] weight_shape, {_CONV}) -> Tensor",
    "conv2d_dgrad": f"(Tensor dy, Tensor values, Tensor[] index, int[] weight_shape, int[] x_shape, {_CONV}) -> Tensor",
    "conv2d_wgrad": f"(Tensor dy, Tensor x, Tensor[] index, int[] weight_shape, int[] block, {_CONV}) -> Tensor",
}

_library = torch.library.Library("lottery_kernels", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))

ops = torch.ops.lottery_kernels
linear = ops.linear.default
linear_dgrad = ops.linear_dgrad.default
linear_wgrad = ops.linear_wgrad.default
conv2d = ops.conv2d.default
conv2d_dgrad = ops.conv2d_dgrad.default
conv2d_wgrad = ops.conv2d_wgrad.default


# Shape rules. On a CPU activations are batch-innermost: a strided view of the usual shape.


def empty_activation(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised activation of `shape`, in the layout that operators return on `like`'s device.

    CPU: batch innermost. CUDA and others: row-major, images channels_last.
    """
    if like.device.type == "cpu":
        batch, *rest = shape
        strides, step = [1], batch
        for size in reversed(rest):
            strides.insert(1, step)
            step *= size
        return like.new_empty_strided(shape, strides)
    if len(shape) == 4:
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
    return like.new_empty(shape)


def conv2d_output_shape(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """`[N, out, OH, OW]` of a convolution."""
    sizes = [
        (x_shape[2 + i] + 2 * padding[i] - dilation[i] * (weight_shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    return [x_shape[0], weight_shape[0], *sizes]


NARROW = 16  # outputs of at most so many features are row-major on a CPU: most of them go into a loss


def _linear_fake(x, values, bias, index, weight_shape):
    shape = (x.shape[0], weight_shape[0])
    return x.new_empty(shape) if weight_shape[0] <= NARROW else empty_activation(x, shape)


def _linear_dgrad_fake(dy, values, index, weight_shape):
    return empty_activation(dy, (dy.shape[0], weight_shape[1]))


def _linear_wgrad_fake(dy, x, index, weight_shape, block):
    return x.new_empty((index[1].shape[0], *block))


def _conv2d_fake(x, values, bias, index, weight_shape, stride, padding, dilation, groups):
    return empty_activation(x, conv2d_output_shape(x.shape, weight_shape, stride, padding, dilation))


def _conv2d_dgrad_fake(dy, values, index, weight_shape, x_shape, stride, padding, dilation, groups):
    return empty_activation(dy, x_shape)


def _conv2d_wgrad_fake(dy, x, index, weight_shape, block, stride, padding, dilation, groups):
    return x.new_empty((index[1].shape[0], *block))


# Gradients. Arguments behind the tensors (`rest`: weight_shape, strides …) pass through unchanged.


def _linear_backward(ctx, dy):
    x, values, *index = ctx.saved_tensors
    shape, block = ctx.rest[0], values.shape[1:]
    dx = linear_dgrad(dy, values, index, shape) if ctx.needs_input_grad[0] else None
    dvalues = linear_wgrad(dy, x, index, shape, block) if ctx.needs_input_grad[1] else None
    dbias = dy.sum(0) if ctx.needs_input_grad[2] else None
    return dx, dvalues, dbias, [None] * len(index), None


def _linear_dgrad_backward(ctx, ddx):
    dy, values, *index = ctx.saved_tensors
    shape, block = ctx.rest[0], values.shape[1:]
    ddy = linear(ddx, values, None, index, shape) if ctx.needs_input_grad[0] else None
    dvalues = linear_wgrad(dy, ddx, index, shape, block) if ctx.needs_input_grad[1] else None
    return ddy, dvalues, [None] * len(index), None


def _linear_wgrad_backward(ctx, dvalues):
    dy, x, *index = ctx.saved_tensors
    shape = ctx.rest[0]
    ddy = linear(x, dvalues, None, index, shape) if ctx.needs_input_grad[0] else None
    dx = linear_dgrad(dy, dvalues, index, shape) if ctx.needs_input_grad[1] else None
    return ddy, dx, [None] * len(index), None, None


def _conv2d_backward(ctx, dy):
    x, values, *index = ctx.saved_tensors
    shape, *geometry = ctx.rest
    dx = conv2d_dgrad(dy, values, index, shape, x.shape, *geometry) if ctx.needs_input_grad[0] else None
    dvalues = conv2d_wgrad(dy, x, index, shape, values.shape[1:], *geometry) if ctx.needs_input_grad[1] else None
    dbias = dy.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
    return dx, dvalues, dbias, [None] * len(index), *[None] * 5


def _conv2d_dgrad_backward(ctx, ddx):
    dy, values, *index = ctx.saved_tensors
    shape, _, *geometry = ctx.rest
    ddy = conv2d(ddx, values, None, index, shape, *geometry) if ctx.needs_input_grad[0] else None
    dvalues = conv2d_wgrad(dy, ddx, index, shape, values.shape[1:], *geometry) if ctx.needs_input_grad[1] else None
    return ddy, dvalues, [None] * len(index), *[None] * 6


def _conv2d_wgrad_backward(ctx, dvalues):
    dy, x, *index = ctx.saved_tensors
    shape, _, *geometry = ctx.rest
    ddy = conv2d(x, dvalues, None, index, shape, *geometry) if ctx.needs_input_grad[0] else None
    dx = conv2d_dgrad(dy, dvalues, index, shape, x.shape, *geometry) if ctx.needs_input_grad[1] else None
    return ddy, dx, [None] * len(index), *[None] * 6


def _setup_forward(ctx, inputs, output):
    x, values, _, index, *ctx.rest = inputs
    ctx.save_for_backward(x, values, *index)


def _setup_gradient(ctx, inputs, output):
    one, other, index, *ctx.rest = inputs
    ctx.save_for_backward(one, other, *index)


# Kernels: load the device's backend and hand the call to it, or compute the reference.


@functools.cache
def load_backend(device: str) -> bool:
    """Loads the backend for a type of device ("cpu", "cuda"), once; whether there is one and it can be had."""
    if device == "cpu":
        from .cpu import build

        return build.load()
    if device == "cuda":
        from . import gpu

        return gpu.load()
    return False


@functools.cache
def _backend_serves(name: str, device: str) -> bool:
    """Loads the backend for `device` if it can be had; whether it brought a kernel for operator `name`."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device, "")
    return load_backend(device) and torch._C._dispatch_has_kernel_for_dispatch_key(f"lottery_kernels::{name}", key)


def transformed() -> bool:
    """Whether `torch.func` (`grad`, `vmap`, `jvp` …) or forward-mode differentiation transforms what is being computed:
    they can transform the reference, but neither compiled kernels nor their autograd."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def by_reference(name: str) -> Callable[..., Tensor]:
    """Operator `name` computed by `reference.py`, on any device, in the promised strides."""
    compute, fake = getattr(reference, name), globals()[f"_{name}_fake"]
    return lambda *args: fake(*args).copy_(compute(*args))


def _kernel(name: str) -> Callable[..., Tensor]:
    compute = by_reference(name)
    op = getattr(ops, name).default

    def kernel(*args: Any) -> Tensor:
        check_tensors(op, args)
        return op(*args) if _backend_serves(name, args[0].device.type) else compute(*args)

    return kernel


def check_tensors(op: torch._ops.OpOverload, args: Sequence[Any]) -> None:
    """Raises ValueError unless all tensors are dense and on one device: of several devices, the dispatcher might choose
    the one whose backend is not loaded, and come back here for ever, as it would with a layout that has no kernel."""
    tensors = {}
    for argument, value in zip(op._schema.arguments, args, strict=False):
        held = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(held, Tensor):
            tensors[argument.name] = held
    first, one = next(iter(tensors.items()))
    for name, other in tensors.items():
        if other.layout is not torch.strided:
            raise ValueError(f"{op._schema.name}: {name} is {other.layout}; it takes dense tensors: {name}.to_dense()")
        if other.device != one.device:
            devices = f"{first} is on {one.device}, {name} on {other.device}"
            raise ValueError(f"{op._schema.name}: {devices}; they belong on one device")


# Autocast: the CPU kernels know no half precision, CUDA's take the autocast dtype.


def _autocast(op: torch._ops.OpOverload, device: str) -> Callable[..., Tensor]:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def kernel(*args: Any) -> Tensor:
        dtype = torch.float32 if device == "cpu" else torch.get_autocast_dtype(device)

        def cast(value: Any) -> Any:
            eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
            return value.to(dtype) if eligible else value

        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*map(cast, args))

    return kernel


for _name, _setup in {
    "linear": _setup_forward,
    "linear_dgrad": _setup_gradient,
    "linear_wgrad": _setup_gradient,
    "conv2d": _setup_forward,
    "conv2d_dgrad": _setup_gradient,
    "conv2d_wgrad": _setup_gradient,
}.items():
    _op, _fake = getattr(ops, _name).default, globals()[f"_{_name}_fake"]
    _library.impl(_name, _kernel(_name), "CompositeExplicitAutograd")
    _library.impl(_name, _autocast(_op, "cpu"), "AutocastCPU")
    _library.impl(_name, _autocast(_op, "cuda"), "AutocastCUDA")
    torch.library.register_fake(f"lottery_kernels::{_name}", _fake, lib=_library)
    torch.library.register_autograd(
        f"lottery_kernels::{_name}", globals()[f"_{_name}_backward"], setup_context=_setup, lib=_library
    )
