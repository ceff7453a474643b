"""`SparseLinear` and `SparseConv2d`: drop-in for `nn.Linear` and `nn.Conv2d`, holding live weights only."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import config as compiler_config

from . import masked, operators, reference, replay
from .pattern import Pattern

# To torch.compile a parameter's shape is static, unless its source is named here; `set_mask` changes that of `values`.
_dynamic = compiler_config.dynamic_sources
compiler_config.dynamic_sources = ",".join(filter(None, [_dynamic, r".*_parameters\['values'\]"]))


class SparseLayer(nn.Module):
    """What the sparse layers share: packed `values`, the `pattern` that says where they belong, and the bridge to the
    dense weight in state dicts."""

    values: nn.Parameter
    bias: nn.Parameter | None
    pattern: Pattern

    def __init__(
        self,
        weight_shape: Sequence[int],
        bias: bool,
        groups: int,
        mask: Tensor | Pattern | None,
        block: tuple[int, int],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if mask is None:
            mask = torch.ones(*weight_shape, dtype=torch.bool, device="cpu")
        if not isinstance(mask, Pattern):
            _check_mask(mask, weight_shape)
            mask = Pattern.from_mask(mask, block, groups)
        pattern = mask
        values = torch.empty(pattern.nnz, *pattern.block, device=device, dtype=dtype)
        self.values = nn.Parameter(values)
        self.pattern = pattern
        self._settle()
        if bias:
            self.bias = nn.Parameter(torch.empty(weight_shape[0], device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def _settle(self) -> None:
        """Has the pattern follow `values` to their device, whose backend is loaded before the first step: that step
        then rounds as all later ones do."""
        self.pattern = self.pattern.to(self.values.device)
        operators.load_backend(self.values.device.type)

    @property
    def mask(self) -> Tensor:
        """bool, in the dense weight's shape: True where a weight remains."""
        return self.pattern.mask

    @property
    def density(self) -> float:
        """Share of the weights that remain."""
        return self.pattern.density

    @property
    def block(self) -> tuple[int, int]:
        return self.pattern.block

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew from `values`: differentiable, for reading. Writing into it changes nothing."""
        return self.pattern.unpack(self.values)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws weight and bias as the dense layer does: the same seed gives the same survivors."""
        if self.values.is_meta:
            return
        weight = self.values.new_empty(self.pattern.weight_shape)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.values.copy_(self.pattern.pack(weight))
        if self.bias is not None:
            fan_in = math.prod(self.pattern.weight_shape[1:])
            bound = 1 / math.sqrt(fan_in) if fan_in > 0 else 0
            nn.init.uniform_(self.bias, -bound, bound)

    @torch.inference_mode(False)  # or the layer could not be trained any more
    @torch.no_grad()
    def set_mask(self, mask: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Replaces the mask. Survivors keep their values, newly live weights start at zero.

        `values` stays the same `Parameter` and loses its gradient. With an `optimizer`, every state tensor in the
        shape of `values` is carried along in the same way (new positions zero); others, as `step`, stay.

        Not between a forward and its backward (autograd will say that `values` was modified), nor inside
        DistributedDataParallel, whose buckets are laid out for the old size.

        Args:
            mask: bool, in the shape of the dense weight.
            optimizer: one that holds `values`.

        Raises:
            TypeError, ValueError: `mask` is none for this layer, or `optimizer` does not hold `values`.
            RuntimeError: the layer is inside DistributedDataParallel.
        """
        _check_mask(mask, self.pattern.weight_shape)
        if optimizer is not None and not _holds(optimizer, self.values):
            raise ValueError("optimizer does not hold this layer's values: give the one that trains them, or None")
        refuse_inside_ddp(self.values)
        old, new = self.pattern, Pattern.from_mask(mask, self.block, self.pattern.groups).to(self.values.device)
        shape = self.values.shape
        state = optimizer.state.get(self.values, {}) if optimizer is not None else {}
        carried = {key: new.pack(old.unpack(value)) for key, value in state.items() if _has_shape(value, shape)}
        self._replace(new, new.pack(old.unpack(self.values)))
        state.update(carried)

    def _replace(self, pattern: Pattern, values: Tensor) -> None:
        replay.forget()
        self.pattern = pattern
        self.values.grad = None
        # The leaf's gradient accumulator remembers the old size for as long as any old graph lives, and is dropped
        # only when the dtype changes: so it changes for a moment.
        other = torch.float64 if values.dtype != torch.float64 else torch.float32
        self.values.data = values.new_empty(0, dtype=other)
        self.values.data = values
        # A graph that saved the old values must not run on: `.data =` alone would go unnoticed.
        torch.autograd.graph.increment_version(self.values)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._settle()  # a pickled pattern comes back on the CPU

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._settle()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()
        destination[prefix + "weight_mask"] = self.mask
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes `weight` with or without `weight_mask`, or the `weight_orig` and `weight_mask` of
        `torch.nn.utils.prune`. Without a mask the weight is projected on the mask in force."""
        arguments = (state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        for hook in self._load_state_dict_pre_hooks.values():
            hook(*arguments)
        own = {key[len(prefix) :]: state_dict[key] for key in state_dict if key.startswith(prefix)}
        weight = own.get("weight_orig", own.get("weight"))
        assign = local_metadata.get("assign_to_params_buffers", False)
        if weight is None:
            missing_keys.extend([prefix + "weight"] if strict else [])
        else:
            try:
                self._load_weight(weight, own.get("weight_mask"), assign)
            except (TypeError, ValueError) as error:
                error_msgs.append(f"while loading {prefix}weight: {error}")
        if self.bias is not None and "bias" in own:
            if own["bias"].shape != self.bias.shape:
                given = tuple(own["bias"].shape)
                error_msgs.append(f"while loading {prefix}bias: shape {given} given, {tuple(self.bias.shape)} needed")
            elif assign:
                self.bias = nn.Parameter(own["bias"], self.bias.requires_grad)
            else:
                with torch.no_grad():
                    self.bias.copy_(own["bias"])
        elif strict and self.bias is not None:
            missing_keys.append(prefix + "bias")
        if strict:
            known = {"weight", "weight_mask", "weight_orig"} | ({"bias"} if self.bias is not None else set())
            unexpected_keys.extend(prefix + key for key in own if key not in known)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _load_weight(self, weight: Tensor, mask: Tensor | None, assign: bool) -> None:
        if not (isinstance(weight, Tensor) and isinstance(mask, Tensor | None)):
            raise TypeError(f"tensors needed, got {type(weight).__name__} and for the mask {type(mask).__name__}")
        if tuple(weight.shape) != self.pattern.weight_shape:
            raise ValueError(f"shape {tuple(weight.shape)} given, {self.pattern.weight_shape} needed")
        pattern = self.pattern
        if mask is not None:
            mask = mask if mask.dtype == torch.bool else mask != 0  # prune keeps its masks as floats
            _check_mask(mask, pattern.weight_shape)
            if not torch.equal(mask.cpu(), (pattern.on_cpu or pattern).mask):
                pattern = Pattern.from_mask(mask, self.block, pattern.groups)
        values = pattern.pack(weight)
        if assign:
            replay.forget()
            self.values = nn.Parameter(values, self.values.requires_grad)
            self.pattern = pattern.to(values.device)
        elif pattern is self.pattern:
            self.values.grad = None
            self.values.copy_(values)
        else:
            refuse_inside_ddp(self.values)
            self._replace(pattern.to(self.values.device), values.to(self.values.device, self.values.dtype))

    @torch.no_grad()
    def _adopt(self, dense: nn.Linear | nn.Conv2d) -> Self:
        """Makes a layer that was built on the meta device, where nothing is drawn, a copy of a dense one."""
        leaf = masked.leaf(dense)
        self.values = nn.Parameter(self.pattern.to(leaf.device).pack(masked.in_force(dense)), leaf.requires_grad)
        self._settle()
        if dense.bias is not None:
            self.bias = nn.Parameter(dense.bias.clone(), dense.bias.requires_grad)
        return self.train(dense.training)

    def _fill(self, dense: Any) -> Any:
        """The inverse of `_adopt`: weight and bias of a freshly made dense layer become copies of this layer's."""
        dense.weight = nn.Parameter(self.weight.detach(), self.values.requires_grad)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return dense.train(self.training)

    def _sparsity_repr(self) -> str:
        return f"bias={self.bias is not None}, density={self.density:.4g}, block={self.block}"


class SparseLinear(SparseLayer):
    """`nn.Linear` that stores and computes only what a mask leaves of its weight.

    Input `[..., in_features]`, output `[..., out_features]`. On a CPU the output is a batch-innermost strided view,
    which the next sparse layer takes without a transpose; one of at most 16 features, as losses take, is row-major.

    Args:
        in_features, out_features, bias, device, dtype: as for `nn.Linear`.
        mask: bool `[out_features, in_features]`, True where a weight remains, or its pattern; None keeps all.
        block: (rows, cols) of the blocks in which live weights are stored; a finer mask is carried exactly.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Tensor | Pattern | None = None,
        block: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__((out_features, in_features), bias, 1, mask, block, device, dtype)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, mask: Tensor | Pattern | None = None, block: tuple[int, int] = (1, 1)
    ) -> Self:
        """A sparse copy of `linear`; pruned weights are forgotten. Without `mask` it takes what `torch.nn.utils.prune`
        left, if anything. Draws no random numbers."""
        _check_kind("linear", linear, nn.Linear)
        mask = masked.prune_mask(linear) if mask is None else mask
        sizes = (linear.in_features, linear.out_features)
        return cls(*sizes, linear.bias is not None, "meta", mask=mask, block=block)._adopt(linear)

    def to_dense(self) -> nn.Linear:
        """A dense copy, pruned weights zero."""
        bias = self.bias is not None
        return self._fill(nn.Linear(self.in_features, self.out_features, bias, "meta", self.values.dtype))

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features] -> [..., out_features]`."""
        shape, pattern = input.shape, self.pattern
        if not shape or shape[-1] != self.in_features:
            raise ValueError(f"input has shape {tuple(shape)}, the layer takes [..., in_features={self.in_features}]")
        linear = reference.linear if operators.transformed() else operators.linear
        # A module's own lookup is slow, but parametrized layers and replicas of DataParallel need it.
        own: dict[str, Any] = self._parameters
        held = "values" in own and "bias" in own
        values, bias = (own["values"], own["bias"]) if held else (self.values, self.bias)
        if len(shape) == 2:
            return linear(input, values, bias, pattern.index, pattern.weight_shape)
        flat = input.reshape(math.prod(shape[:-1]), self.in_features)
        y = linear(flat, values, bias, pattern.index, pattern.weight_shape)
        return y.reshape(*shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._sparsity_repr()}"


class SparseConv2d(SparseLayer):
    """`nn.Conv2d` that stores and computes only what a mask leaves of its weight.

    Input `[N, in_channels, H, W]` or `[in_channels, H, W]`, output as `nn.Conv2d`'s.

    Args:
        in_channels … padding_mode, device, dtype: as for `nn.Conv2d`.
        mask: bool `[out_channels, in_channels/groups, kh, kw]`, True where a weight remains, or its
            pattern; None keeps all.
        block: (rows, cols): output by input channels at one tap, within one group.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Tensor | Pattern | None = None,
        block: tuple[int, int] = (1, 1),
    ) -> None:
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        options: dict[str, Any] = geometry | {"padding_mode": padding_mode, "device": "meta"}
        # checks the arguments, and gives them one form
        dense = nn.Conv2d(in_channels, out_channels, kernel_size, **options)
        super().__init__(dense.weight.shape, bias, groups, mask, block, device, dtype)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, dense.kernel_size
        self.stride, self.dilation, self.groups = dense.stride, dense.dilation, groups
        self.padding, self.padding_mode = dense.padding, padding_mode
        left_right = dense._reversed_padding_repeated_twice  # [left, right, top, bottom]
        symmetric = left_right[0] == left_right[1] and left_right[2] == left_right[3]
        self._pad_first = left_right if padding_mode != "zeros" or not symmetric else None
        self._padding = (0, 0) if self._pad_first else (left_right[2], left_right[0])

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, mask: Tensor | Pattern | None = None, block: tuple[int, int] = (1, 1)) -> Self:
        """A sparse copy of `conv`, as `SparseLinear.from_dense`."""
        _check_kind("conv", conv, nn.Conv2d)
        mask = masked.prune_mask(conv) if mask is None else mask
        return cls(**_conv_arguments(conv), device="meta", mask=mask, block=block)._adopt(conv)

    def to_dense(self) -> nn.Conv2d:
        """A dense copy, pruned weights zero."""
        return self._fill(nn.Conv2d(**_conv_arguments(self), device="meta", dtype=self.values.dtype))

    def forward(self, input: Tensor) -> Tensor:
        """`[N, in_channels, H, W] -> [N, out_channels, OH, OW]`, N optional."""
        x = input
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            expected = f"[N, {self.in_channels}, H, W] or [{self.in_channels}, H, W]"
            raise ValueError(f"input has shape {tuple(x.shape)}, the layer takes {expected}")
        batch = x if x.dim() == 4 else x.unsqueeze(0)
        if self._pad_first:
            batch = F.pad(batch, self._pad_first, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        shape, index = self.pattern.weight_shape, self.pattern.index
        geometry = (self.stride, self._padding, self.dilation, self.groups)
        conv2d = reference.conv2d if operators.transformed() else operators.conv2d
        y = conv2d(batch, self.values, self.bias, index, shape, *geometry)
        return y if x.dim() == 4 else y.squeeze(0)

    def extra_repr(self) -> str:
        parts = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        parts += f", padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
        return f"{parts}, padding_mode={self.padding_mode}, {self._sparsity_repr()}"


def _conv_arguments(conv: nn.Conv2d | SparseConv2d) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(conv, name) for name in names} | {"bias": conv.bias is not None}


def _check_kind(argument: str, layer: object, kind: type[nn.Module]) -> None:
    if not isinstance(layer, kind):
        raise TypeError(f"{argument} must be a torch.nn.{kind.__name__}, got {type(layer).__name__}")


def _has_shape(value: object, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.shape == shape


def _holds(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> bool:
    return any(held is parameter for group in optimizer.param_groups for held in group["params"])


def _check_mask(mask: Tensor, weight_shape: Sequence[int]) -> None:
    if isinstance(mask, Tensor) and tuple(mask.shape) != tuple(weight_shape):
        raise ValueError(f"mask has shape {tuple(mask.shape)}, the weight's is {tuple(weight_shape)}")


def refuse_inside_ddp(*parameters: nn.Parameter) -> None:
    """Raises RuntimeError if a DistributedDataParallel anywhere in the process holds one of `parameters`."""
    if not (parameters and torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    ddp = nn.parallel.DistributedDataParallel
    for owner in [found for found in gc.get_objects() if issubclass(type(found), ddp)]:  # proxies would be looked into
        if {id(parameter) for parameter in owner.parameters()} & {id(parameter) for parameter in parameters}:
            raise RuntimeError(
                "a mask cannot be changed inside DistributedDataParallel, whose buckets are laid out for the old "
                "number of weights: change it on the bare module and wrap that anew"
            )
