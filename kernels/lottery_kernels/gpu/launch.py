"""What the launchers of linear layers and convolutions have in common.

Forward and dgrad are a product of rows of activations with the live blocks of a line (a block row, for dgrad a block
column); wgrad sums over those rows for each live block, in parts that a second kernel adds up where blocks are few.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ..pattern import runs
from .settings import (
    Target,
    Tile,
    halves,
    lines_together,
    most_rows,
    no_deeper_than,
    precision,
    product_tile,
    unsupported,
    wgrad_split,
    wgrad_tile,
)
from .tiles import rounded
from .tune import Sizes, best_tile


@triton.jit
def add_parts_kernel(
    parts_ptr,
    out_ptr,
    alive_ptr,
    size,
    PARTS: tl.constexpr,
    HAS_ALIVE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [size] = the sum of parts [PARTS, size], first to last; zero where not alive. EVEN: BLOCK divides size."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    o = tl.arange(0, BLOCK)
    m = None if EVEN else o < size - first
    b = tl.load(parts_ptr + first + o, mask=m, other=None if EVEN else 0.0)
    for i in range(1, PARTS):
        b += tl.load(parts_ptr + (tl.cast(i, tl.int64) * size + first) + o, mask=m, other=None if EVEN else 0.0)
    if HAS_ALIVE:
        b = tl.where(tl.load(alive_ptr + first + o, mask=m, other=None if EVEN else 0) != 0, b, 0.0)
    tl.store(out_ptr + first + o, b.to(out_ptr.dtype.element_ty), mask=m)


@triton.jit
def round_kernel(values_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """out [size] = values [size], `rounded` for tf32."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + o, rounded(tl.load(values_ptr + o, mask=o < size), "tf32"), mask=o < size)


MOST_PROGRAMS = 2**31 - 1  # of a CUDA grid's first dimension


class Index(NamedTuple):
    """The arrays of `Pattern.scheduled_index` by name."""

    row_ptr: Tensor
    col: Tensor
    t_ptr: Tensor
    t_row: Tensor
    t_index: Tensor
    row: Tensor
    column: Tensor
    row_order: Tensor
    column_order: Tensor
    alive: Tensor | None

    @classmethod
    def of(cls, index: Sequence[Tensor]) -> Index:
        alive = index[-1] if index[-1].dtype == torch.bool else None
        if len(index) != (9 if alive is None else 10):
            where = index[0].device
            raise ValueError(
                f"index holds {len(index)} arrays on {where}; GPU kernels take Pattern.scheduled_index, which is the "
                "index of a pattern on a CUDA device"
            )
        return cls._make([*index[:9], alive])

    @property
    def nnz(self) -> int:
        return self.col.shape[0]

    @property
    def alive_bytes(self) -> Tensor:
        """`alive` as bytes; where there is none, any array in its place: the kernel will not read it."""
        return self.col if self.alive is None else self.alive.view(torch.uint8)


class Lines(NamedTuple):
    """The blocks that a product walks: line n has entries i from `begin[n]` to `begin[n + 1]`, whose block is
    `block[i]`, whose values are at `entry[i]`, or at i without `entry`, and whose `line[i]` is n. `order` is that of
    `Pattern.schedule`."""

    begin: Tensor
    block: Tensor
    entry: Tensor | None  # of the transposed index only
    line: Tensor
    order: Tensor


