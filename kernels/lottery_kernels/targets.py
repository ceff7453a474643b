"""Which layers of a model a conversion is about, and whether it may touch them."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from . import masked
from .layers import SparseConv2d, SparseLayer, SparseLinear, refuse_inside_ddp
from .pattern import Pattern

KINDS = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True, eq=False)
class Target:
    """A dense layer that is to be masked."""

    name: str  # the first of its names in the model
    layer: nn.Linear | nn.Conv2d
    mask: Tensor  # bool, in the weight's shape

    @property
    def groups(self) -> int:
        return self.layer.groups if isinstance(self.layer, nn.Conv2d) else 1

    @property
    def leaf(self) -> nn.Parameter:
        """The weight that trains."""
        return masked.leaf(self.layer)

    def sparse_copy(self, pattern: Pattern) -> SparseLinear | SparseConv2d:
        if isinstance(self.layer, nn.Conv2d):
            return SparseConv2d.from_dense(self.layer, pattern)
        return SparseLinear.from_dense(self.layer, pattern)


def find_targets(model: nn.Module, masks: Mapping[str, Tensor] | None) -> list[Target]:
    """The layers that `masks` names, in the model's order; with None those that `torch.nn.utils.prune` masked.

    Raises:
        TypeError, ValueError: something cannot be converted; the message names it. Nothing has been changed.
        RuntimeError: the model is inside DistributedDataParallel.
    """
    check_bare(model)
    masks = _pruned_layers(model) if masks is None else masks
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks must map module names to bool masks, got {type(masks).__name__}")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in masks:
        if name not in modules:
            known = [name for name, module in modules.items() if type(module) in KINDS]
            raise ValueError(f"masks names {name!r}, which is no module of the model; its layers are {known}")
    owners = _owners(model)
    found: dict[nn.Module, Target] = {}
    for name, module in modules.items():
        if name not in masks:
            continue
        if module in found:  # shared, under another name
            _check_mask(name, module, masks[name])
            if not torch.equal(found[module].mask.cpu(), masks[name].cpu()):
                raise ValueError(
                    f"masks gives {found[module].name!r} and {name!r} different masks, but they are one layer"
                )
            continue
        _check_layer(name, module, owners)
        _check_mask(name, module, masks[name])
        found[module] = Target(name, module, masks[name])
    targets = list(found.values())
    refuse_inside_ddp(*(target.leaf for target in targets))
    return targets


def check_bare(model: nn.Module) -> None:
    """Raises TypeError if `model` is no module, or one that is wrapped for distributed training or holds such a one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    wrappers: tuple[type, ...] = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: nothing can be wrapped in it
    wrappers += tuple(getattr(fsdp, name) for name in ("FullyShardedDataParallel", "FSDPModule") if hasattr(fsdp, name))
    for name, module in model.named_modules():
        if isinstance(module, wrappers):
            where = f"{name!r}" if name else "model"
            raise TypeError(f"{where} is wrapped in {type(module).__name__}: convert the bare model, then wrap it")


def _pruned_layers(model: nn.Module) -> dict[str, Tensor]:
    masks: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        mask = masked.prune_mask(module) if type(module) in KINDS else None
        if mask is not None:
            masks[name] = mask
    if not masks:
        raise ValueError("masks is None, and no nn.Linear or nn.Conv2d of the model is pruned by torch.nn.utils.prune")
    return masks


def _owners(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Every parameter with the names it has in distinct modules."""
    owners = defaultdict(list)
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners[parameter].append(f"{name}.{key}".lstrip("."))
    return owners


def _check_layer(name: str, module: nn.Module, owners: Mapping[nn.Parameter, list[str]]) -> None:
    """Raises TypeError or ValueError if the module is not a plain layer that a sparse one can stand for."""
    kind = type(module).__name__
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm | SpectralNorm)]
    if parametrize.is_parametrized(module):
        raise TypeError(f"{name!r} is parametrized: torch.nn.utils.parametrize.remove_parametrizations comes first")
    if isinstance(module, SparseLayer):
        raise TypeError(f"{name!r} is sparse already: change its mask with set_mask, or densify the model first")
    if hooks:
        norm = type(hooks[0]).__name__
        raise TypeError(f"{name!r} has its weight made by {norm} before every forward: remove that first")
    if type(module) not in KINDS:
        inherits = " (a subclass may compute something else)" if isinstance(module, KINDS) else ""
        raise TypeError(f"{name!r} is a {kind}{inherits}: only nn.Linear and nn.Conv2d themselves can be converted")
    own = {"weight", "bias", "weight_orig", "weight_mask"} if masked.prune_hooks(module) else {"weight", "bias"}
    extra = {*module._parameters, *module._buffers, *module._modules} - own
    extra |= vars(module).keys() & {"forward", "_compiled_call_impl"}
    if extra:
        raise TypeError(f"{name!r} holds {sorted(extra)} besides weight and bias, which a sparse layer cannot carry")
    leaf = masked.leaf(module)
    if type(leaf) is not nn.Parameter or not leaf.is_floating_point():
        raise TypeError(
            f"the weight of {name!r} is a {type(leaf).__name__} of {leaf.dtype}: it must be a plain "
            "Parameter of a floating dtype"
        )
    if len(owners[leaf]) > 1:
        raise ValueError(
            f"the weight of {name!r} is tied, {' and '.join(owners[leaf])} are one Parameter: it cannot "
            "be packed for one of them alone"
        )
    if leaf._backward_hooks or leaf._post_accumulate_grad_hooks:
        raise ValueError(f"the weight of {name!r} has gradient hooks, which expect the dense shape: remove them first")


def _check_mask(name: str, layer: nn.Module, mask: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"the mask of {name!r} must be a bool tensor, True where a weight remains, got {given}")
    weight = masked.leaf(layer)
    if mask.shape != weight.shape:
        raise ValueError(f"the mask of {name!r} has shape {tuple(mask.shape)}, its weight {tuple(weight.shape)}")
    if mask.is_meta:
        raise ValueError(f"the mask of {name!r} is on the meta device and has no data")
    pruned = masked.prune_mask(layer)
    if pruned is None:
        return
    if not torch.equal(layer.get_buffer("weight_mask"), pruned.to(weight.dtype)):
        raise ValueError(
            f"the weight_mask of {name!r} holds other values than 0 and 1: no sparse layer can stand for it"
        )
    if not torch.equal(pruned.cpu(), mask.cpu()):
        raise ValueError(
            f"{name!r} is pruned by torch.nn.utils.prune with another mask than the one given: densify "
            "the model first, or give masks=None"
        )
