"""Block-sparse 2-D convolutions on a GPU as implicit matrix products: kernels, then their launchers.

Images are channels_last, so a pixel's channels are contiguous: `[N, H, W, channels]` in memory. The result's pixels
are the rows of a matrix; a program computes a tile of them for one block row and walks its live entries, each a
(tap, channel block), reading the source pixel that the tap points to, or zero outside the image.

dgrad is the same walk over the transposed index. With a stride, neighbouring pixels of dx see different taps: those
with the same offset within the stride form a phase, and each phase walks only the entries whose tap it sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pattern import Grid, Pattern, alive_only
from .geometry import Geometry, pair
from .launch import (
    Index,
    Lines,
    check,
    grouped_tile,
    launch_product,
    launch_wgrad,
    row_offsets,
    store_block,
    store_tile,
)
from .settings import Target


@triton.jit
def pixel_offsets(
    i_image, h, w, H: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr
):
    """Where pixels (h, w) of images with H rows lie, within an image in 32 bits where they hold it."""
    h = h if H * STRIDE_H < 2**30 else h.to(tl.int64)
    return i_image.to(tl.int64) * STRIDE_N + (h * STRIDE_H + w * STRIDE_W)


@triton.jit(do_not_specialize=["tiles", "lines", "M"])
def conv2d_product_kernel(
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
    M,  # result pixels of a phase, n · PH · PW
    YH: tl.constexpr,
    YW: tl.constexpr,
    XH: tl.constexpr,
    XW: tl.constexpr,
    STRIDE_XN: tl.constexpr,
    STRIDE_XH: tl.constexpr,
    STRIDE_XW: tl.constexpr,
    K: tl.constexpr,  # channels of x in a group
    N: tl.constexpr,  # channels of y in a group
    GROUPS: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    INSIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP_K: tl.constexpr,
    STEP_N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_M: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y [n, YH, YW, GROUPS · N] from x [n, XH, XW, GROUPS · K]: the forward pass, or if TRANSPOSED dx (y) from dy (x).

    Entry i of a line lies at `block_ptr[i]` = tap · blocks along K + channel block; its values are at i, or if
    TRANSPOSED at `entry_ptr[i]`. Lines are block rows (columns if TRANSPOSED) within a group; begin_ptr has them once
    for every phase. INSIDE: no tap ever points outside of x.
    """
    PER_BLOCK: tl.constexpr = BLOCK_K // BK
    PER_LINE: tl.constexpr = BLOCK_N // BN
    BLOCKS_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    BLOCKS_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    TAIL_K: tl.constexpr = K % BLOCK_K != 0
    EVEN_N: tl.constexpr = N % BLOCK_N == 0
    PHASES: tl.constexpr = TRANSPOSED and STRIDE_H * STRIDE_W > 1
    PH: tl.constexpr = (YH + STRIDE_H - 1) // STRIDE_H if PHASES else YH
    PW: tl.constexpr = (YW + STRIDE_W - 1) // STRIDE_W if PHASES else YW
    FULL: tl.constexpr = EVEN_M and PH * PW * (STRIDE_H * STRIDE_W if PHASES else 1) == YH * YW
    per_phase = tiles * lines * PER_LINE
    i_phase = tl.program_id(0) // per_phase if PHASES else 0
    i_m, i_n = grouped_tile(tl.program_id(0) - i_phase * per_phase, tiles, lines * PER_LINE, GROUP)
    i_line = tl.load(order_ptr + i_n // PER_LINE)
    begin = tl.load(begin_ptr + i_phase * lines + i_line)
    end = tl.load(begin_ptr + i_phase * lines + i_line + 1)
    i_group = i_line // BLOCKS_N
    o_n = i_n % PER_LINE * BN + tl.arange(0, BN)  # within the line
    o_channel = i_line % BLOCKS_N * BLOCK_N + o_n  # within the group
    m_n = o_channel < N
    o_channel += i_group * N
    o_m = i_m * BM + tl.arange(0, BM)

    # Pixel (n, i, j) of the phase is (y_h, y_w) in y and sees x at (x_h, x_w) through tap (0, 0).
    o_pixel = o_m if EVEN_M else tl.minimum(o_m, M - 1)
    i_image = o_pixel // (PH * PW)
    o_i = o_pixel % (PH * PW) // PW
    o_j = o_pixel % PW
    if TRANSPOSED:
        phase_h = i_phase // STRIDE_W
        phase_w = i_phase % STRIDE_W
        y_h = o_i * STRIDE_H + phase_h
        y_w = o_j * STRIDE_W + phase_w
        x_h = o_i + (phase_h + PAD_H) // STRIDE_H
        x_w = o_j + (phase_w + PAD_W) // STRIDE_W
    else:
        y_h = o_i
        y_w = o_j
        x_h = o_i * STRIDE_H - PAD_H
        x_w = o_j * STRIDE_W - PAD_W
    if PHASES:
        m_y = (o_m < M) & (y_h < YH) & (y_w < YW)
        o_y = pixel_offsets(i_image, y_h, y_w, YH, YH * YW * GROUPS * N, YW * GROUPS * N, GROUPS * N)
    else:  # the rows of the product are the pixels of y in their order
        m_y = o_m < M
        y_ptr += (i_m * BM).to(tl.int64) * (GROUPS * N)
        o_y = row_offsets(tl.arange(0, BM), GROUPS * N)
    b_y = tl.zeros((BM, BN), dtype=tl.float32)
    if begin == end:  # nothing to read and nothing to add up
        store_tile(y_ptr, bias_ptr, b_y, o_y, o_channel, m_y, m_n, FULL, EVEN_N, HAS_BIAS, False)
        return

    o_k = tl.arange(0, BK)
    p_x = (
        x_ptr
        + (pixel_offsets(i_image, x_h, x_w, XH, STRIDE_XN, STRIDE_XH, STRIDE_XW) + i_group * K)[:, None]
        + o_k[None, :]
    )
    p_b = values_ptr + (o_k[:, None] * STEP_K + o_n[None, :] * STEP_N)
    first_step = begin * PER_BLOCK
    last_step = end * PER_BLOCK
    tl.assume(first_step < last_step)
    i_block = tl.load(block_ptr + begin)
    i_entry = tl.load(entry_ptr + begin) if TRANSPOSED else begin
    for i in range(first_step, last_step):
        inner = (i & (PER_BLOCK - 1)) * BK
        tap = i_block // BLOCKS_K
        outer = i_block % BLOCKS_K * BLOCK_K + inner
        if TRANSPOSED:
            shift_h = -(tap // KW * DILATION_H // STRIDE_H)
            shift_w = -(tap % KW * DILATION_W // STRIDE_W)
        else:
            shift_h = tap // KW * DILATION_H
            shift_w = tap % KW * DILATION_W
        p_tap = p_x + (tl.cast(shift_h, tl.int64) * STRIDE_XH + (shift_w * STRIDE_XW + outer))
        # A negative coordinate is a large unsigned one.
        m_x = ((x_h + shift_h).to(tl.uint32) < XH) & ((x_w + shift_w).to(tl.uint32) < XW)
        m_k = (outer + o_k < K)[None, :]
        if INSIDE:
            b_x = tl.load(p_tap, mask=m_k, other=0.0) if TAIL_K else tl.load(p_tap)  # [BM, BK]
        else:
            b_x = tl.load(p_tap, mask=m_x[:, None] & m_k if TAIL_K else m_x[:, None], other=0.0)
        b_b = tl.load(p_b + (tl.cast(i_entry, tl.int64) * (BLOCK_K * BLOCK_N) + inner * STEP_K))  # [BK, BN]
        following = tl.minimum(i + 1, last_step - 1) // PER_BLOCK
        i_block = tl.load(block_ptr + following)
        i_entry = tl.load(entry_ptr + following) if TRANSPOSED else following
        b_y = tl.dot(b_x, b_b, b_y, input_precision=PRECISION)
    store_tile(y_ptr, bias_ptr, b_y, o_y, o_channel, m_y, m_n, FULL, EVEN_N, HAS_BIAS, False)


@triton.jit(do_not_specialize=["nnz", "M", "part"])
def conv2d_wgrad_kernel(
    dy_ptr,
    x_ptr,
    out_ptr,
    row_ptr,
    col_ptr,
    alive_ptr,
    nnz,
    M,  # pixels of dy
    part,
    YH: tl.constexpr,
    YW: tl.constexpr,
    XH: tl.constexpr,
    XW: tl.constexpr,
    STRIDE_XN: tl.constexpr,
    STRIDE_XH: tl.constexpr,
    STRIDE_XW: tl.constexpr,
    K: tl.constexpr,  # channels of x in a group
    N: tl.constexpr,  # channels of dy in a group
    GROUPS: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    INSIDE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    EVEN_M: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_ALIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dvalues [nnz, R, C], the sum over dy's pixels at the live blocks; with SPLIT, [parts, nnz, R, C] of `part` pixels
    each. dy is [n, YH, YW, GROUPS · N], contiguous, x is [n, XH, XW, GROUPS · K]."""
    TILES_C: tl.constexpr = C // BC
    TILES: tl.constexpr = R // BR * TILES_C
    BLOCKS_N: tl.constexpr = (N + R - 1) // R
    BLOCKS_K: tl.constexpr = (K + C - 1) // C
    TAIL_N: tl.constexpr = N % R != 0
    TAIL_K: tl.constexpr = K % C != 0
    PIXELS: tl.constexpr = YH * YW
    ALIGNED: tl.constexpr = BM % YW == 0 and (BM % PIXELS == 0 or PIXELS % BM == 0)
    pid = tl.program_id(0)
    i_part = pid // (nnz * TILES)
    i_entry = pid % (nnz * TILES) // TILES
    tile = pid % TILES
    o_r = tile // TILES_C * BR + tl.arange(0, BR)
    o_c = tile % TILES_C * BC + tl.arange(0, BC)
    i_row = tl.load(row_ptr + i_entry)
    i_col = tl.load(col_ptr + i_entry)
    i_group = i_row // BLOCKS_N
    o_n = i_row % BLOCKS_N * R + o_r  # within the group
    o_k = i_col % BLOCKS_K * C + o_c
    tap = i_col // BLOCKS_K
    shift_h = tap // KW * DILATION_H - PAD_H
    shift_w = tap % KW * DILATION_W - PAD_W
    first = i_part * part
    last = tl.minimum(first + part, M)
    o_step = tl.arange(0, BM)
    o_rows = row_offsets(o_step, GROUPS * N)
    # dy is read as its transpose: a tile that is transposed after it was loaded would not be copied asynchronously.
    p_dy = dy_ptr + first.to(tl.int64) * (GROUPS * N) + (o_rows[None, :] + (i_group * N + o_n)[:, None])
    p_x = x_ptr + (i_group * K + o_k)[None, :]
    m_n = (o_n < N)[:, None]
    m_k = (o_k < K)[None, :]
    b_dw = tl.zeros((BR, BC), dtype=tl.float32)
    for m in range(first, last, BM):
        o_m = m + o_step
        # A step of whole images, or of whole rows of one, has the same pixels every time, from another one on.
        o_pixel = o_step if ALIGNED else o_m
        begin_image = m // PIXELS if ALIGNED else 0
        begin_h = (m % PIXELS // YW if ALIGNED else 0) * STRIDE_H + shift_h
        o_h = o_pixel % PIXELS // YW * STRIDE_H
        o_w = o_pixel % YW * STRIDE_W
        o_x = pixel_offsets(o_pixel // PIXELS, o_h, o_w, XH, STRIDE_XN, STRIDE_XH, STRIDE_XW)
        begin_x = tl.cast(begin_image, tl.int64) * STRIDE_XN + tl.cast(begin_h, tl.int64) * STRIDE_XH
        p_pixel = p_x + o_x[:, None] + (begin_x + shift_w * STRIDE_XW)
        # A negative coordinate is a large unsigned one.
        m_x = ((o_h + begin_h).to(tl.uint32) < XH) & ((o_w + shift_w).to(tl.uint32) < XW)
        if EVEN_M:
            b_dy = tl.load(p_dy, mask=m_n, other=0.0) if TAIL_N else tl.load(p_dy)  # [BR, BM]
        else:
            b_dy = tl.load(p_dy, mask=m_n & (o_m < last)[None, :], other=0.0)
            m_x = m_x & (o_m < last)
        if EVEN_M and INSIDE:
            b_x = tl.load(p_pixel, mask=m_k, other=0.0) if TAIL_K else tl.load(p_pixel)  # [BM, BC]
        else:
            b_x = tl.load(p_pixel, mask=m_x[:, None] & m_k if TAIL_K else m_x[:, None], other=0.0)
        b_dw = tl.dot(b_dy, b_x, b_dw, input_precision=PRECISION)
        p_dy += BM * GROUPS * N
    o_out = tl.cast(i_entry, tl.int64) * (R * C) + o_r[:, None] * C + o_c[None, :]
    store_block(out_ptr, alive_ptr, b_dw, o_out, i_part, nnz, R * C, SPLIT, HAS_ALIVE)


# Launchers


def conv2d(
    x: Tensor,
    values: Tensor,
    pattern: Pattern,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """y = x ∗ W + bias: `[N, in, H, W] -> [N, out, OH, OW]`, channels_last."""
    _check_groups(pattern, groups)
    rest = (pattern.weight_shape, stride, padding, dilation, groups)
    return product(x, values, bias, pattern.scheduled_index, *rest)


def conv2d_dgrad(
    dy: Tensor,
    values: Tensor,
    pattern: Pattern,
    x_shape: Sequence[int],
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Gradient of `conv2d` in x: `[N, out, OH, OW] -> [N, in, H, W]`, channels_last."""
    _check_groups(pattern, groups)
    rest = (pattern.weight_shape, x_shape, stride, padding, dilation, groups)
    return transposed_product(dy, values, pattern.scheduled_index, *rest)


def conv2d_wgrad(
    dy: Tensor,
    x: Tensor,
    pattern: Pattern,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Gradient of `conv2d` in W at the live positions: `[nnz, r, c]`."""
    _check_groups(pattern, groups)
    rest = (pattern.weight_shape, pattern.block, stride, padding, dilation, groups)
    return block_gradient(dy, x, pattern.scheduled_index, *rest)


def product(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Sequence[Tensor],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`conv2d` on the arrays of a pattern."""
    arrays = Index.of(index)
    out, inputs = weight_shape[0], weight_shape[1] * groups
    target = check(values, arrays, 4, groups, x=(x, inputs), bias=(bias, out))
    geometry = Geometry.of(stride, padding, dilation)
    y = _empty(x, (x.shape[0], out, *geometry.output(x.shape[2:], weight_shape[2:])))
    if y.numel():
        lines = Lines(arrays.row_ptr, arrays.col, None, arrays.row_order)
        _product(x, alive_only(values, index), bias, y, lines, weight_shape, geometry, groups, target)
    return y


def transposed_product(
    dy: Tensor,
    values: Tensor,
    index: Sequence[Tensor],
    weight_shape: Sequence[int],
    x_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`conv2d_dgrad` on the arrays of a pattern."""
    arrays = Index.of(index)
    target = check(values, arrays, 4, groups, dy=(dy, weight_shape[0]))
    geometry = Geometry.of(stride, padding, dilation)
    geometry.check_output(dy, x_shape, weight_shape)
    dx = _empty(dy, x_shape)
    if dx.numel():
        lines = geometry.lines_by_phase(arrays, weight_shape, Grid.of(weight_shape, pair(values.shape[1:]), groups))
        _product(dy, alive_only(values, index), None, dx, lines, weight_shape, geometry, groups, target)
    return dx


def _product(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    y: Tensor,
    lines: Lines,
    weight_shape: Sequence[int],
    geometry: Geometry,
    groups: int,
    target: Target,
) -> None:
    x = _channels_last(x)
    transposed = lines.entry is not None
    phases = geometry.stride if transposed else (1, 1)
    pixels = y.shape[0] * math.prod(-(-y.shape[2 + i] // phases[i]) for i in (0, 1))
    pointwise = math.prod(weight_shape[2:]) == math.prod(geometry.stride) == 1
    launch_product(
        conv2d_product_kernel,
        (x, values, bias, y),
        lines,
        pixels,
        "conv",
        target,
        math.prod(phases),
        INSIDE=not any(geometry.padding) and (pointwise or not transposed),
        **geometry.constants(y, x, weight_shape, groups),
    )


def block_gradient(
    dy: Tensor,
    x: Tensor,
    index: Sequence[Tensor],
    weight_shape: Sequence[int],
    block: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`conv2d_wgrad` on the arrays of a pattern."""
    arrays = Index.of(index)
    dvalues = x.new_empty(arrays.nnz, *block)
    target = check(dvalues, arrays, 4, groups, dy=(dy, weight_shape[0]), x=(x, weight_shape[1] * groups))
    geometry = Geometry.of(stride, padding, dilation)
    geometry.check_output(dy, x.shape, weight_shape)
    if arrays.nnz == 0:
        return dvalues
    dy, x = dy.contiguous(memory_format=torch.channels_last), _channels_last(x)
    launch_wgrad(
        conv2d_wgrad_kernel,
        dy,
        x,
        dvalues,
        arrays,
        dy.shape[0] * dy.shape[2] * dy.shape[3],
        "conv",
        target,
        INSIDE=not any(geometry.padding),
        **geometry.constants(dy, x, weight_shape, groups),
    )
    return dvalues


def _check_groups(pattern: Pattern, groups: int) -> None:
    if groups != pattern.groups:
        raise ValueError(f"groups={groups}, but the pattern was made for {pattern.groups}")


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _channels_last(x: Tensor) -> Tensor:
    """`x` itself if a pixel's channels are contiguous, else a channels_last copy."""
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous(memory_format=torch.channels_last)
