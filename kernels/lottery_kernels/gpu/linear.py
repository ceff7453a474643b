"""Block-sparse linear layers on a GPU: kernels, then their launchers.

Activations are row-major. Forward and dgrad are one kernel: a program walks the live blocks of a few block rows (dgrad:
block columns, through the transposed index, so that values are never copied). wgrad computes live blocks only; where
they are few the batch is cut into parts, whose partial sums a second kernel adds in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..pattern import Pattern, alive_only
from .launch import Index, Lines, check, launch_product, launch_wgrad
from .settings import Target, row_major
from .tiles import (
    add_product,
    any_empty,
    entry_of,
    grouped_tile,
    load_rows,
    rounded,
    row_offsets,
    store_block,
    store_tile,
    sum_entries,
)


@triton.jit(do_not_specialize=["tiles", "lines", "M"], do_not_specialize_on_alignment=["order_ptr"])
def linear_product_kernel(
    x_ptr,
    values_ptr,
    bias_ptr,
    y_ptr,
    begin_ptr,
    block_ptr,
    entry_ptr,
    line_ptr,
    order_ptr,
    tiles,
    lines,
    M,
    K: tl.constexpr,
    N: tl.constexpr,
    STRIDE_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP_K: tl.constexpr,
    STEP_N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    LINES: tl.constexpr,
    HALVES: tl.constexpr,
    EVEN_M: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y [M, N] = x [M, K] · B + bias, where line n of B has entries i from `begin_ptr[n]` to `begin_ptr[n + 1]`: blocks
    `[BLOCK_K, BLOCK_N]` at block row `block_ptr[i]`, their values at `entry_ptr[i]` if TRANSPOSED, else at i, with
    strides STEP_K and STEP_N; `line_ptr[i]` is n. Rows of x are STRIDE_X apart, y is contiguous.

    A program walks the entries of LINES lines in one loop; HALVES is explained in `settings.halves`."""
    PER_BLOCK: tl.constexpr = BLOCK_K // BK  # steps that a block takes
    PER_LINE: tl.constexpr = BLOCK_N // BN
    EVEN_N: tl.constexpr = N % BLOCK_N == 0
    TAIL_K: tl.constexpr = K % BLOCK_K != 0
    OTHER: tl.constexpr = 0.0 if TAIL_K else None
    HM: tl.constexpr = BM // 2 if HALVES == "rows" else BM
    HK: tl.constexpr = BK // 2 if HALVES == "depth" else BK
    STEPS: tl.constexpr = 2 if HALVES == "steps" else 1  # of a turn of the loop
    i_m, i_n = grouped_tile(tl.program_id(0), tiles, tl.cdiv(lines, LINES) * PER_LINE, GROUP)
    first_line = tl.load(order_ptr + i_n // PER_LINE) * LINES
    last_line = tl.minimum(first_line + LINES, lines)
    begin = tl.load(begin_ptr + first_line)
    end = tl.load(begin_ptr + last_line)
    first_n = i_n % PER_LINE * BN  # within a line
    first = i_m * BM
    rows = M - first
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, HK)
    y_ptr += first.to(tl.int64) * N
    # In 64 bits addresses of a thread's rows become one and constants added to it; 32 would be extended row by row.
    # In exact fp32 ptxas would spill.
    EXACT: tl.constexpr = PRECISION == "ieee" and x_ptr.dtype.element_ty == tl.float32
    o_m = tl.arange(0, HM).to(tl.int32 if EXACT else tl.int64)
    at = (row_offsets(o_m, N), o_m < rows, row_offsets(HM + o_m, N), HM + o_m < rows)
    b_y = tl.zeros((HM, BN), dtype=tl.float32)
    b_y1 = b_y  # the other half of the rows
    if any_empty(begin_ptr, first_line, lines, begin, end, LINES):  # nothing to read and nothing to add up
        for line in range(first_line, last_line):
            if tl.load(begin_ptr + line) == tl.load(begin_ptr + line + 1):
                n = line * BLOCK_N + first_n
                store_tile(y_ptr, bias_ptr, b_y, b_y1, n, N - n, o_n, at, EVEN_M, EVEN_N, HAS_BIAS, RELU, HALVES)
    if begin == end:
        return

    # Rows behind the last are read as the last and not written: that saves a mask in the loop.
    x_ptr += first.to(tl.int64) * STRIDE_X
    o_x = row_offsets(o_m if EVEN_M else tl.minimum(o_m, rows - 1), STRIDE_X)[:, None]
    o_x1 = row_offsets(HM + o_m if EVEN_M else tl.minimum(HM + o_m, rows - 1), STRIDE_X)[:, None]
    p_rows = x_ptr + (o_x + o_k[None, :]) if EXACT else x_ptr + o_k[None, :] + o_x  # [HM, HK]
    p_rows1 = x_ptr + o_k[None, :] + o_x1
    values_ptr += first_n * STEP_N
    o_b = o_k[:, None] * STEP_K + o_n[None, :] * STEP_N
    first_step = begin * PER_BLOCK
    last_step = end * PER_BLOCK
    line = tl.load(line_ptr + begin) if LINES > 1 else first_line
    line_end = tl.load(begin_ptr + line + 1) * PER_BLOCK  # the step behind it
    if STEPS == 1:
        tl.assume(first_step < last_step)
    elif (end - begin) * PER_BLOCK % 2 == 1:  # a first step alone
        outer = tl.load(block_ptr + begin) * BLOCK_K
        i_entry = tl.load(entry_ptr + begin) if TRANSPOSED else begin
        m_x = (outer + o_k < K)[None, :] if TAIL_K else None
        b_x = tl.load(p_rows + outer, mask=m_x, other=OTHER)
        b_b = tl.load(values_ptr + tl.cast(i_entry, tl.int64) * (BLOCK_K * BLOCK_N) + o_b)
        b_y = add_product(b_x, b_b, b_y, PRECISION)
        first_step += 1
    entry = begin if STEPS == 1 else entry_of(tl.minimum(first_step, last_step - 1), PER_BLOCK)
    i_block = tl.load(block_ptr + entry)
    i_entry = tl.load(entry_ptr + entry) if TRANSPOSED else entry
    if STEPS == 2:
        entry = entry_of(tl.minimum(first_step + 1, last_step - 1), PER_BLOCK)
        i_block1 = tl.load(block_ptr + entry)
        i_entry1 = tl.load(entry_ptr + entry) if TRANSPOSED else entry
    for i in range(first_step, last_step, STEPS):
        inner = (i & (PER_BLOCK - 1)) * BK
        outer = i_block * BLOCK_K + inner
        p_b = values_ptr + (tl.cast(i_entry, tl.int64) * (BLOCK_K * BLOCK_N) + inner * STEP_K)
        m_x = (outer + o_k < K)[None, :] if TAIL_K else None
        b_x = tl.load(p_rows + outer, mask=m_x, other=OTHER)  # [HM, HK]
        b_b = tl.load(p_b + o_b)  # [HK, BN]
        if HALVES == "depth":
            m_x1 = (outer + HK + o_k < K)[None, :] if TAIL_K else None
            b_x1 = tl.load(p_rows + (outer + HK), mask=m_x1, other=OTHER)
            b_b1 = tl.load(p_b + HK * STEP_K + o_b)
        if HALVES == "rows":
            b_x1 = tl.load(p_rows1 + outer, mask=m_x, other=OTHER)
        if HALVES == "steps":
            inner1 = ((i + 1) & (PER_BLOCK - 1)) * BK
            outer1 = i_block1 * BLOCK_K + inner1
            m_x1 = (outer1 + o_k < K)[None, :] if TAIL_K else None
            b_x1 = tl.load(p_rows + outer1, mask=m_x1, other=OTHER)
            if TRANSPOSED:
                p_b = values_ptr + (tl.cast(i_entry1, tl.int64) * (BLOCK_K * BLOCK_N) + inner1 * STEP_K)
            else:  # the next block, or the rest of this one
                p_b += BLOCK_K * BLOCK_N if PER_BLOCK == 1 else BK * STEP_K
            b_b1 = tl.load(p_b + o_b)
        following = tl.minimum(i + STEPS, last_step - STEPS)
        entry = entry_of(following, PER_BLOCK)
        i_block = tl.load(block_ptr + entry)
        i_entry = tl.load(entry_ptr + entry) if TRANSPOSED else entry
        if HALVES == "steps":
            entry = entry_of(following + 1, PER_BLOCK)
            i_block1 = tl.load(block_ptr + entry)
            i_entry1 = tl.load(entry_ptr + entry) if TRANSPOSED else entry
        if LINES > 1:  # noqa: SIM102
            if i == line_end:
                n = line * BLOCK_N + first_n
                store_tile(y_ptr, bias_ptr, b_y, b_y1, n, N - n, o_n, at, EVEN_M, EVEN_N, HAS_BIAS, RELU, HALVES)
                b_y = tl.zeros((HM, BN), dtype=tl.float32)
                b_y1 = b_y
                line = tl.load(line_ptr + entry_of(i, PER_BLOCK))
                line_end = tl.load(begin_ptr + line + 1) * PER_BLOCK
        b_y = add_product(b_x, b_b, b_y, PRECISION)
        if HALVES == "depth":
            b_y = add_product(b_x1, b_b1, b_y, PRECISION)
        if HALVES == "rows":
            b_y1 = add_product(b_x1, b_b, b_y1, PRECISION)
        if HALVES == "steps":
            if LINES > 1:  # noqa: SIM102
                if i + 1 == line_end:
                    n = line * BLOCK_N + first_n
                    store_tile(y_ptr, bias_ptr, b_y, b_y1, n, N - n, o_n, at, EVEN_M, EVEN_N, HAS_BIAS, RELU, HALVES)
                    b_y = tl.zeros((HM, BN), dtype=tl.float32)
                    line = tl.load(line_ptr + entry_of(i + 1, PER_BLOCK))
                    line_end = tl.load(begin_ptr + line + 1) * PER_BLOCK
            b_y = add_product(b_x1, b_b1, b_y, PRECISION)
    n = line * BLOCK_N + first_n
    store_tile(y_ptr, bias_ptr, b_y, b_y1, n, N - n, o_n, at, EVEN_M, EVEN_N, HAS_BIAS, RELU, HALVES)


