"""Which weights remain: masks by magnitude, by block, at random, in exact counts. No training here, and no files.

Layers are pruned one by one or all together, from one ranking. `lottery_kernels.Grid` says how blocks tile a weight;
they are numbered by (group, block row, tap, block column).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lottery_kernels import Grid

Block = tuple[int, int]
Masks = dict[str, Tensor]
SCOPES = ("layer", "global")


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
        return self.grid.groups * self.grid.rows * self.grid.taps * self.grid.cols

    @property
    def grid(self) -> Grid:
        return Grid.of(self.shape, self.block, self.groups)


def pools(layers: Sequence[Layer], scope: str) -> list[list[Layer]]:
    """The layers whose blocks are ranked together: each alone, or with the scope "global" all."""
    return [list(layers)] if scope == "global" else [[layer] for layer in layers]


def remaining(pool: Sequence[Layer], rounds: int) -> int:
    """Blocks that remain of a pool after `rounds` rounds: the nearest whole number to blocks · (1 − rate)^rounds."""
    return round(sum(layer.blocks for layer in pool) * (1 - pool[0].rate) ** rounds)


def weight_key(layer: str, parameter: str = "weight") -> str:
    """The name of a layer's weight in its model's state; the model may be the layer, whose name is "" then."""
    return f"{layer}.{parameter}" if layer else parameter


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
    layers: Sequence[Layer],
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    rounds: int,
    scope: str = "layer",
) -> Masks:
    """The masks after `rounds` rounds: of the blocks that `masks` leaves, those of the largest mean |weight| in a pool.

    Exactly `remaining(pool, rounds)` blocks remain of each pool; among equal scores the first in position goes first.
    A layer may lose its last block in the global scope, as in the paper; in the scope of a layer never.

    Args:
        weights: {layer name: trained dense weight}.
        masks: {layer name: bool mask in force}; pruned weights never return.

    Raises:
        ValueError: a weight is NaN, or nothing would be left of a pool.
    """
    pruned: Masks = {}
    for pool in pools(layers, scope):
        scores = torch.cat([_ranked(weights[layer.name], layer) for layer in pool])
        alive = torch.cat([blocks_alive(masks[layer.name], layer) for layer in pool])
        live = alive.nonzero().squeeze(1)  # in position order, which the stable sort keeps among equals
        keep = _count_to_keep(pool, rounds, len(live))
        order = torch.argsort(scores[live], stable=True)
        left = torch.zeros_like(alive)
        left[live[order[len(live) - keep :]]] = True
        for layer, part in zip(pool, left.split([layer.blocks for layer in pool]), strict=True):
            pruned[layer.name] = mask_from_blocks(part, layer)
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
    return layer.grid.split(mask.cpu()).flatten(-2).any(-1).flatten()


def mask_from_blocks(alive: Tensor, layer: Layer) -> Tensor:
    """The mask, in the shape of the weight, of which all positions of the live blocks remain."""
    grid = layer.grid
    tiles = alive.view(grid.groups, grid.rows, grid.taps, grid.cols, 1, 1)
    return grid.join(tiles.expand(-1, -1, -1, -1, *layer.block))


def _ranked(weight: Tensor, layer: Layer) -> Tensor:
    scores = block_scores(weight, layer)
    if torch.isnan(scores).any():
        raise ValueError(f"layer {layer.name!r}: a weight is NaN, so its magnitude cannot be ranked")
    return scores


def _count_to_keep(pool: Sequence[Layer], rounds: int, live: int) -> int:
    keep, name = remaining(pool, rounds), " and ".join(f"{layer.name!r}" for layer in pool)
    if keep < 1:
        raise ValueError(f"layer {name}: nothing would be left after {rounds} rounds at rate {pool[0].rate}")
    if keep > live:
        raise ValueError(f"layer {name}: {keep} blocks are to remain but only {live} do")
    return keep


def _block_sums(weight: Tensor, layer: Layer) -> Tensor:
    """Sum over each block, [blocks]; what pads a tail block counts 0."""
    return layer.grid.split(weight).sum((-2, -1)).flatten()
