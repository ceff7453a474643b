"""Which weights remain: masks by magnitude, by block, at random, in exact counts. No training here, and no files.

A layer's weight is seen as a matrix `[groups, out/groups, taps, in/groups]` (linear: groups = taps = 1), tiled into
blocks (rows, cols) of [out/groups] × [in/groups]; see `lottery_kernels.Pattern`. Blocks are numbered by (group, block
row, tap, block column).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Block = tuple[int, int]
Masks = dict[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """A layer that is pruned."""

    name: str
    shape: tuple[int, ...]  # of its dense weight
    rate: float  # share of the remaining blocks pruned in a round
    block: Block = (1, 1)
    groups: int = 1

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        groups, rows, taps, cols = _matrix_shape(self.shape, self.groups)
        return groups * -(-rows // self.block[0]) * taps * -(-cols // self.block[1])

    def remaining(self, rounds: int) -> int:
        """Blocks that remain after `rounds` rounds: the nearest whole number to blocks · (1 − rate)^rounds."""
        return round(self.blocks * (1 - self.rate) ** rounds)


def prunable(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that can be pruned, by module name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def layers_of(model: nn.Module, rates: float | Mapping[str, float], block: Block = (1, 1)) -> list[Layer]:
    """The layers to prune: all prunable ones at one rate, or those that `rates` names. The others are never counted."""
    found = prunable(model)
    if not isinstance(rates, Mapping):
        rates = dict.fromkeys(found, rates)
    layers = []
    for name, rate in rates.items():
        if name not in found:
            raise ValueError(f"rate: no layer {name!r} that can be pruned; there are {', '.join(found) or 'none'}")
        if not 0 < rate < 1:
            raise ValueError(
                f"rate: {rate} for layer {name!r}; a rate lies between 0 and 1 (leave a layer out to exempt it)"
            )
        module = found[name]
        layers.append(Layer(name, tuple(module.weight.shape), float(rate), block, getattr(module, "groups", 1)))
    if not layers:
        raise ValueError("rate: no layer is left to prune")
    return sorted(layers, key=lambda layer: list(found).index(layer.name))


def density_of(masks: Mapping[str, Tensor]) -> float:
    """Share of the weights that remain, over all masked layers: the paper's P_m."""
    return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


def full_masks(layers: Sequence[Layer]) -> Masks:
    return {layer.name: torch.ones(layer.shape, dtype=torch.bool) for layer in layers}


def by_magnitude(
    layers: Sequence[Layer], weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], rounds: int
) -> Masks:
    """The masks after `rounds` rounds: of the blocks that `masks` leaves, those of the largest mean |weight| a layer.

    Exactly `layer.remaining(rounds)` blocks remain of each layer; among equal scores the first in position goes first.

    Args:
        weights: {layer name: trained dense weight}.
        masks: {layer name: bool mask in force}; pruned weights never return.

    Raises:
        ValueError: a weight is NaN, or nothing would be left in a layer.
    """
    pruned = {}
    for layer in layers:
        scores = block_scores(weights[layer.name], layer)
        if torch.isnan(scores).any():
            raise ValueError(f"layer {layer.name!r}: a weight is NaN, so its magnitude cannot be ranked")
        alive = blocks_alive(masks[layer.name], layer)
        live = alive.nonzero().squeeze(1)  # in position order, which the stable sort keeps among equals
        keep = _count_to_keep(layer, rounds, len(live))
        order = torch.argsort(scores[live], stable=True)
        left = torch.zeros_like(alive)
        left[live[order[len(live) - keep :]]] = True
        pruned[layer.name] = mask_from_blocks(left, layer)
    return pruned


def at_random(layers: Sequence[Layer], masks: Mapping[str, Tensor], generator: torch.Generator) -> Masks:
    """Masks of the same density layer by layer, the blocks at random positions.

    Blocks change places only with blocks of as many real positions (tail blocks among themselves), so that the count of
    weights is the same too.
    """
    shuffled = {}
    for layer in layers:
        alive = blocks_alive(masks[layer.name], layer)
        sizes = _block_sums(torch.ones(layer.shape), layer)
        moved = torch.zeros_like(alive)
        for size in sizes.unique():
            places = (sizes == size).nonzero().squeeze(1)
            moved[places] = alive[places[torch.randperm(len(places), generator=generator)]]
        shuffled[layer.name] = mask_from_blocks(moved, layer)
    return shuffled


def block_scores(weight: Tensor, layer: Layer) -> Tensor:
    """Mean |weight| of each block over its real positions, [blocks], on the CPU in fp64."""
    magnitude = weight.detach().to("cpu", torch.float64).abs()
    return _block_sums(magnitude, layer) / _block_sums(torch.ones(layer.shape, dtype=torch.float64), layer)


def blocks_alive(mask: Tensor, layer: Layer) -> Tensor:
    """Which blocks hold a live position, bool [blocks]."""
    return _block_sums(mask.cpu().float(), layer) > 0


def mask_from_blocks(alive: Tensor, layer: Layer) -> Tensor:
    """The mask, in the shape of the weight, of which all positions of the live blocks remain."""
    groups, rows, taps, cols = _matrix_shape(layer.shape, layer.groups)
    (r, c), (block_rows, block_cols) = layer.block, _tiles(layer)
    tiles = alive.view(groups, block_rows, 1, taps, block_cols, 1).expand(-1, -1, r, -1, -1, c)
    matrix = tiles.reshape(groups, block_rows * r, taps, block_cols * c)[:, :rows, :, :cols]
    return matrix.transpose(2, 3).reshape(layer.shape).contiguous()


def _count_to_keep(layer: Layer, rounds: int, live: int) -> int:
    keep = layer.remaining(rounds)
    if keep < 1:
        raise ValueError(f"layer {layer.name!r}: nothing would be left after {rounds} rounds at rate {layer.rate}")
    if keep > live:
        raise ValueError(f"layer {layer.name!r}: {keep} blocks are to remain but only {live} do")
    return keep


def _matrix_shape(shape: Sequence[int], groups: int) -> tuple[int, int, int, int]:
    """(groups, out/groups, taps, in/groups) of a weight [out, in/groups, …]."""
    return groups, shape[0] // groups, math.prod(shape[2:]), shape[1]


def _tiles(layer: Layer) -> tuple[int, int]:
    _, rows, _, cols = _matrix_shape(layer.shape, layer.groups)
    return -(-rows // layer.block[0]), -(-cols // layer.block[1])


def _block_sums(weight: Tensor, layer: Layer) -> Tensor:
    """Sum over each block, [blocks]; what pads a tail block counts 0."""
    groups, rows, taps, cols = _matrix_shape(layer.shape, layer.groups)
    (r, c), (block_rows, block_cols) = layer.block, _tiles(layer)
    matrix = weight.reshape(groups, rows, cols, taps).transpose(2, 3)  # [groups, rows, taps, cols]
    padded = nn.functional.pad(matrix, (0, block_cols * c - cols, 0, 0, 0, block_rows * r - rows))
    return padded.reshape(groups, block_rows, r, taps, block_cols, c).sum((2, 5)).flatten()
