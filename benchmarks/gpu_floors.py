"""What the GPU kernels' work must be at least: sectors, instructions, and what that makes of a card's time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lottery_kernels.gpu import settings
from tests.gpu.cases import PRECISIONS, Layer
from tests.gpuless.memory import SECTOR

TARGET = settings.Target("cuda", 80, 108)


@dataclass(frozen=True)
class Card:
    """Documented peaks: bf16 tensor cores in FLOP/s, second-level cache and memory in bytes/s."""

    flops: float
    cache: float
    memory: float


CARDS = {
    "A100": Card(312e12, 5120 * 1.41e9, 1555e9),  # 5120 bytes a clock: NVIDIA's white paper on the A100
    "H100": Card(989e12, 5120 * 1.755e9, 3350e9),  # the cache's width is taken as the A100's
}


def instructions_for_tiling(layer: Layer, nnz: int) -> float:
    """Instructions of warps that the three passes in 16 bits cannot do without at the tiles that are shipped: matrix
    instructions, ldmatrix, copies of 16 bytes a thread, and for each sum a move of zero, its conversion and its way
    through shared memory into the result. No addresses, indices, masks, loops, and nothing is copied in vain."""
    (r, c), rows = layer.block, layer.batch * math.prod(layer.image or ())
    kind, total = PRECISIONS[layer.precision][1], 0.0
    for cols, depth, features in ((r, c, layer.weight_shape[0]), (c, r, layer.weight_shape[1])):
        tile = settings.product_tile(rows, cols, depth, layer.dtype, kind, TARGET, layer.image is not None)
        tiles, blocks = math.ceil(rows / tile.rows), nnz * (cols // tile.cols)
        total += tiles * blocks * _loop(tile.rows, tile.cols, depth, tile.warps)
        total += rows * features * (1 / 32 + 1 / 64 + 3 * 2 / 512)
    tile, programs, parts = _wgrad(layer, nnz, rows, kind)
    total += programs * _loop(tile.cols, tile.depth, rows, tile.warps)
    sums = nnz * r * c
    total += sums * (parts / 32 + 1 / 64 + 2 / 512)
    return total + (sums * parts * (2 * 4 / 512 + 1 / 32) if parts > 1 else 0)  # written, read and added


def _loop(height: int, width: int, depth: int, warps: int) -> float:
    """Of a tile's product over `depth`: its warps side by side in the way that takes the fewest ldmatrix."""
    pieces = depth / 256  # of 16×16 values, one ldmatrix, for a row or column
    loads = min(pieces * (height * (warps // high) + width * high) for high in (1, 2, 4, 8) if high <= warps)
    return height * width * depth / 2048 + loads + (height + width) * depth * 2 / 512


def _wgrad(layer: Layer, nnz: int, rows: int, kind: str) -> tuple[settings.Tile, int, int]:
    """How wgrad is launched: the tile, programs, and parts that `rows` are cut into."""
    per_row = nnz / math.ceil(layer.weight_shape[0] / layer.block[0])
    tile = settings.wgrad_tile(rows, layer.block, layer.dtype, kind, TARGET, per_row)
    _, programs, _, parts = settings.wgrad_split(nnz, layer.block, rows, tile, TARGET)
    return tile, programs, parts


def least_for_tiling(layer: Layer, nnz: int) -> dict[str, float]:
    """(c) in sectors, for each pass."""
    (r, c), size, target = layer.block, layer.dtype.itemsize, TARGET
    kind = PRECISIONS[layer.precision][1]
    rows = layer.batch * math.prod(layer.image or ())
    out, inputs = layer.weight_shape[0], layer.weight_shape[1]
    least = {}
    for name, cols, depth, features in (("y", r, c, out), ("dx", c, r, inputs)):
        tile = settings.product_tile(rows, cols, depth, layer.dtype, kind, target, layer.image is not None)
        tiles, per_line = -(-rows // tile.rows), cols // tile.cols
        read = tiles * nnz * per_line * (depth * tile.cols + min(rows, tile.rows) * depth)
        least[name] = (read + rows * features) * size / SECTOR
    tile, programs, parts = _wgrad(layer, nnz, rows, kind)
    partial = 2 * parts * nnz * r * c * 4 if parts > 1 else 0  # fp32, written and read
    least["dvalues"] = ((programs * rows * (tile.cols + tile.depth) + nnz * r * c) * size + partial) / SECTOR
    return least


def proportional(layer: Layer, dense: float, live: float) -> float:
    """What writing y and dx takes at least, and the live share of the other `dense` instructions, over the latter."""
    rows = layer.batch * math.prod(layer.image or ())
    written = rows * (layer.weight_shape[0] + layer.weight_shape[1]) * layer.dtype.itemsize
    instructions = 5 if layer.dtype.itemsize == 2 else 1
    writing = instructions * written / 512 / dense
    return writing + live * (1 - writing)


def least(layer: Layer, nnz: int) -> float:
    """(d) in sectors, for the three passes."""
    rows = layer.batch * math.prod(layer.image or ())
    activations = rows * (layer.weight_shape[0] + layer.weight_shape[1])
    return 3 * (activations + nnz * math.prod(layer.block)) * layer.dtype.itemsize / SECTOR


def bound(card: Card, layer: Layer, nnz: int, sectors: float) -> float:
    """Upper bound of the speed-up over dense at 80 % of peak, for the three passes."""
    rows = layer.batch * math.prod(layer.image or ())
    flops = 6 * rows * math.prod(layer.weight_shape)
    share = nnz * math.prod(layer.block) / math.prod(layer.weight_shape)
    sparse = max(flops * share / card.flops, sectors * SECTOR / card.cache, least(layer, nnz) * SECTOR / card.memory)
    return flops / (0.8 * card.flops) / sparse
