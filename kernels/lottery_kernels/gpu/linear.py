"""Block-sparse linear layers on a GPU: kernels, then their launchers.

Activations are row-major. Forward and dgrad are one kernel: a program walks the live blocks of one block row (dgrad:
of one block column, through the transposed index, so that values are never copied). wgrad computes live blocks only;
where they are few the batch is cut into parts, whose partial sums a second kernel adds in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pattern import Pattern, alive_only
from .launch import Index, check, launch
from .settings import Target, precision, product_tile, row_major, wgrad_split, wgrad_tile


@triton.jit
def grouped_tile(pid, tiles, lines, GROUP: tl.constexpr):
    """Program number -> (activation tile, line), `GROUP` tiles at a time with the line changing slowest."""
    first = pid // (GROUP * lines) * GROUP
    size = tl.minimum(tiles - first, GROUP)
    within = pid % (GROUP * lines)
    return first + within % size, within // size


@triton.jit(do_not_specialize=["tiles", "lines", "M"])
def linear_product_kernel(
    x_ptr,
    values_ptr,
    bias_ptr,
    y_ptr,
    begin_ptr,
    block_ptr,
    entry_ptr,
    order_ptr,
    tiles,
    lines,
    M,
    K,
    N,
    stride_x,
    stride_y,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP_K: tl.constexpr,
    STEP_N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    TAIL_K: tl.constexpr,
    INDEXED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y [M, N] = x [M, K] · B + bias, where line n of B has entries i from `begin_ptr[n]` to `begin_ptr[n + 1]`: blocks
    `[BLOCK_K, BLOCK_N]` at block row `block_ptr[i]`, their values at `entry_ptr[i]` if INDEXED, else at i, with strides
    STEP_K and STEP_N."""
    PER_BLOCK: tl.constexpr = BLOCK_K // BK  # steps of the loop that a block takes
    PER_LINE: tl.constexpr = BLOCK_N // BN
    i_m, i_n = grouped_tile(tl.program_id(0), tiles, lines * PER_LINE, GROUP)
    i_line = tl.load(order_ptr + i_n // PER_LINE)
    o_n = i_n % PER_LINE * BN + tl.arange(0, BN)  # within the line
    o_m = i_m * BM + tl.arange(0, BM)
    o_k = tl.arange(0, BK)
    # Rows behind the last are read as the last and not written: that saves a mask in the loop.
    p_x = x_ptr + tl.minimum(o_m, M - 1).to(tl.int64)[:, None] * stride_x + o_k[None, :]
    p_b = values_ptr + o_k[:, None] * STEP_K + o_n[None, :] * STEP_N

    begin = tl.load(begin_ptr + i_line)
    end = tl.load(begin_ptr + i_line + 1)
    # The next index is loaded a step ahead: loaded in the step that needs it, it would cost the pipeline its depth.
    i_block = tl.load(block_ptr + begin, mask=begin < end, other=0)
    i_entry = tl.load(entry_ptr + begin, mask=begin < end, other=0) if INDEXED else begin
    b_y = tl.zeros((BM, BN), dtype=tl.float32)
    for i in range(begin * PER_BLOCK, end * PER_BLOCK):
        inner = i % PER_BLOCK * BK
        outer = i_block * BLOCK_K + inner
        m_x = (outer + o_k < K)[None, :] if TAIL_K else None
        b_x = tl.load(p_x + outer, mask=m_x, other=0.0 if TAIL_K else None)  # [BM, BK]
        b_b = tl.load(p_b + tl.cast(i_entry, tl.int64) * (BLOCK_K * BLOCK_N) + inner * STEP_K)  # [BK, BN]
        following = tl.minimum((i + 1) // PER_BLOCK, end - 1)
        i_block = tl.load(block_ptr + following)
        i_entry = tl.load(entry_ptr + following) if INDEXED else following
        b_y = tl.dot(b_x, b_b, b_y, input_precision=PRECISION)

    o_y = i_line * BLOCK_N + o_n
    m_y = (o_m < M)[:, None] & (o_y < N)[None, :]
    if HAS_BIAS:
        b_y += tl.load(bias_ptr + o_y, mask=o_y < N, other=0.0).to(tl.float32)[None, :]
    if RELU:
        b_y = tl.maximum(b_y, 0.0)
    p_y = y_ptr + o_m.to(tl.int64)[:, None] * stride_y + o_y[None, :]
    tl.store(p_y, b_y.to(y_ptr.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["nnz", "M", "part"])
def linear_wgrad_kernel(
    dy_ptr,
    x_ptr,
    out_ptr,
    row_ptr,
    col_ptr,
    alive_ptr,
    nnz,
    M,
    N,
    K,
    part,
    stride_dy,
    stride_x,
    R: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    SPLIT: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_ALIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dvalues [nnz, R, C] = dyᵀ x at the live blocks; with SPLIT, partial sums [parts, nnz, R, C] of `part` rows."""
    TILES_C: tl.constexpr = C // BC
    TILES: tl.constexpr = R // BR * TILES_C  # programs that share a block
    pid = tl.program_id(0)
    i_part = pid // (nnz * TILES)
    i_entry = pid % (nnz * TILES) // TILES
    tile = pid % TILES
    o_r = tile // TILES_C * BR + tl.arange(0, BR)
    o_c = tile % TILES_C * BC + tl.arange(0, BC)
    o_n = tl.load(row_ptr + i_entry) * R + o_r
    o_k = tl.load(col_ptr + i_entry) * C + o_c
    o_m = tl.arange(0, BM)
    first = i_part * part
    last = tl.minimum(first + part, M)
    p_dy = dy_ptr + (first + o_m).to(tl.int64)[:, None] * stride_dy + o_n[None, :]
    p_x = x_ptr + (first + o_m).to(tl.int64)[:, None] * stride_x + o_k[None, :]
    b_dw = tl.zeros((BR, BC), dtype=tl.float32)
    for m in range(first, last, BM):
        m_m = (m + o_m < last)[:, None]
        if TAIL:
            b_dy = tl.load(p_dy, mask=m_m & (o_n < N)[None, :], other=0.0)  # [BM, BR]
            b_x = tl.load(p_x, mask=m_m & (o_k < K)[None, :], other=0.0)  # [BM, BC]
        else:
            b_dy = tl.load(p_dy, mask=m_m, other=0.0)
            b_x = tl.load(p_x, mask=m_m, other=0.0)
        b_dw = tl.dot(tl.trans(b_dy), b_x, b_dw, input_precision=PRECISION)
        p_dy += BM * tl.cast(stride_dy, tl.int64)
        p_x += BM * tl.cast(stride_x, tl.int64)
    o_out = tl.cast(i_entry, tl.int64) * (R * C) + o_r[:, None] * C + o_c[None, :]
    if SPLIT:
        tl.store(out_ptr + tl.cast(i_part, tl.int64) * nnz * (R * C) + o_out, b_dw)
    else:
        if HAS_ALIVE:
            b_dw = tl.where(tl.load(alive_ptr + o_out) != 0, b_dw, 0.0)
        tl.store(out_ptr + o_out, b_dw.to(out_ptr.dtype.element_ty))


@triton.jit
def add_parts_kernel(
    parts_ptr, out_ptr, alive_ptr, size, PARTS: tl.constexpr, HAS_ALIVE: tl.constexpr, BLOCK: tl.constexpr
):
    """out [size] = the sum of parts [PARTS, size], first to last; zero where not alive."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    b = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(PARTS):
        b += tl.load(parts_ptr + tl.cast(i, tl.int64) * size + o, mask=m, other=0.0)
    if HAS_ALIVE:
        b = tl.where(tl.load(alive_ptr + o, mask=m, other=0) != 0, b, 0.0)
    tl.store(out_ptr + o, b.to(out_ptr.dtype.element_ty), mask=m)


# Launchers


def linear(x: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """y = x Wᵀ + bias, then ReLU if asked: `[N, in] -> [N, out]`, row-major."""
    return product(x, values, bias, pattern.scheduled_index, pattern.weight_shape, relu)


def linear_dgrad(dy: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """dx = dy W: `[N, out] -> [N, in]`, row-major."""
    return transposed_product(dy, values, pattern.scheduled_index, pattern.weight_shape)


def linear_wgrad(dy: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
    """dW = dyᵀ x at the live positions: `[nnz, r, c]`."""
    return block_gradient(dy, x, pattern.scheduled_index, pattern.weight_shape, pattern.block)


def product(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Sequence[Tensor],
    weight_shape: Sequence[int],
    relu: bool = False,
) -> Tensor:
    """`linear` on the arrays of a pattern."""
    arrays = Index.of(index)
    target = check(values, arrays, 2, x=(x, weight_shape[1]), bias=(bias, weight_shape[0]))
    r, c = values.shape[1:]
    y = x.new_empty(x.shape[0], weight_shape[0])
    lines = (arrays.row_ptr, arrays.col, None, arrays.row_order)
    _product(x, alive_only(values, index), bias, y, lines, (c, r, 1, c), relu, target)
    return y


def transposed_product(dy: Tensor, values: Tensor, index: Sequence[Tensor], weight_shape: Sequence[int]) -> Tensor:
    """`linear_dgrad` on the arrays of a pattern."""
    arrays = Index.of(index)
    target = check(values, arrays, 2, dy=(dy, weight_shape[0]))
    r, c = values.shape[1:]
    dx = dy.new_empty(dy.shape[0], weight_shape[1])
    lines = (arrays.t_ptr, arrays.t_row, arrays.t_index, arrays.column_order)
    _product(dy, alive_only(values, index), None, dx, lines, (r, c, c, 1), False, target)
    return dx


def _product(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    y: Tensor,
    lines: tuple[Tensor, Tensor, Tensor | None, Tensor],
    block: tuple[int, int, int, int],
    relu: bool,
    target: Target,
) -> None:
    if y.numel() == 0:
        return
    x, values = row_major(x), values.contiguous()
    depth, cols, step_k, step_n = block
    mode = precision(x.dtype, "matmul", target)
    tile = product_tile(x.shape[0], cols, depth, x.dtype, mode, target)
    tiles, order = triton.cdiv(x.shape[0], tile.rows), lines[3]
    launch(
        linear_product_kernel,
        tiles * order.shape[0] * (cols // tile.cols),
        (
            *(x, values, bias, y, *lines, tiles, order.shape[0]),
            *(x.shape[0], x.shape[1], y.shape[1], x.stride(0), y.stride(0)),
        ),
        tile,
        BLOCK_K=depth,
        BLOCK_N=cols,
        STEP_K=step_k,
        STEP_N=step_n,
        BM=tile.rows,
        BN=tile.cols,
        BK=tile.depth,
        GROUP=tile.group,
        TAIL_K=x.shape[1] % depth != 0,
        INDEXED=lines[2] is not None,
        HAS_BIAS=bias is not None,
        RELU=relu,
        PRECISION=mode,
    )


def block_gradient(
    dy: Tensor, x: Tensor, index: Sequence[Tensor], weight_shape: Sequence[int], block: Sequence[int]
) -> Tensor:
    """`linear_wgrad` on the arrays of a pattern."""
    arrays = Index.of(index)
    out, width = weight_shape[:2]
    r, c = block
    dvalues = x.new_empty(arrays.nnz, r, c)
    target = check(dvalues, arrays, 2, dy=(dy, out), x=(x, width))
    if arrays.nnz == 0:
        return dvalues
    dy, x = row_major(dy), row_major(x)
    mode = precision(x.dtype, "matmul", target)
    tile = wgrad_tile((r, c), x.dtype, mode, target)
    programs = arrays.nnz * (r // tile.cols) * (c // tile.depth)
    part, parts = wgrad_split(programs, x.shape[0], tile.rows, target)
    sums = dvalues if parts == 1 else torch.empty(parts, *dvalues.shape, dtype=torch.float32, device=x.device)
    launch(
        linear_wgrad_kernel,
        programs * parts,
        (
            *(dy, x, sums, arrays.row, arrays.col, arrays.alive_bytes, arrays.nnz),
            *(x.shape[0], out, width, part, dy.stride(0), x.stride(0)),
        ),
        tile,
        R=r,
        C=c,
        BM=tile.rows,
        BR=tile.cols,
        BC=tile.depth,
        SPLIT=parts > 1,
        TAIL=bool(out % r or width % c),
        HAS_ALIVE=arrays.alive is not None,
        PRECISION=mode,
    )
    if parts > 1:
        add_parts(sums, dvalues, arrays)
    return dvalues


def add_parts(sums: Tensor, dvalues: Tensor, arrays: Index) -> None:
    """dvalues `[nnz, r, c]` = sums `[parts, nnz, r, c]` added up, zero where not alive."""
    launch(
        add_parts_kernel,
        triton.cdiv(dvalues.numel(), 1024),
        (sums, dvalues, arrays.alive_bytes, dvalues.numel()),
        None,
        PARTS=sums.shape[0],
        HAS_ALIVE=arrays.alive is not None,
        BLOCK=1024,
    )
