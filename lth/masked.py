"""A model that trains under masks: dense masked by PyTorch's own pruning, or sparse; decided once, stored, replayed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import lottery_kernels
from lth.prune import Block, Layer, prunable

DENSE = "dense masked"


def mask_densely(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Masks layers as `torch.nn.utils.prune` does: weight = weight_orig × weight_mask in every forward. This is the baseline."""
    for name, mask in masks.items():
        module = prunable(model)[name]
        torch_prune.custom_from_mask(module, "weight", mask.to(module.weight))
    return model


def mask_fastest(
    model: nn.Module, masks: Mapping[str, Tensor], layers: Sequence[Layer], kernels: str, example: Any
) -> dict[str, Any]:
    """Masks a plain model as `kernels` asks: dense, sparse, or auto, which measures. Returns the choice, as in kernels.json."""
    if kernels == "dense":
        mask_densely(model, masks)
        return {"layers": dict.fromkeys(masks, DENSE), "reason": "asked for"}
    for block, group in _by_block(layers).items():
        chosen = {name: masks[name] for name in group}
        if kernels == "sparse":
            lottery_kernels.sparsify(model, chosen, block=block, when="always")
        else:
            lottery_kernels.sparsify(model, chosen, block=block, when="faster", example=example)
    choice = {layer.name: _how(model.get_submodule(layer.name)) for layer in layers}
    mask_densely(
        model, {name: masks[name] for name, how in choice.items() if how == DENSE and not _masked(model, name)}
    )
    return {"layers": choice, "reason": "asked for" if kernels == "sparse" else "measured"}


def mask_as_chosen(model: nn.Module, masks: Mapping[str, Tensor], choice: Mapping[str, str]) -> nn.Module:
    """Masks a plain model by the "layers" of an earlier choice. Layers without a mask stay as they are."""
    for name, mask in masks.items():
        if choice[name] == DENSE:
            mask_densely(model, {name: mask})
        else:
            lottery_kernels.sparsify(model, {name: mask}, block=parse_block(choice[name].split()[-1]), when="always")
    return model


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of a masked model, under a plain model's names, dense; pruned positions are 0."""
    sparse = any(_how(module) != DENSE for module in model.modules())
    state = lottery_kernels.dense_state_dict(model) if sparse else model.state_dict()
    weights = {}
    for key, value in state.items():
        if key.endswith("weight_orig"):
            weights[key.removesuffix("_orig")] = value * state[key.removesuffix("_orig") + "_mask"]
        elif not (key.endswith("weight_mask") and key.removesuffix("_mask") + "_orig" in state):
            weights[key] = value
    return {key: value.detach().cpu().clone() for key, value in weights.items()}


def parse_block(text: str) -> Block:
    """(rows, cols) of "16x16"."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise ValueError(f"block: {text!r}; it takes rows x columns, such as 1x1 or 16x16, or auto")
    return int(match[1]), int(match[2])


def _by_block(layers: Sequence[Layer]) -> dict[Block, list[str]]:
    groups: dict[Block, list[str]] = {}
    for layer in layers:
        groups.setdefault(layer.block, []).append(layer.name)
    return groups


def _how(module: nn.Module) -> str:
    if isinstance(module, lottery_kernels.SparseLinear | lottery_kernels.SparseConv2d):
        return "sparse {}x{}".format(*module.block)
    return DENSE


def _masked(model: nn.Module, name: str) -> bool:
    return torch_prune.is_pruned(model.get_submodule(name))
