"""What the kernels and launchers of linear layers and convolutions share.

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
    precision,
    product_tile,
    unsupported,
    wgrad_split,
    wgrad_tile,
)
from .tune import Sizes, best_tile


@triton.jit
def grouped_tile(pid, tiles, lines, GROUP: tl.constexpr):
    """Program number -> (activation tile, line), `GROUP` tiles at a time with the line changing slowest."""
    first = pid // (GROUP * lines) * GROUP
    size = tl.minimum(tiles - first, GROUP)
    within = pid % (GROUP * lines)
    return first + within % size, within // size


@triton.jit
def row_offsets(o_m, STRIDE: tl.constexpr):
    """o_m · STRIDE for rows o_m of a tile, in 32 bits where they hold it."""
    return o_m * STRIDE if o_m.shape[0] * STRIDE < 2**30 else o_m.to(tl.int64) * STRIDE


@triton.jit
def pixel_offsets(
    i_image,
    h,
    w,
    IMAGES: tl.constexpr,
    H: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
):
    """Where pixels (h, w) of a few neighbouring images with H rows lie, in 32 bits where they hold it."""
    if IMAGES * STRIDE_N + H * STRIDE_H < 2**30:
        return i_image * STRIDE_N + (h * STRIDE_H + w * STRIDE_W)
    else:
        return i_image.to(tl.int64) * STRIDE_N + (h.to(tl.int64) * STRIDE_H + w * STRIDE_W)


@triton.jit
def load_rows(ptr, m, STRIDE: tl.constexpr, o, m_features, m_rows, TAIL: tl.constexpr, EVEN_M: tl.constexpr):
    """A tile of rows from m on, zero where masked; TAIL: features are; EVEN_M: rows are not."""
    # The row is added to the pointer, not the pointer moved on from step to step: that would take two additions each.
    p = ptr + tl.cast(m, tl.int64) * STRIDE + o
    if EVEN_M:
        return tl.load(p, mask=m_features if TAIL else None, other=0.0 if TAIL else None)
    else:
        return tl.load(p, mask=m_features & m_rows if TAIL else m_rows, other=0.0)


@triton.jit
def store_tile(
    y_ptr,
    bias_ptr,
    b_y,
    b_y1,
    n,
    columns,
    o_n,
    rows,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Writes b_y [BM, BN] + bias, and with HALVES of rows the other half b_y1, from column n on, of which `columns` are
    left. `rows` are where rows lie in y and which exist, of b_y and of b_y1; with EVEN_M and EVEN_N all exist."""
    store_rows(y_ptr, bias_ptr, b_y, n, columns, o_n, rows[0], rows[1], EVEN_M, EVEN_N, HAS_BIAS, RELU)
    if HALVES == "rows":
        store_rows(y_ptr, bias_ptr, b_y1, n, columns, o_n, rows[2], rows[3], EVEN_M, EVEN_N, HAS_BIAS, RELU)


@triton.jit
def store_rows(
    y_ptr,
    bias_ptr,
    b_y,
    n,
    columns,
    o_n,
    o_m,
    m_m,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
):
    """One half of `store_tile`, or all of it."""
    m_n = o_n < columns
    if HAS_BIAS:
        p_bias = bias_ptr + n + o_n
        b_bias = tl.load(p_bias) if EVEN_N else tl.load(p_bias, mask=m_n, other=0.0)
        b_y += b_bias.to(tl.float32)[None, :]
    if RELU:
        b_y = tl.maximum(b_y, 0.0)
    b_y = b_y.to(y_ptr.dtype.element_ty)
    p_y = (y_ptr + n) + (o_m[:, None] + o_n[None, :])
    if EVEN_M and EVEN_N:
        tl.store(p_y, b_y)
    elif EVEN_M:
        tl.store(p_y, b_y, mask=m_n[None, :])
    elif EVEN_N:
        tl.store(p_y, b_y, mask=m_m[:, None])
    else:
        tl.store(p_y, b_y, mask=m_m[:, None] & m_n[None, :])