def check(values: Tensor, index: Index, dims: int, groups: int = 1, **activations: tuple[Tensor | None, int]) -> Target:
    """Raises unless all tensors fit together and this target can run the blocks; returns the target.

    Args:
        values: `[nnz, r, c]`.
        dims: 2 for rows of features, 4 for images.
        groups: of a convolution; must divide the features of every activation.
        activations: name = (tensor, its features). Features are the second dimension, of `bias` the only one.

    Raises:
        TypeError: dtypes that differ. ValueError: devices that differ, a wrong shape, a block without a kernel.
    """
    if values.dim() != 3 or values.shape[0] != index.nnz:
        raise ValueError(f"values have shape {tuple(values.shape)}, the pattern has {index.nnz} live blocks")
    if index.col.device != values.device:
        raise ValueError(f"the pattern is on {index.col.device}, values are on {values.device}")
    for name, (tensor, features) in activations.items():
        if tensor is None:
            continue
        if tensor.device != values.device:
            raise ValueError(f"{name} is on {tensor.device}, values are on {values.device}")
        if tensor.dtype != values.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, values have {values.dtype}")
        if tensor.dim() != (1 if name == "bias" else dims):
            raise ValueError(f"{name} has {tensor.dim()} dimensions, this takes {1 if name == 'bias' else dims}")
        if tensor.shape[min(1, tensor.dim() - 1)] != features:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the weight needs {features} features")
        if features % groups:
            raise ValueError(f"{name} has {features} features, which groups={groups} does not divide")
    batches = {name: t.shape[0] for name, (t, _) in activations.items() if t is not None and name != "bias"}
    if len(set(batches.values())) > 1:
        (one, size), (other, size_too) = batches.items()
        raise ValueError(f"{one} has {size} {'rows' if dims == 2 else 'images'}, {other} has {size_too}")
    target = Target.current()
    reason = unsupported(values.dtype, (values.shape[1], values.shape[2]), target)
    if reason:
        raise ValueError(reason)
    return target


