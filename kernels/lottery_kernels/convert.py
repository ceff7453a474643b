"""A whole model converted: sparse where that pays, dense masked elsewhere, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import masked, surgery
from .choose import Block, When, choose
from .fuse import to_fused, to_unfused
from .layers import SparseConv2d, SparseLayer, SparseLinear, refuse_inside_ddp
from .layout import to_batch_innermost, to_usual_layout
from .optimizer_state import Move, prepare_moves, zero_pruned_by
from .pattern import Pattern
from .targets import KINDS, Target, check_bare, find_targets


def sparsify(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    block: Block = (1, 1),
    when: When = "faster",
    example: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Converts masked `nn.Linear` and `nn.Conv2d` layers of a model to sparse ones, in place, where that is faster.

    Device, dtype, mode, trainability, gradients, hooks, the order of modules and sharing of a layer between several
    places stay. Biases stay the same `Parameter`. Layers left dense become (or stay) dense masked with
    `torch.nn.utils.prune`, so that the mask holds either way. Draws no random numbers. `choices` tells what was chosen.
    Beside sparse convolutions on a CPU, BatchNorm and pooling become subclasses that keep their layout in memory;
    beside sparse layers an `nn.Sequential` becomes a `FusedSequential`, which runs neighbours as one operator.

    Only layers of exactly these two classes can be converted: a subclass may compute something else. Code that keeps a
    layer outside the module tree, in a plain list say, keeps the dense one.

    Args:
        model: may itself be the layer; use the returned one then.
        masks: module name -> bool mask in the shape of its weight, True where a weight remains. A shared layer goes by
            any of its names. None takes the masks that `torch.nn.utils.prune` left; its hooks are removed from layers
            that become sparse.
        block: (rows, cols) of the blocks; "auto" takes the largest that covers a mask with little waste; a mapping or
            a callable (name, layer, mask) gives each layer its own, by default (1, 1).
        when: "faster", see `example`; "always"; a callable (name, layer, mask) -> bool that says what becomes sparse;
            or what `choices` returned, which is replayed exactly, blocks included, without measuring.
        example: for "faster": a batch (a tensor, a tuple of arguments or a dict of named ones) on which forward and
            backward of dense masked and sparse are timed, layer by layer and then as a whole. Weights, gradients,
            buffers and random state are as before afterwards. Without it a table of crossovers decides.
        optimizer: one that trains the model: `values` take the weights' places, with state of the same shape packed.

    Raises:
        TypeError, ValueError: something that cannot be converted, by name: a wrapped (DDP, DataParallel, FSDP) model,
            a parametrized or weight-normed layer, a tied weight, a subclass, a mask that does not fit, state of an
            optimizer that is not elementwise. The model is unchanged then.
        RuntimeError: the model is inside DistributedDataParallel.
    """
    targets = find_targets(model, masks)
    chosen = choose(model, targets, block, when, example)
    sparse: dict[nn.Module, SparseLayer] = {}
    moves = []
    for target, choice in zip(targets, chosen, strict=True):
        leaf = target.leaf
        if choice.sparse:
            sparse[target.layer] = layer = _sparse_layer(target, choice.pattern)
            moves.append(Move(target.name, leaf, layer.values, choice.pattern.pack))
        else:
            moves.append(Move(target.name, leaf, leaf, zero_pruned_by(target.mask)))
    re_point = prepare_moves(optimizer, moves)

    # Nothing below can fail: a model is converted wholly or not at all.
    re_point()
    for target, choice in zip(targets, chosen, strict=True):
        converted: nn.Module = target.layer
        if choice.sparse:
            converted = surgery.take_over(target.layer, sparse[target.layer])
        elif not masked.prune_hooks(converted):
            masked.put_mask(converted, target.mask)
        vars(converted)[surgery.RECORD] = choice.record()
    model = surgery.install(sparse, surgery.places_of(sparse, model), model)
    model = to_fused(model) if sparse else model
    convolutions = [layer for layer in sparse.values() if isinstance(layer, SparseConv2d)]
    return to_batch_innermost(model) if any(not layer.values.is_cuda for layer in convolutions) else model


@torch.no_grad()
def densify(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Undoes `sparsify` in place: sparse layers become `nn.Linear` and `nn.Conv2d` with zeros at pruned positions, and
    dense masked ones lose their mask. The same bits, and what `sparsify` keeps is kept.

    Args:
        model: may itself be the layer; use the returned one then.
        optimizer: one that trains the model: the weights take the places of `values`, with state unpacked.

    Raises:
        TypeError, ValueError: a wrapped model, an optimizer of another one. The model is unchanged then.
        RuntimeError: the model is inside DistributedDataParallel.
    """
    check_bare(model)
    named = list(model.named_modules())
    sparse = {name: layer for name, layer in named if isinstance(layer, SparseLayer)}
    pruned = {name: layer for name, layer in named if type(layer) in KINDS and masked.prune_hooks(layer)}
    leaves = {name: masked.leaf(layer) for name, layer in pruned.items()}
    refuse_inside_ddp(*(layer.values for layer in sparse.values()), *leaves.values())
    dense: dict[nn.Module, nn.Module] = {}
    moves = []
    for name, layer in sparse.items():
        dense[layer] = plain = _dense_layer(layer)
        moves.append(Move(name, layer.values, masked.leaf(plain), layer.pattern.unpack))
    moves += [
        Move(name, leaves[name], leaves[name], zero_pruned_by(masked.prune_mask(pruned[name]))) for name in pruned
    ]
    re_point = prepare_moves(optimizer, moves)

    re_point()  # as above, nothing can fail any more
    for masked_layer in pruned.values():
        masked.remove_mask(masked_layer)
        vars(masked_layer).pop(surgery.RECORD, None)
    for sparse_layer, plain in dense.items():
        surgery.take_over(sparse_layer, plain)
    return to_usual_layout(to_unfused(surgery.install(dense, surgery.places_of(dense, model), model)))


def choices(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What `sparsify` chose for each layer: `{name: {"kernel": "sparse" | "dense", "block": [rows, cols], "reason":
    text}}`, fit for JSON, and for `sparsify(…, when=choices)`. It is copied, pickled and renamed with the layers."""
    named = model.named_modules()
    return {name: dict(vars(layer)[surgery.RECORD]) for name, layer in named if surgery.RECORD in vars(layer)}


def dense_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict of the dense model: weights with zeros at pruned positions, no masks. Loads strictly into that."""
    state = model.state_dict()
    for prefix, module in model.named_modules(remove_duplicate=False):
        at = f"{prefix}." if prefix else ""
        if isinstance(module, SparseLayer):
            del state[at + "weight_mask"]
        for name in [key.removesuffix("_orig") for key in module._parameters]:
            if masked.prune_hooks(module, name):
                state[at + name] = masked.in_force(module, name)
                del state[f"{at}{name}_orig"], state[f"{at}{name}_mask"]
    return state


def _sparse_layer(target: Target, pattern: Pattern) -> SparseLinear | SparseConv2d:
    layer = target.sparse_copy(pattern)
    layer.bias = target.layer._parameters["bias"]
    if target.leaf.grad is not None:
        layer.values.grad = pattern.pack(target.leaf.grad)
    return layer


def _dense_layer(layer: SparseLayer) -> nn.Module:
    assert isinstance(layer, SparseLinear | SparseConv2d)
    dense = layer.to_dense()
    dense.bias = layer.bias
    if layer.values.grad is not None:
        dense.weight.grad = layer.pattern.unpack(layer.values.grad)
    return dense
