"""A model that trains under masks: dense masked, as PyTorch's pruning does it, or sparse; decided, then replayed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import lottery_kernels
from lottery_kernels import gpu
from lth.prune import Block, Layer, weight_key

DENSE = "dense masked"
REASONS = {"sparse": "asked for", "dense": "asked for", "auto": "measured"}
EXEMPT = "nothing of it is pruned, but a training step was faster with it in the layout of sparse layers"


def unmasked(layers: Sequence[Layer]) -> dict[str, Any]:
    """What kernels.json says of round 0."""
    return {"layers": {layer.name: "dense" for layer in layers}, "reason": "nothing is pruned", "choices": {}}


def choose_kernels(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    layers: Sequence[Layer],
    kernels: str,
    example: Any,
    captured: bool = False,
) -> dict[str, Any]:
    """Masks a plain model and says how each layer runs, as kernels.json holds it.

    Args:
        kernels: "dense", "sparse", or "auto", which measures both on the `example` batch.
        captured: whether steps run in a CUDA graph. Then "auto" times no layer, because launched one by one it would
            cost what a graph saves: sparse is what GPU kernels can serve, and whole steps are to be compared.
    """
    by_rule = captured and kernels == "auto"
    when: Any = {"auto": "faster", "sparse": "always", "dense": lambda name, layer, mask: False}[kernels]
    refused = {layer.name: _refused(model, layer) for layer in layers} if by_rule else {}
    if by_rule:
        when = lambda name, layer, mask: refused[name] is None  # noqa: E731
    model = lottery_kernels.sparsify(model, masks, {layer.name: layer.block for layer in layers}, when, example)
    choices = lottery_kernels.choices(model)
    for name, reason in refused.items():
        choices[name]["reason"] = reason or "served by GPU kernels; whole steps were compared"
    return {"layers": {name: _said(choice) for name, choice in choices.items()}, "reason": REASONS[kernels],
            "choices": choices}  # fmt: skip


def mask_as_chosen(model: nn.Module, masks: Mapping[str, Tensor], kernels: Mapping[str, Any]) -> nn.Module:
    """Masks a plain model as an earlier choice says; in round 0 nothing is masked. A layer with a choice but no mask
    gets one that keeps all."""
    if not kernels["choices"]:
        return model
    exempt = kernels["choices"].keys() - masks.keys()
    full = {name: torch.ones_like(model.get_parameter(weight_key(name)), dtype=torch.bool) for name in exempt}
    return lottery_kernels.sparsify(model, {**masks, **full}, when=kernels["choices"])


def with_exempt(kernels: Mapping[str, Any], model: nn.Module, block: Block) -> dict[str, Any] | None:
    """The same choice, and the plain model's linear layers on the CPU that are not pruned run sparse too, under masks
    that keep all: beside sparse layers a dense one has activations transposed before and behind it. None where there is
    no such layer, or one of them cannot be masked."""
    exempt = {
        name: torch.ones_like(layer.weight, dtype=torch.bool)
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and name not in kernels["choices"] and layer.weight.is_cpu
    }
    if not exempt:
        return None
    try:
        model = lottery_kernels.sparsify(model, exempt, block, "always")
    except (TypeError, ValueError):
        return None
    choices = {name: {**choice, "reason": EXEMPT} for name, choice in lottery_kernels.choices(model).items()}
    return {**kernels, "choices": {**kernels["choices"], **choices}}


def densely(kernels: Mapping[str, Any], reason: str) -> dict[str, Any]:
    """The same pruned layers, all of them dense masked: what sparse is compared with."""
    choices = {name: {**kernels["choices"][name], "kernel": "dense", "reason": reason} for name in kernels["layers"]}
    return {"layers": dict.fromkeys(choices, DENSE), "reason": reason, "choices": choices}


def any_sparse(kernels: Mapping[str, Any]) -> bool:
    return any(choice["kernel"] == "sparse" for choice in kernels["choices"].values())


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of a masked model, under a plain model's names, dense; pruned positions are 0."""
    return {name: value.detach().cpu().clone() for name, value in lottery_kernels.dense_state_dict(model).items()}


def parse_block(text: str) -> Block:
    """(rows, cols) of "16x16"."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise ValueError(f"block: {text!r}; it takes rows x columns, such as 1x1 or 16x16, or auto")
    return int(match[1]), int(match[2])


def _refused(model: nn.Module, layer: Layer) -> str | None:
    """Why the GPU kernels do not serve a layer, or could not win, in the type that it computes in; None if they may."""
    dtype = model.get_parameter(weight_key(layer.name)).dtype
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    return gpu.unsupported(dtype, layer.block) or gpu.nothing_to_save(layer.shape, layer.groups, dtype)


def _said(choice: Mapping[str, Any]) -> str:
    return "sparse {}x{}".format(*choice["block"]) if choice["kernel"] == "sparse" else DENSE
