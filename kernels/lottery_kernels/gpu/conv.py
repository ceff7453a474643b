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
from .geometry import Geometry, check_groups, pair
from .launch import Index, Lines, check, launch_product
from .settings import Target, channels_last
from .tiles import add_product, any_empty, entry_of, grouped_tile, pixel_offsets, row_offsets, store_tile


@triton.jit
def pixels(
    first,
    o_m,
    M,
    i_phase,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BM: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    EVEN_M: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Of pixels first + o_m of a phase, in images of PH × PW: their images, counted from that of `first`, where they
    lie in y, and where in x they look through tap (0, 0). Those behind the last look where the last does."""
    o_m = o_m if EVEN_M else tl.minimum(o_m, M - 1 - first)
    if BM % PW == 0 and (BM % (PH * PW) == 0 or PH * PW % BM == 0):  # whole images, or whole rows of one
        i_image = o_m // (PH * PW)
        o_i = first % (PH * PW) // PW + o_m % (PH * PW) // PW
    else:
        o_m += first % (PH * PW)
        i_image = o_m // (PH * PW)
        o_i = o_m % (PH * PW) // PW
    o_j = o_m % PW
    if TRANSPOSED:
        phase_h = i_phase // STRIDE_W
        phase_w = i_phase % STRIDE_W
        x_h = o_i + (phase_h + PAD_H) // STRIDE_H
        x_w = o_j + (phase_w + PAD_W) // STRIDE_W
        return i_image, o_i * STRIDE_H + phase_h, o_j * STRIDE_W + phase_w, x_h, x_w
    else:
        return i_image, o_i, o_j, o_i * STRIDE_H - PAD_H, o_j * STRIDE_W - PAD_W


@triton.jit
def load_tap(p_tap, x_h, x_w, shift_h, shift_w, m_k, XH: tl.constexpr, XW: tl.constexpr, INSIDE: tl.constexpr):
    """x [BM, BK] at p_tap, where pixels (x_h, x_w) look when they are shifted by a tap, zero outside of the image. m_k
    masks channels, None: none. INSIDE: no tap points outside."""
    if INSIDE:
        return tl.load(p_tap, mask=m_k, other=None if m_k is None else 0.0)
    else:  # a negative coordinate is a large unsigned one
        m_x = (((x_h + shift_h).to(tl.uint32) < XH) & ((x_w + shift_w).to(tl.uint32) < XW))[:, None]
        return tl.load(p_tap, mask=m_x if m_k is None else m_x & m_k, other=0.0)


@triton.jit(do_not_specialize=["tiles", "lines", "M"], do_not_specialize_on_alignment=["order_ptr"])
def conv2d_product_kernel(
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
    LINES: tl.constexpr,
    HALVES: tl.constexpr,
    EVEN_M: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y [n, YH, YW, GROUPS · N] from x [n, XH, XW, GROUPS · K]: the forward pass, or if TRANSPOSED dx (y) from dy (x).

    Entry i of a line lies at `block_ptr[i]` = tap · blocks along K + channel block; its values are at i, or if
    TRANSPOSED at `entry_ptr[i]`. Lines are block rows (columns if TRANSPOSED) within a group; begin_ptr has them once
    for every phase, and `line_ptr[i]` is the entry's. INSIDE: no tap ever points outside of x.

    A program walks the entries of LINES lines of a phase in one loop; with LINES > 1 there is one group. HALVES is
    explained in `settings.halves`.
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
    IMAGES: tl.constexpr = BM // (PH * PW) + 2  # at most in a tile
    ROOM: tl.constexpr = BN < 64 or BM % PW == 0  # registers left: else ptxas spills for less
    HM: tl.constexpr = BM // 2 if HALVES == "rows" else BM
    HK: tl.constexpr = BK // 2 if HALVES == "depth" else BK
    per_phase = tiles * tl.cdiv(lines, LINES) * PER_LINE
    i_phase = tl.program_id(0) // per_phase if PHASES else 0
    i_m, i_n = grouped_tile(tl.program_id(0) - i_phase * per_phase, tiles, tl.cdiv(lines, LINES) * PER_LINE, GROUP)
    first_line = tl.load(order_ptr + i_n // PER_LINE) * LINES
    last_line = tl.minimum(first_line + LINES, lines)
    begin_ptr += i_phase * lines
    begin = tl.load(begin_ptr + first_line)
    end = tl.load(begin_ptr + last_line)
    i_group = first_line // BLOCKS_N if GROUPS > 1 else 0
    first_n = i_n % PER_LINE * BN  # within a line
    o_n = tl.arange(0, BN)
    o_m = tl.arange(0, HM)
    first = i_m * BM
    i_image, y_h, y_w, x_h, x_w = pixels(
        first, o_m, M, i_phase, PH, PW, BM, STRIDE_H, STRIDE_W, PAD_H, PAD_W, EVEN_M, TRANSPOSED
    )
    i_image1, y_h1, y_w1, x_h1, x_w1 = pixels(
        first, HM + o_m, M, i_phase, PH, PW, BM, STRIDE_H, STRIDE_W, PAD_H, PAD_W, EVEN_M, TRANSPOSED
    )
    if EVEN_M and HM % (PH * PW) == 0:  # the same pixels of later images, said so that masks are computed once
        y_h1, y_w1, x_h1, x_w1 = y_h, y_w, x_h, x_w
    first_image = (first // (PH * PW)).to(tl.int64)
    m_y = o_m < M - first
    m_y1 = HM + o_m < M - first
    if PHASES:
        y_ptr += first_image * (YH * YW * GROUPS * N)
        o_y = pixel_offsets(i_image, y_h, y_w, IMAGES, YH, YH * YW * GROUPS * N, YW * GROUPS * N, GROUPS * N)
        o_y1 = pixel_offsets(i_image1, y_h1, y_w1, IMAGES, YH, YH * YW * GROUPS * N, YW * GROUPS * N, GROUPS * N)
        m_y = m_y & (y_h < YH) & (y_w < YW)
        m_y1 = m_y1 & (y_h1 < YH) & (y_w1 < YW)
    else:  # the rows of the product are the pixels of y in their order
        y_ptr += first.to(tl.int64) * (GROUPS * N)
        o_y = row_offsets(o_m, GROUPS * N)
        o_y1 = row_offsets(HM + o_m, GROUPS * N)
    at = (o_y, m_y, o_y1, m_y1)
    b_y = tl.zeros((HM, BN), dtype=tl.float32)
    b_y1 = b_y  # the other half of the rows
    # Nothing to read and nothing to add up. Without room each line is looked at, as ptxas would spill.
    if any_empty(begin_ptr, first_line, lines, begin, end, LINES) if ROOM else True:
        for line in range(first_line, last_line):
            if tl.load(begin_ptr + line) == tl.load(begin_ptr + line + 1):
                n = (line % BLOCKS_N if GROUPS > 1 else line) * BLOCK_N + first_n  # within the group
                n_y = i_group * N + n
                store_tile(y_ptr, bias_ptr, b_y, b_y1, n_y, N - n, o_n, at, FULL, EVEN_N, HAS_BIAS, False, HALVES)
    if begin == end:
        return

    o_k = tl.arange(0, HK)
    x_ptr += first_image * STRIDE_XN + i_group * K
    o_x = pixel_offsets(i_image, x_h, x_w, IMAGES, XH, STRIDE_XN, STRIDE_XH, STRIDE_XW)[:, None] + o_k[None, :]
    o_x1 = pixel_offsets(i_image1, x_h1, x_w1, IMAGES, XH, STRIDE_XN, STRIDE_XH, STRIDE_XW)[:, None] + o_k[None, :]
    values_ptr += first_n * STEP_N
    o_b = o_k[:, None] * STEP_K + o_n[None, :] * STEP_N
    first_step = begin * PER_BLOCK
    last_step = end * PER_BLOCK
    tl.assume(first_step < last_step)
    i_block = tl.load(block_ptr + begin)
    i_entry = tl.load(entry_ptr + begin) if TRANSPOSED else begin
    line = tl.load(line_ptr + begin) if LINES > 1 else first_line
    line_end = tl.load(begin_ptr + line + 1) * PER_BLOCK  # the step behind it
    for i in range(first_step, last_step):
        inner = (i & (PER_BLOCK - 1)) * BK
        if ROOM:  # without a sign divisions take fewer instructions
            i_block = i_block.to(tl.uint32)
        tap_h = (i_block // (BLOCKS_K * KW)).to(tl.int32)
        tap_w = (i_block // BLOCKS_K % KW).to(tl.int32)
        outer = (i_block % BLOCKS_K).to(tl.int32) * BLOCK_K + inner
        if TRANSPOSED:
            shift_h = -(tap_h * DILATION_H // STRIDE_H)
            shift_w = -(tap_w * DILATION_W // STRIDE_W)
        else:
            shift_h = tap_h * DILATION_H
            shift_w = tap_w * DILATION_W
        p_x = x_ptr + (tl.cast(shift_h, tl.int64) * STRIDE_XH + (shift_w * STRIDE_XW + outer))
        p_b = values_ptr + (tl.cast(i_entry, tl.int64) * (BLOCK_K * BLOCK_N) + inner * STEP_K)
        m_k = (outer + o_k < K)[None, :] if TAIL_K else None
        b_x = load_tap(p_x + o_x, x_h, x_w, shift_h, shift_w, m_k, XH, XW, INSIDE)  # [HM, HK]
        b_b = tl.load(p_b + o_b)  # [HK, BN]
        if HALVES == "depth":
            m_k1 = (outer + HK + o_k < K)[None, :] if TAIL_K else None
            b_x1 = load_tap(p_x + HK + o_x, x_h, x_w, shift_h, shift_w, m_k1, XH, XW, INSIDE)
            b_b1 = tl.load(p_b + HK * STEP_K + o_b)
        if HALVES == "rows":
            b_x1 = load_tap(p_x + o_x1, x_h1, x_w1, shift_h, shift_w, m_k, XH, XW, INSIDE)
        entry = entry_of(tl.minimum(i + 1, last_step - 1), PER_BLOCK)
        i_block = tl.load(block_ptr + entry)
        i_entry = tl.load(entry_ptr + entry) if TRANSPOSED else entry
        if LINES > 1:  # noqa: SIM102
            if i == line_end:
                n = line * BLOCK_N + first_n
                store_tile(y_ptr, bias_ptr, b_y, b_y1, n, N - n, o_n, at, FULL, EVEN_N, HAS_BIAS, False, HALVES)
                b_y = tl.zeros((HM, BN), dtype=tl.float32)
                b_y1 = b_y
                line = tl.load(line_ptr + entry_of(i, PER_BLOCK))
                line_end = tl.load(begin_ptr + line + 1) * PER_BLOCK
        b_y = add_product(b_x, b_b, b_y, PRECISION)
        if HALVES == "depth":
            b_y = add_product(b_x1, b_b1, b_y, PRECISION)
        if HALVES == "rows":
            b_y1 = add_product(b_x1, b_b, b_y1, PRECISION)
    n = (line % BLOCKS_N if GROUPS > 1 else line) * BLOCK_N + first_n
    store_tile(y_ptr, bias_ptr, b_y, b_y1, i_group * N + n, N - n, o_n, at, FULL, EVEN_N, HAS_BIAS, False, HALVES)


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
    check_groups(pattern, groups)
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
    check_groups(pattern, groups)
    rest = (pattern.weight_shape, x_shape, stride, padding, dilation, groups)
    return transposed_product(dy, values, pattern.scheduled_index, *rest)


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
        lines = Lines(arrays.row_ptr, arrays.col, None, arrays.row, arrays.row_order)
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
    x = channels_last(x)
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
        groups,
        INSIDE=not any(geometry.padding) and (pointwise or not transposed),
        **geometry.constants(y, x, weight_shape, groups),
    )


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
