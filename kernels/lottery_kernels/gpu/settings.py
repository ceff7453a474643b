"""What the launchers choose: the target, the precision of fp32, tile sizes, warps and pipeline stages.

The tables hold for every target unless one is named. Tests compile each of their rows for the targets that are
supported and keep what was found (registers, spills, shared memory, instructions) beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

BLOCKS = (16, 32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Target:
    """A GPU: `cuda` or `hip`, compute capability as 10·major + minor (or gfx name), streaming multiprocessors."""

    backend: str
    arch: int | str
    processors: int

    @classmethod
    def current(cls) -> Target:
        """The device that Triton would launch on now."""
        target = driver.active.get_current_target()
        return cls(target.backend, target.arch, _processors(driver.active.get_current_device(), target.arch))


@cache
def _processors(device: int, arch: int | str) -> int:
    return driver.active.utils.get_device_properties(device)["multiprocessor_count"]


@dataclass(frozen=True)
class Tile:
    """One program's share of a launch.

    `rows`: rows of activations, in the sum over the batch (wgrad) those of one step. `cols`: columns of the result
    within a block. `depth`: the step within a block's inner dimension. `group`: tiles of activations that are worked
    off together before the next ones, so that both they and the weights stay in the second-level cache.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    group: int = 8


def unsupported(dtype: torch.dtype, block: tuple[int, int], target: Target | None = None) -> str | None:
    """Why these kernels cannot run values of `dtype` in blocks of this size, or None if they can."""
    if dtype not in DTYPES:
        return f"dtype {dtype} has no GPU kernel (float16, bfloat16 and float32 have)"
    if not all(size in BLOCKS for size in block):
        return f"block {tuple(block)} has no GPU kernel: rows and cols must be one of {BLOCKS}"
    if target and target.backend == "cuda" and int(target.arch) < 80:
        return f"compute capability {int(target.arch) / 10} is too old: the GPU kernels need 8.0"
    return None


def precision(dtype: torch.dtype, operator: str, target: Target) -> str:
    """`input_precision` of a product: for fp32 what torch's own switch says, `matmul` and `conv` apart.

    Only `fp32_precision` is read: once it has been set, reading the older `allow_tf32` raises.
    """
    if dtype != torch.float32:
        return "ieee"  # has no meaning for half types
    backends: Any = torch.backends  # what mypy knows of it lacks these
    chosen = (backends.cudnn.conv if operator == "conv" else backends.cuda.matmul).fp32_precision
    if chosen == "none":
        chosen = backends.fp32_precision
    knows_tf32 = target.backend == "cuda" or target.arch == "gfx942"
    return "tf32" if chosen == "tf32" and knows_tf32 else "ieee"


