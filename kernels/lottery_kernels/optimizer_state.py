"""The optimizer's side of a conversion: parameters re-pointed, their state packed and unpacked, dense checkpoints."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import masked
from .layers import SparseLayer

Convert = Callable[[Tensor], Tensor]


def zero_pruned_by(mask: Tensor | None) -> Convert:
    """State of a dense masked weight, zero where pruned, as a sparse layer has it."""
    return torch.clone if mask is None else lambda dense: masked.zero_pruned(dense, mask)


@dataclass(frozen=True, eq=False)
class Move:
    """A parameter that takes another's place, or keeps its own, and what becomes of state in the old one's shape."""

    name: str
    old: nn.Parameter
    new: nn.Parameter
    convert: Convert


def prepare_moves(optimizer: Optimizer | None, moves: Sequence[Move]) -> Callable[[], None]:
    """Checks and computes everything; returns what carries it out and cannot fail.

    The new parameters get the old ones' places in the param groups. State in the old one's shape is converted, scalars
    such as `step` are kept.

    Raises:
        TypeError: `optimizer` is none.
        ValueError: it holds none of the parameters, or state that is neither a scalar nor in their shape.
    """
    if optimizer is None:
        return lambda: None
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    places = {held: (group["params"], i) for group in optimizer.param_groups for i, held in enumerate(group["params"])}
    if moves and not any(move.old in places for move in moves):
        raise ValueError("optimizer holds none of the weights to be converted: give the one that trains this model")
    moves = [move for move in moves if move.old in places]
    states = [_converted(optimizer.state.get(move.old, {}), move.name, move.old.shape, move.convert) for move in moves]

    def carry_out() -> None:
        for move, state in zip(moves, states, strict=True):
            params, i = places[move.old]
            params[i] = move.new
            if optimizer.state.pop(move.old, None) is not None:
                optimizer.state[move.new] = state

    return carry_out


def dense_optimizer_state_dict(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """A copy of the optimizer's state as that of the dense model. It does not depend on kernels and blocks of the
    layers, so that a model with others can load it.

    `{"state": {name: {key: value}}, "param_groups": [{option: value, "params": [name]}]}`, names and shapes as in the
    state dict of the dense model. Pruned positions are zero.

    Raises:
        ValueError: the optimizer holds a parameter that is not the model's, or state that is neither a scalar nor in
            its parameter's shape.
    """
    views = _dense_views(model)
    state, groups = {}, []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in views:
                shape = tuple(parameter.shape)
                raise ValueError(f"optimizer holds a parameter of shape {shape} that is none of the model's")
            if parameter in optimizer.state:
                view = views[parameter]
                state[view.name] = _converted(optimizer.state[parameter], view.name, parameter.shape, view.unpack)
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        groups.append({**copy.deepcopy(options), "params": [views[held].name for held in group["params"]]})
    return {"state": state, "param_groups": groups}


def load_dense_optimizer_state_dict(model: nn.Module, optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Loads a copy of what `dense_optimizer_state_dict` made, whatever kernels and blocks the model had then.

    Load the model first: the state is projected on the masks in force.

    Raises:
        ValueError: `state_dict` has other param groups than the optimizer, or state of a wrong shape. The optimizer is
            unchanged.
    """
    views = _dense_views(model)
    saved = state_dict["param_groups"]
    if len(saved) != len(optimizer.param_groups):
        raise ValueError(f"state_dict has {len(saved)} param groups, the optimizer {len(optimizer.param_groups)}")
    state, groups, numbers = {}, [], itertools.count()
    for group, options in zip(optimizer.param_groups, saved, strict=True):
        own = [views[parameter].name if parameter in views else None for parameter in group["params"]]
        if set(own) != set(options["params"]):
            raise ValueError(
                f"state_dict has a param group of {options['params']} where the optimizer has one of {own}"
            )
        number = {parameter: next(numbers) for parameter in group["params"]}
        for parameter, i in number.items():
            view = views[parameter]
            if view.name in state_dict["state"]:
                state[i] = _converted(state_dict["state"][view.name], view.name, view.shape, view.pack)
        groups.append({**options, "params": list(number.values())})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


@dataclass(frozen=True, eq=False)
class _DenseView:
    """A parameter as the dense model has it. `pack` and `unpack` are None where both are the same."""

    name: str
    shape: torch.Size
    pack: Convert | None = None
    unpack: Convert | None = None


def _dense_views(model: nn.Module) -> dict[nn.Parameter, _DenseView]:
    views: dict[nn.Parameter, _DenseView] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None or parameter in views:
                continue
            plain = key.removesuffix("_orig")
            if isinstance(module, SparseLayer) and key == "values":
                pattern, name = module.pattern, f"{prefix}.weight".lstrip(".")
                view = _DenseView(name, torch.Size(pattern.weight_shape), pattern.pack, pattern.unpack)
            elif key != plain and masked.prune_hooks(module, plain):
                pruned = zero_pruned_by(masked.prune_mask(module, plain))
                view = _DenseView(f"{prefix}.{plain}".lstrip("."), parameter.shape, pruned, pruned)
            else:
                view = _DenseView(f"{prefix}.{key}".lstrip("."), parameter.shape)
            views[parameter] = view
    return views


def _is_scalar(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def _converted(state: Mapping[str, Any], name: str, shape: torch.Size, convert: Convert | None) -> dict[str, Any]:
    """A copy of a parameter's state: what is in the parameter's shape converted."""
    if convert is None:
        return {key: copy.deepcopy(value) for key, value in state.items()}
    result = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == shape:
            result[key] = convert(value.detach())
        elif value is None or isinstance(value, int | float | str) or _is_scalar(value):
            result[key] = copy.deepcopy(value)
        else:
            given = f"has shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"is a {type(value).__name__}"
            raise ValueError(
                f"the optimizer's state {key!r} of {name!r} {given}; only scalars and tensors of the weight's shape, "
                f"{tuple(shape)}, can be converted: elementwise optimizers have no others"
            )
    return result