@triton.jit
def store_block(
    out_ptr,
    alive_ptr,
    b_dw,
    o_out,
    i_entry,
    i_part,
    nnz,
    SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_ALIVE: tl.constexpr,
):
    """A tile of wgrad at o_out of block i_entry, zero where not alive; with SPLIT into part i_part of the sums."""
    first = tl.cast(i_entry, tl.int64) * SIZE
    if SPLIT:
        tl.store(out_ptr + (tl.cast(i_part, tl.int64) * nnz * SIZE + first) + o_out, b_dw)
    else:
        if HAS_ALIVE:
            b_dw = tl.where(tl.load(alive_ptr + first + o_out) != 0, b_dw, 0.0)
        tl.store(out_ptr + first + o_out, b_dw.to(out_ptr.dtype.element_ty))


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
    b = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(PARTS):
        b += tl.load(parts_ptr + (tl.cast(i, tl.int64) * size + first) + o, mask=m, other=None if EVEN else 0.0)
    if HAS_ALIVE:
        b = tl.where(tl.load(alive_ptr + first + o, mask=m, other=None if EVEN else 0) != 0, b, 0.0)
    tl.store(out_ptr + first + o, b.to(out_ptr.dtype.element_ty), mask=m)


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
    table = product_tile(rows, cols, depth, x.dtype, mode, target, operator == "conv")
    count, transposed = (lines.begin.shape[0] - 1) // phases, lines.entry is not None
    packed, added = values.contiguous(), None if bias is None else bias.contiguous()

    def run(tile: Tile) -> None:
        tiles, per_line = triton.cdiv(rows, tile.rows), cols // tile.cols
        # With coordinates of pixels too, a thread has no registers left to write a wide tile inside the loop.
        alone = groups > 1 or (operator == "conv" and tile.cols >= 64)
        together = 1 if alone else lines_together(phases * tiles * count * per_line, target)
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
            HALVES=halves(tile.depth, min(tile.rows, tile.cols), tile.rows, tile.warps, x.dtype, mode, target),
            EVEN_M=rows % tile.rows == 0,
            TRANSPOSED=transposed,
            HAS_BIAS=bias is not None,
            PRECISION=mode,
            **constants,
        )

    traits, sizes = (x.dtype, mode, transposed, phases), Sizes(rows, count, values.shape[0])
    run(best_tile(kernel, table, (cols, depth), traits, sizes, target, run))


def launch_wgrad(
    kernel: Any,
    dy: Tensor,
    x: Tensor,
    dvalues: Tensor,
    index: Index,
    rows: int,
    operator: str,
    target: Target,
    **constants: Any,
) -> None:
    """dvalues `[nnz, r, c]`: the sum over `rows` rows of activations at the live blocks. Otherwise as for a product."""
    nnz, r, c = dvalues.shape
    mode = precision(x.dtype, operator, target)

    def run(tile: Tile) -> None:
        programs = nnz * (r // tile.cols) * (c // tile.depth)
        part, parts = wgrad_split(programs, rows, tile.rows, target)
        sums = dvalues if parts == 1 else torch.empty(parts, nnz, r, c, dtype=torch.float32, device=x.device)
        launch(
            kernel,
            programs * parts,
            (dy, x, sums, index.row, index.col, index.alive_bytes, nnz, rows, part),
            tile,
            R=r,
            C=c,
            BM=tile.rows,
            BR=tile.cols,
            BC=tile.depth,
            HALVES=halves(tile.rows, min(tile.cols, tile.depth), 0, tile.warps, x.dtype, mode, target),
            EVEN_M=rows % tile.rows == 0,
            SPLIT=parts > 1,
            HAS_ALIVE=index.alive is not None,
            PRECISION=mode,
            **constants,
        )
        if parts > 1:
            size = dvalues.numel()
            options = {"PARTS": parts, "HAS_ALIVE": index.alive is not None, "EVEN": size % 1024 == 0, "BLOCK": 1024}
            launch(add_parts_kernel, triton.cdiv(size, 1024), (sums, dvalues, index.alive_bytes, size), None, **options)

    table = wgrad_tile(rows, (r, c), x.dtype, mode, target)
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