def product_tile(
    rows: int, cols: int, depth: int, dtype: torch.dtype, precision: str, target: Target, images: bool = False
) -> Tile:
    """Forward and dgrad: `rows` activations, blocks that are `depth` deep and give `cols` columns.

    `images`: of a convolution, which keeps coordinates in registers too.
    """
    tall = max(16, min(128, _power_of_two(rows)))
    if dtype == torch.float32 and precision == "ieee":  # no tensor cores: the tile lives in registers
        warps = 8 if target.arch == 90 and cols == depth == 64 else 4  # with 4 ptxas spills
        return Tile(min(tall, 64), min(cols, 64), min(depth, 32), warps, 2 if target.backend == "hip" else 3)
    wide = min(cols, 128)
    step = min(depth, 32 if dtype == torch.float32 else 64)
    if wide <= (64 if _multiplies_by_warp(target) else 32) and rows >= 4096 and dtype.itemsize == 2:
        # Narrow blocks: more rows for what a program does once. On an H100 512 were measured and are slower than 256.
        tall = 512 if wide == depth == 16 and _multiplies_by_warp(target) else 256
    elif wide == 16 and rows >= 1024 and dtype.itemsize == 2:
        tall = 256  # fewer, so that there are still programs for all multiprocessors
    warps = 8 if tall * wide > 128 * 64 else 4
    if _multiplies_by_warp(target):
        if dtype.itemsize == 2:  # the more sums a thread has, the fewer instructions an operation takes
            few = wide <= 32 or tall * wide <= 64 * 64
            sums = 128 if _prefetches(target) or wide < (64 if images else 128) else 64  # with 128 ptxas spills
            least = 4 if not few else 2 if images else 1
            warps = max(least, tall * wide // (32 * sums))
            warps = max(warps, 4) if tall * step > 128 * 64 else warps
            warps = 8 if images and tall * wide > 128 * 64 and wide == 128 else warps  # with 4 ptxas spills
        elif step == 16 and wide == 64:
            tall = min(tall, 64)  # with 128 ptxas spills
    elif dtype == torch.float32 and wide == step == 32 and target.arch == 100:
        warps = 8  # with 4 ptxas spills
    stages = 4 if dtype.itemsize == 2 and step * (tall + wide) * 2 <= 12288 else 3
    return Tile(tall, wide, step, warps, 2 if target.backend == "hip" else stages)


def wgrad_tile(
    size: int, block: tuple[int, int], dtype: torch.dtype, precision: str, target: Target, per_row: float = 0
) -> Tile:
    """wgrad of `size` activations: a program sums one block or a part of it, or if it may take several of a block row,
    which has `per_row` live ones on average, `depth` columns of them together. `per_row` 0: it may not."""
    if dtype == torch.float32 and precision == "ieee":
        return Tile(32, min(block[0], 64), min(block[1], 64), 4, 2 if target.backend == "hip" else 3)
    high, wide = block
    narrow, least = 64, 32  # rows and columns together
    if per_row > 1 and size >= 1024 and dtype.itemsize == 2 and high <= 32:  # in long rows few programs meet an end
        wide = max(wide, 64 if wide == 32 or (high == 16 and per_row >= 6) else 32)
        narrow, least = 96, 48
    area = high * wide
    if _multiplies_by_warp(target) and dtype.itemsize == 2:
        warps = max(1, min(4, area // (32 * 128)))
    else:  # from 64 rows on four warps can multiply together
        warps = 8 if area > 64 * 128 else 4 if area >= 64 * 64 or high >= 64 else 2 if area >= 32 * 32 else 1
    rows = (32 if dtype == torch.float32 else 64) * (4 if high + wide <= least else 2 if high + wide <= narrow else 1)
    rows = min(rows, max(32, _power_of_two(size)))
    return no_deeper_than(Tile(rows, high, wide, warps, 2 if target.backend == "hip" else 3), size / rows)


def halves(
    inner: int,
    narrow: int,
    rows: int,
    warps: int,
    dtype: torch.dtype,
    precision: str,
    target: Target,
    pairs: bool = False,
) -> str:
    """How a turn of the loop gets two products: of halves of a step's "depth" or "rows", or of two "steps"; "" if one.

    For GPUs of capability 8 Triton loads the first slice of a step's operands into registers a step ahead ("prefetch"),
    as long as there is one product in the loop. That takes those registers twice, and in blocks of 16, where the first
    slice is all there is, most instructions only move them. Two products are left as they are. Where steps are short,
    two in a turn share what is done once in it.

    Args:
        inner: what the step sums over, `narrow` the smaller side of its two tiles: half of that tile must leave a copy
            of 16 bytes for each thread of `warps`, or the depth is not cut.
        rows: of the result that can be cut instead.
        pairs: whether two steps may make a turn.
    """
    if not _prefetches(target) or (dtype == torch.float32 and precision == "ieee"):
        return ""
    if pairs and dtype.itemsize == 2 and inner <= 32 and narrow <= 64:  # with 128 ptxas spills
        return "steps"
    if inner >= 32 and inner // 2 * narrow * dtype.itemsize >= 16 * 32 * warps:  # Triton 3.6: a product is 16 deep
        return "depth"
    return "rows" if rows >= 32 else ""


def lines_together(programs: int, target: Target) -> int:
    """How many lines a program works off, 1 to 8, where there would be `programs` with one line each.

    That shares what a program does once, and the copies for a line begin while the line before is multiplied; but there
    should be a program for each multiprocessor. Only for GPUs of capability 8: where four warps multiply together their
    product would have to be waited for in every step, and on sm_120 ptxas spills.
    """
    if not _prefetches(target):
        return 1
    together = 1
    while together < 8 and programs >= 2 * together * target.processors:
        together *= 2
    return together


def no_deeper_than(tile: Tile, steps: float) -> Tile:
    """`tile` with a pipeline for programs of `steps` on average: what is loaded ahead of the last is in vain."""
    return replace(tile, stages=min(tile.stages, max(2, 1 + math.ceil(steps))))


def _prefetches(target: Target) -> bool:
    return target.backend == "cuda" and int(target.arch) // 10 == 8


def _multiplies_by_warp(target: Target) -> bool:
    """Whether each warp multiplies alone (mma.sync); on sm_90 (wgmma) and sm_100 (tcgen05) four do together."""
    return target.backend == "cuda" and int(target.arch) // 10 not in (9, 10)


def most_rows(tile: Tile, blocks: int) -> int:
    """Rows of wgrad's largest step, where a program of several blocks has to sum fewer at a time."""
    return max(tile.rows, min(2 * tile.rows, 256)) if blocks > 1 else tile.rows


def wgrad_split(nnz: int, block: tuple[int, int], size: int, tile: Tile, target: Target) -> tuple[int, int, int, int]:
    """How wgrad is shared out: (blocks of a program, programs, rows of a part, parts).

    `programs` work on each of the `parts` that the sum over `size` rows is cut into, so that few live blocks still fill
    the chip; a part has at least 512 rows, so that what a program does once stays small. Programs of several blocks do
    more: half as many suffice, and their parts have at least 1024 rows.
    """
    blocks = max(1, tile.depth // block[1])
    programs = -(-nnz // blocks) * (block[0] // tile.cols) * (block[1] * blocks // tile.depth)
    step, more = most_rows(tile, blocks), min(blocks, 2)
    parts = max(1, min(4 // more * target.processors // programs, size // (512 * more)))
    part = -(-size // (step * parts)) * step
    return blocks, programs, part, max(1, -(-size // part) if part else 1)


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def row_major(x: Tensor) -> Tensor:
    """`x [N, F]` itself if its rows are contiguous, else a copy."""
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    """`x` itself if a pixel's channels are contiguous, else a channels_last copy."""
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous(memory_format=torch.channels_last)