def launch_product(
    kernel: Any,
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor],
    lines: Lines,
    rows: int,
    operator: str,
    target: Target,
    phases: int = 1,
    groups: int = 1,
    **constants: Any,
) -> None:
    """Forward, or dgrad over the transposed index: y from `tensors` = x, values, bias, y.

    Args:
        rows: of activations in the result, for each of `phases`.
        groups: of a convolution: a line's columns of x are those of its group.
        operator: whose switch says how fp32 is multiplied, "matmul" or "conv".
        constants: what else the kernel wants.
    """
    x, values, bias, y = tensors
    r, c = values.shape[1:]
    depth, cols, step_k, step_n = (c, r, 1, c) if lines.entry is None else (r, c, c, 1)
    mode = precision(x.dtype, operator, target)
    count, transposed = (lines.begin.shape[0] - 1) // phases, lines.entry is not None
    table = product_tile(rows, cols, depth, x.dtype, mode, target, operator == "conv")
    packed, added = _as_multiplied(values.contiguous(), mode), None if bias is None else bias.contiguous()

    def lines_of_program(tile: Tile) -> int:
        # With coordinates of pixels too, a thread has no registers left to write a wide tile inside the loop.
        if groups > 1 or (operator == "conv" and tile.cols >= 64):
            return 1
        return lines_together(phases * triton.cdiv(rows, tile.rows) * count * (cols // tile.cols), target)

    steps = values.shape[0] * (depth // table.depth) / max(1, phases * count)  # of a line, on average
    table = no_deeper_than(table, steps * lines_of_program(table))

    def run(tile: Tile) -> None:
        tiles, per_line, together = triton.cdiv(rows, tile.rows), cols // tile.cols, lines_of_program(tile)
        cut = (tile.depth, min(tile.rows, tile.cols), tile.rows, tile.warps)
        pairs = operator == "matmul" and steps * together >= 24  # fewer, and what a longer turn copies in vain is more
        launch(
            kernel,
            phases * tiles * triton.cdiv(count, together) * per_line,
            (x, packed, added, y, *lines[:4], runs(lines.order, count, together), tiles, count, rows),
            tile,
            BLOCK_K=depth,
            BLOCK_N=cols,
            STEP_K=step_k,
            STEP_N=step_n,
            BM=tile.rows,
            BN=tile.cols,
            BK=tile.depth,
            GROUP=tile.group,
            LINES=together,
            HALVES=halves(*cut, x.dtype, mode, target, pairs),
            EVEN_M=rows % tile.rows == 0,
            TRANSPOSED=transposed,
            HAS_BIAS=bias is not None,
            PRECISION=mode,
            **constants,
        )

    traits, sizes = (x.dtype, mode, transposed, phases), Sizes(rows, count, values.shape[0])
    run(best_tile(kernel, table, (cols, depth), traits, sizes, target, run))


def _as_multiplied(values: Tensor, precision: str) -> Tensor:
    """`values` as they are, or `rounded`, by a kernel of their own: where they are multiplied from shared memory, a
    program cannot change them on the way. They are few."""
    if precision != "tf32" or not values.numel():
        return values
    out = torch.empty_like(values)
    size, block = values.numel(), 1024
    launch(round_kernel, triton.cdiv(size, block), (values, out, size), None, BLOCK=block)
    return out


def launch_wgrad(
    kernel: Any,
    dy: Tensor,
    x: Tensor,
    dvalues: Tensor,
    index: Index,
    rows: int,
    operator: str,
    target: Target,
    several: bool = True,
    **constants: Any,
) -> None:
    """dvalues `[nnz, r, c]`: the sum over `rows` rows of activations at the live blocks. Otherwise as for a product.

    Args:
        several: whether a program may sum several blocks of a block row.
    """
    nnz, r, c = dvalues.shape
    mode = precision(x.dtype, operator, target)

    def run(tile: Tile) -> None:
        blocks, programs, part, parts = wgrad_split(nnz, (r, c), rows, tile, target)
        more = most_rows(tile, blocks)
        sums = dvalues if parts == 1 else torch.empty(parts, nnz, r, c, dtype=torch.float32, device=x.device)
        launch(
            kernel,
            programs * parts,
            (dy, x, sums, index.row, index.col, index.alive_bytes, nnz, rows, part),
            tile,
            R=r,
            C=c,
            BM=tile.rows,
            MORE=more,
            BR=tile.cols,
            BC=tile.depth // blocks,
            HALVES=halves(tile.rows, min(tile.cols, tile.depth), 0, tile.warps, x.dtype, mode, target),
            BLOCKS=blocks,
            EVEN_M=rows % more == 0,
            SPLIT=parts > 1,
            HAS_ALIVE=index.alive is not None,
            PRECISION=mode,
            **constants,
        )
        if parts > 1:
            size = dvalues.numel()
            options = {"PARTS": parts, "HAS_ALIVE": index.alive is not None, "EVEN": size % 1024 == 0, "BLOCK": 1024}
            launch(add_parts_kernel, triton.cdiv(size, 1024), (sums, dvalues, index.alive_bytes, size), None, **options)

    per_row = nnz / max(1, index.row_ptr.shape[0] - 1) if several else 0
    table = wgrad_tile(rows, (r, c), x.dtype, mode, target, per_row)
    traits = (x.dtype, mode, index.alive is not None)
    run(best_tile(kernel, table, (r, c), traits, Sizes(rows, 1, nnz), target, run, fixed=("group",)))


def launch(kernel: Any, programs: int, args: Sequence[Any], tile: Tile | None, **constants: Any) -> None:
    """`kernel` on `programs` programs, on the device of the first tensor of `args`.

    Raises:
        ValueError: more programs than a launch can have.
        RuntimeError: the GPU has not the resources, or its driver refuses, or an earlier kernel has failed.
    """
    if programs > MOST_PROGRAMS:
        raise ValueError(f"{_name(kernel)} would need {programs} programs; a launch has at most {MOST_PROGRAMS}")
    options = {} if tile is None else {"num_warps": tile.warps, "num_stages": tile.stages}
    device = args[0].device
    with _current_device(device):
        try:
            kernel[(programs,)](*args, **constants, **options)
        except OutOfResources as error:
            raise RuntimeError(
                f"{_name(kernel)} does not fit this GPU ({Target.current()}) with {tile}: {error}"
            ) from error
        except RuntimeError as error:
            raise RuntimeError(
                f"{_name(kernel)} could not be launched on {device} ({Target.current()}) with {tile}: {error}. The "
                "fault may be an earlier kernel's: CUDA_LAUNCH_BLOCKING=1 shows whose"
            ) from error


def _name(kernel: Any) -> str:
    return kernel.fn.__name__


def _current_device(device: torch.device) -> contextlib.AbstractContextManager:
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else contextlib.nullcontext()