@triton.jit
def sum_blocks(
    dy_ptr,
    x_ptr,
    out_ptr,
    row_ptr,
    col_ptr,
    alive_ptr,
    nnz,
    M,
    part,
    i_part,
    i_entry,
    first_r,
    first_c,
    layer: tl.constexpr,  # N, K, STRIDE_DY, STRIDE_X
    tile: tl.constexpr,  # R, C, BR, BC
    flags: tl.constexpr,  # HALVES, EVEN_M, SPLIT, HAS_ALIVE, PRECISION
    BM: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """A tile [BR, BC] of each of BLOCKS blocks from i_entry on, which are of one block row: one product."""
    N: tl.constexpr = layer[0]
    K: tl.constexpr = layer[1]
    STRIDE_DY: tl.constexpr = layer[2]
    STRIDE_X: tl.constexpr = layer[3]
    R: tl.constexpr = tile[0]
    C: tl.constexpr = tile[1]
    BR: tl.constexpr = tile[2]
    BC: tl.constexpr = tile[3]
    HALVES: tl.constexpr = flags[0]
    EVEN_M: tl.constexpr = flags[1]
    PRECISION: tl.constexpr = flags[4]
    TAIL_N: tl.constexpr = N % R != 0
    TAIL_K: tl.constexpr = K % C != 0
    HM: tl.constexpr = BM // 2 if HALVES == "depth" else BM
    o_r = first_r + tl.arange(0, BR)
    o_j = tl.arange(0, BLOCKS * BC) // BC  # which of the blocks
    o_c = first_c + tl.arange(0, BLOCKS * BC) % BC
    i_col = tl.load(col_ptr + i_entry)
    for j in tl.static_range(1, BLOCKS):
        i_col = tl.where(o_j == j, tl.load(col_ptr + i_entry + j), i_col)
    first_n = tl.load(row_ptr + i_entry) * R
    m_n = (first_n + o_r < N)[:, None]
    m_k = (i_col * C + o_c < K)[None, :]
    o_m = tl.arange(0, HM)
    first = i_part * part
    last = tl.minimum(first + part, M)
    # dy is read as its transpose: a tile that is transposed after it was loaded would not be copied asynchronously.
    p_dy = dy_ptr + first_n + o_r[:, None] + o_m.to(tl.int64)[None, :] * STRIDE_DY  # [BR, HM]
    p_x = (x_ptr + i_col * C + o_c)[None, :] + o_m.to(tl.int64)[:, None] * STRIDE_X  # [HM, BLOCKS · BC]
    p_dy1 = dy_ptr + first_n + o_r[:, None] + (HM + o_m).to(tl.int64)[None, :] * STRIDE_DY
    p_x1 = (x_ptr + i_col * C + o_c)[None, :] + (HM + o_m).to(tl.int64)[:, None] * STRIDE_X
    b_dw = tl.zeros((BR, BLOCKS * BC), dtype=tl.float32)
    for m in range(first, last, BM):
        m_m = m + o_m < last
        i_m = tl.cast(m, tl.int64)
        b_dy = load_rows(p_dy + i_m * STRIDE_DY, m_n, m_m[None, :], TAIL_N, EVEN_M)
        b_x = load_rows(p_x + i_m * STRIDE_X, m_k, m_m[:, None], TAIL_K, EVEN_M)
        if HALVES == "depth":
            m_m1 = m + HM + o_m < last
            b_dy1 = load_rows(p_dy1 + i_m * STRIDE_DY, m_n, m_m1[None, :], TAIL_N, EVEN_M)
            b_x1 = load_rows(p_x1 + i_m * STRIDE_X, m_k, m_m1[:, None], TAIL_K, EVEN_M)
        b_dw = add_product(rounded(b_dy, PRECISION), b_x, b_dw, PRECISION)
        if HALVES == "depth":
            b_dw = add_product(rounded(b_dy1, PRECISION), b_x1, b_dw, PRECISION)
    o_out = o_r[:, None] * C + (o_j * (R * C) + o_c)[None, :]
    store_block(out_ptr, alive_ptr, b_dw, o_out, i_entry, i_part, nnz, R * C, flags[2], flags[3])


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
    part,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE_DY: tl.constexpr,
    STRIDE_X: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    MORE: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BLOCKS: tl.constexpr,
    HALVES: tl.constexpr,
    EVEN_M: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_ALIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dvalues [nnz, R, C] = dyᵀ x at the live blocks; with SPLIT, partial sums [parts, nnz, R, C] of `part` rows. A
    program's share is that of `sum_entries`."""
    tensors = (dy_ptr, x_ptr, out_ptr, row_ptr, col_ptr, alive_ptr, nnz, M, part)
    layer: tl.constexpr = (N, K, STRIDE_DY, STRIDE_X)
    tile: tl.constexpr = (R, C, BR, BC)
    flags: tl.constexpr = (HALVES, EVEN_M, SPLIT, HAS_ALIVE, PRECISION)
    sum_entries(sum_blocks, tensors, layer, tile, flags, BM, MORE, BLOCKS)


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
    y = x.new_empty(x.shape[0], weight_shape[0])
    lines = Lines(arrays.row_ptr, arrays.col, None, arrays.row, arrays.row_order)
    _product(x, alive_only(values, index), bias, y, lines, relu, target)
    return y


def transposed_product(dy: Tensor, values: Tensor, index: Sequence[Tensor], weight_shape: Sequence[int]) -> Tensor:
    """`linear_dgrad` on the arrays of a pattern."""
    arrays = Index.of(index)
    target = check(values, arrays, 2, dy=(dy, weight_shape[0]))
    dx = dy.new_empty(dy.shape[0], weight_shape[1])
    lines = Lines(arrays.t_ptr, arrays.t_row, arrays.t_index, arrays.column, arrays.column_order)
    _product(dy, alive_only(values, index), None, dx, lines, False, target)
    return dx


def _product(
    x: Tensor, values: Tensor, bias: Tensor | None, y: Tensor, lines: Lines, relu: bool, target: Target
) -> None:
    if y.numel() == 0:
        return
    x = row_major(x)
    constants = {"K": x.shape[1], "N": y.shape[1], "STRIDE_X": x.stride(0), "RELU": relu}
    launch_product(linear_product_kernel, (x, values, bias, y), lines, x.shape[0], "matmul", target, **constants)


def block_gradient(
    dy: Tensor, x: Tensor, index: Sequence[Tensor], weight_shape: Sequence[int], block: Sequence[int]
) -> Tensor:
    """`linear_wgrad` on the arrays of a pattern."""
    arrays = Index.of(index)
    out, width = weight_shape[:2]
    dvalues = x.new_empty(arrays.nnz, *block)
    target = check(dvalues, arrays, 2, dy=(dy, out), x=(x, width))
    if arrays.nnz == 0:
        return dvalues
    dy, x = row_major(dy), row_major(x)
    constants: dict[str, Any] = {"N": out, "K": width, "STRIDE_DY": dy.stride(0), "STRIDE_X": x.stride(0)}
    launch_wgrad(linear_wgrad_kernel, dy, x, dvalues, arrays, x.shape[0], "matmul", target, **constants)
    return dvalues
