"""Block-sparse 2-D convolutions on a GPU as implicit matrix products: kernels, then their launchers.

Images are channels_last, so a pixel's channels are contiguous: `[N, H, W, channels]` in memory. The result's pixels
are the rows of a matrix; a program computes a tile of them for one block row and walks its live entries, each a
(tap, channel block), reading the source pixel that the tap points to, or zero outside the image.

dgrad is the same walk over the transposed index. With a stride, neighbouring pixels of dx see different taps: those
with the same offset within the stride form a phase, and each phase walks only the entries whose tap it sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..pattern import Grid, Pattern, alive_only
from .launch import Index, check, launch
from .linear import add_parts, grouped_tile
from .settings import Target, precision, product_tile, wgrad_split, wgrad_tile


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
    M,  # result pixels of a phase, N · PH · PW
    PH,
    PW,
    YH,
    YW,
    XH,
    XW,
    stride_xn,
    stride_xh,
    stride_xw,
    K,  # channels of x in a group
    N,  # channels of y in a group
    groups,
    blocks_k,  # blocks along K
    blocks_n,  # blocks along N
    KW,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP_K: tl.constexpr,
    STEP_N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    DGRAD: tl.constexpr,
    TAIL_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y [n, YH, YW, groups · N] from x [n, XH, XW, groups · K]: the forward pass, or with DGRAD dx (y) from dy (x).

    Entry i of a line lies at `block_ptr[i]` = tap · blocks_k + channel block; its values are at i, or with DGRAD at
    `entry_ptr[i]`. Lines are block rows (DGRAD: columns) within a group; begin_ptr has them once for every phase.
    """
    PER_BLOCK: tl.constexpr = BLOCK_K // BK
    PER_LINE: tl.constexpr = BLOCK_N // BN
    per_phase = tiles * lines * PER_LINE
    i_phase = tl.program_id(0) // per_phase
    i_m, i_n = grouped_tile(tl.program_id(0) % per_phase, tiles, lines * PER_LINE, GROUP)
    i_line = tl.load(order_ptr + i_n // PER_LINE)
    i_group = i_line // blocks_n
    o_n = i_n % PER_LINE * BN + tl.arange(0, BN)  # within the line
    o_m = i_m * BM + tl.arange(0, BM)
    o_k = tl.arange(0, BK)

    # Pixel (n, i, j) of the phase is (y_h, y_w) in y and sees x at (x_h, x_w) through tap (0, 0).
    o_pixel = tl.minimum(o_m, M - 1)
    i_image = o_pixel // (PH * PW)
    o_i = o_pixel % (PH * PW) // PW
    o_j = o_pixel % PW
    if DGRAD:
        phase_h = i_phase // stride_w
        phase_w = i_phase % stride_w
        y_h = o_i * stride_h + phase_h
        y_w = o_j * stride_w + phase_w
        x_h = o_i + (phase_h + pad_h) // stride_h
        x_w = o_j + (phase_w + pad_w) // stride_w
    else:
        y_h = o_i
        y_w = o_j
        x_h = o_i * stride_h - pad_h
        x_w = o_j * stride_w - pad_w
    o_x = i_image.to(tl.int64) * stride_xn + x_h.to(tl.int64) * stride_xh + x_w.to(tl.int64) * stride_xw
    p_x = x_ptr + (o_x + i_group * K)[:, None] + o_k[None, :]
    p_b = values_ptr + o_k[:, None] * STEP_K + o_n[None, :] * STEP_N

    begin = tl.load(begin_ptr + i_phase * lines + i_line)
    end = tl.load(begin_ptr + i_phase * lines + i_line + 1)
    i_block = tl.load(block_ptr + begin, mask=begin < end, other=0)
    i_entry = tl.load(entry_ptr + begin, mask=begin < end, other=0) if DGRAD else begin
    b_y = tl.zeros((BM, BN), dtype=tl.float32)
    for i in range(begin * PER_BLOCK, end * PER_BLOCK):
        inner = i % PER_BLOCK * BK
        tap = i_block // blocks_k
        outer = i_block % blocks_k * BLOCK_K + inner
        if DGRAD:
            shift_h = -(tap // KW * dilation_h // stride_h)
            shift_w = -(tap % KW * dilation_w // stride_w)
        else:
            shift_h = tap // KW * dilation_h
            shift_w = tap % KW * dilation_w
        at_h = x_h + shift_h
        at_w = x_w + shift_w
        m_x = ((at_h >= 0) & (at_h < XH) & (at_w >= 0) & (at_w < XW))[:, None]
        if TAIL_K:
            m_x = m_x & (outer + o_k < K)[None, :]
        shift = tl.cast(shift_h, tl.int64) * stride_xh + tl.cast(shift_w, tl.int64) * stride_xw + outer
        b_x = tl.load(p_x + shift, mask=m_x, other=0.0)  # [BM, BK]
        b_b = tl.load(p_b + tl.cast(i_entry, tl.int64) * (BLOCK_K * BLOCK_N) + inner * STEP_K)  # [BK, BN]
        following = tl.minimum((i + 1) // PER_BLOCK, end - 1)
        i_block = tl.load(block_ptr + following)
        i_entry = tl.load(entry_ptr + following) if DGRAD else following
        b_y = tl.dot(b_x, b_b, b_y, input_precision=PRECISION)

    o_channel = i_line % blocks_n * BLOCK_N + o_n  # within the group
    m_channel = o_channel < N
    o_channel += i_group * N
    if HAS_BIAS:
        b_y += tl.load(bias_ptr + o_channel, mask=m_channel, other=0.0).to(tl.float32)[None, :]
    m_y = (o_m < M) & (y_h < YH) & (y_w < YW)
    o_y = ((i_image.to(tl.int64) * YH + y_h) * YW + y_w) * (groups * N)
    tl.store(
        y_ptr + o_y[:, None] + o_channel[None, :],
        b_y.to(y_ptr.dtype.element_ty),
        mask=m_y[:, None] & m_channel[None, :],
    )


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
    YH,
    YW,
    XH,
    XW,
    stride_xn,
    stride_xh,
    stride_xw,
    N,  # channels of dy in a group
    K,  # channels of x in a group
    groups,
    blocks_n,
    blocks_k,
    KW,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
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
    """dvalues [nnz, R, C], the sum over dy's pixels at the live blocks; with SPLIT, [parts, nnz, R, C] of `part` pixels
    each. dy is [n, YH, YW, groups · N], contiguous, x is [n, XH, XW, groups · K]."""
    TILES_C: tl.constexpr = C // BC
    TILES: tl.constexpr = R // BR * TILES_C
    pid = tl.program_id(0)
    i_part = pid // (nnz * TILES)
    i_entry = pid % (nnz * TILES) // TILES
    tile = pid % TILES
    o_r = tile // TILES_C * BR + tl.arange(0, BR)
    o_c = tile % TILES_C * BC + tl.arange(0, BC)
    i_row = tl.load(row_ptr + i_entry)
    i_col = tl.load(col_ptr + i_entry)
    i_group = i_row // blocks_n
    o_n = i_row % blocks_n * R + o_r  # within the group
    o_k = i_col % blocks_k * C + o_c
    tap = i_col // blocks_k
    shift_h = tap // KW * dilation_h - pad_h
    shift_w = tap % KW * dilation_w - pad_w
    first = i_part * part
    last = tl.minimum(first + part, M)
    b_dw = tl.zeros((BR, BC), dtype=tl.float32)
    for m in range(first, last, BM):
        o_m = m + tl.arange(0, BM)
        m_m = o_m < last
        at_h = o_m % (YH * YW) // YW * stride_h + shift_h
        at_w = o_m % YW * stride_w + shift_w
        o_x = (
            (o_m // (YH * YW)).to(tl.int64) * stride_xn + at_h.to(tl.int64) * stride_xh + at_w.to(tl.int64) * stride_xw
        )
        p_dy = dy_ptr + o_m.to(tl.int64)[:, None] * (groups * N) + (i_group * N + o_n)[None, :]
        p_x = x_ptr + o_x[:, None] + (i_group * K + o_k)[None, :]
        m_dy = m_m[:, None]
        m_x = (m_m & (at_h >= 0) & (at_h < XH) & (at_w >= 0) & (at_w < XW))[:, None]
        if TAIL:
            m_dy = m_dy & (o_n < N)[None, :]
            m_x = m_x & (o_k < K)[None, :]
        b_dy = tl.load(p_dy, mask=m_dy, other=0.0)  # [BM, BR]
        b_x = tl.load(p_x, mask=m_x, other=0.0)  # [BM, BC]
        b_dw = tl.dot(tl.trans(b_dy), b_x, b_dw, input_precision=PRECISION)
    o_out = tl.cast(i_entry, tl.int64) * (R * C) + o_r[:, None] * C + o_c[None, :]
    if SPLIT:
        tl.store(out_ptr + tl.cast(i_part, tl.int64) * nnz * (R * C) + o_out, b_dw)
    else:
        if HAS_ALIVE:
            b_dw = tl.where(tl.load(alive_ptr + o_out) != 0, b_dw, 0.0)
        tl.store(out_ptr + o_out, b_dw.to(out_ptr.dtype.element_ty))


# Launchers


class Geometry(NamedTuple):
    """Pairs (height, width)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def output(self, size: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """Height and width of the result of an image of `size`."""
        room = [size[i] + 2 * self.padding[i] - self.dilation[i] * (kernel[i] - 1) - 1 for i in (0, 1)]
        if min(room) < 0:
            raise ValueError(
                f"kernel {tuple(kernel)} with dilation {self.dilation} is larger than an image of {tuple(size)} with "
                f"padding {self.padding}"
            )
        return [room[i] // self.stride[i] + 1 for i in (0, 1)]


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
    geometry = Geometry(_pair(stride), _pair(padding), _pair(dilation))
    y = _empty(x, (x.shape[0], out, *geometry.output(x.shape[2:], weight_shape[2:])))
    if y.numel():
        lines = (arrays.row_ptr, arrays.col, None, arrays.row_order)
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
    geometry = Geometry(_pair(stride), _pair(padding), _pair(dilation))
    _check_output(dy, geometry.output(x_shape[2:], weight_shape[2:]))
    dx = _empty(dy, x_shape)
    if dx.numel():
        lines = _phases(arrays, weight_shape, geometry, Grid.of(weight_shape, _pair(values.shape[1:]), groups))
        _product(dy, alive_only(values, index), None, dx, lines, weight_shape, geometry, groups, target, dgrad=True)
    return dx


def _product(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    y: Tensor,
    lines: tuple[Tensor, Tensor, Tensor | None, Tensor],
    weight_shape: Sequence[int],
    geometry: Geometry,
    groups: int,
    target: Target,
    dgrad: bool = False,
) -> None:
    x, values = _channels_last(x), values.contiguous()
    r, c = values.shape[1:]
    depth, cols, step_k, step_n = (r, c, c, 1) if dgrad else (c, r, 1, c)
    features_x, features_y = x.shape[1] // groups, y.shape[1] // groups
    phases = geometry.stride if dgrad else (1, 1)
    height, width = (-(-y.shape[2 + i] // phases[i]) for i in (0, 1))
    pixels = y.shape[0] * height * width
    mode = precision(x.dtype, "conv", target)
    tile = product_tile(pixels, cols, depth, x.dtype, mode, target)
    tiles, order = triton.cdiv(pixels, tile.rows), lines[3]
    launch(
        conv2d_product_kernel,
        phases[0] * phases[1] * tiles * order.shape[0] * (cols // tile.cols),
        (
            *(x, values, bias, y, *lines, tiles, order.shape[0], pixels, height, width, *y.shape[2:], *x.shape[2:]),
            *(x.stride(0), x.stride(2), x.stride(3), features_x, features_y, groups),
            *(triton.cdiv(features_x, depth), triton.cdiv(features_y, cols), weight_shape[3]),
            *(*geometry.stride, *geometry.padding, *geometry.dilation),
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
        DGRAD=dgrad,
        TAIL_K=features_x % depth != 0,
        HAS_BIAS=bias is not None,
        PRECISION=mode,
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
    r, c = block
    dvalues = x.new_empty(arrays.nnz, r, c)
    target = check(dvalues, arrays, 4, groups, dy=(dy, weight_shape[0]), x=(x, weight_shape[1] * groups))
    geometry = Geometry(_pair(stride), _pair(padding), _pair(dilation))
    _check_output(dy, geometry.output(x.shape[2:], weight_shape[2:]))
    if arrays.nnz == 0:
        return dvalues
    dy, x = dy.contiguous(memory_format=torch.channels_last), _channels_last(x)
    features_y, features_x = weight_shape[0] // groups, weight_shape[1]
    pixels = dy.shape[0] * dy.shape[2] * dy.shape[3]
    mode = precision(x.dtype, "conv", target)
    tile = wgrad_tile((r, c), x.dtype, mode, target)
    programs = arrays.nnz * (r // tile.cols) * (c // tile.depth)
    part, parts = wgrad_split(programs, pixels, tile.rows, target)
    sums = dvalues if parts == 1 else torch.empty(parts, *dvalues.shape, dtype=torch.float32, device=x.device)
    launch(
        conv2d_wgrad_kernel,
        programs * parts,
        (
            *(dy, x, sums, arrays.row, arrays.col, arrays.alive_bytes, arrays.nnz, pixels, part),
            *(*dy.shape[2:], *x.shape[2:], x.stride(0), x.stride(2), x.stride(3), features_y, features_x, groups),
            *(triton.cdiv(features_y, r), triton.cdiv(features_x, c), weight_shape[3]),
            *(*geometry.stride, *geometry.padding, *geometry.dilation),
        ),
        tile,
        R=r,
        C=c,
        BM=tile.rows,
        BR=tile.cols,
        BC=tile.depth,
        SPLIT=parts > 1,
        TAIL=bool(features_y % r or features_x % c),
        HAS_ALIVE=arrays.alive is not None,
        PRECISION=mode,
    )
    if parts > 1:
        add_parts(sums, dvalues, arrays)
    return dvalues


_phase_cache: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _phases(
    arrays: Index, weight_shape: Sequence[int], geometry: Geometry, grid: Grid
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The transposed index sorted by phase: `(begin [phases · C + 1], t_row, t_index, column_order)`.

    Row h of dx with h = i · stride + o sees tap k if k · dilation - padding - o is divisible by the stride. Made once
    for a pattern and a geometry, without asking the device for anything.
    """
    (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w) = geometry
    if stride_h == stride_w == 1:
        return arrays.t_ptr, arrays.t_row, arrays.t_index, arrays.column_order
    cache = _phase_cache.setdefault(arrays.t_row, {})
    if geometry not in cache:
        device, columns = arrays.t_row.device, grid.groups * grid.cols
        tap = arrays.t_row.long() // grid.rows
        phase_h = (tap // weight_shape[3] * dilation_h - pad_h) % stride_h
        phase_w = (tap % weight_shape[3] * dilation_w - pad_w) % stride_w
        entry = torch.arange(tap.shape[0], device=device)
        column = torch.searchsorted(arrays.t_ptr.long(), entry, right=True) - 1
        key, order = torch.sort((phase_h * stride_w + phase_w) * columns + column, stable=True)
        ends = torch.arange(stride_h * stride_w * columns + 1, device=device)
        begin = torch.searchsorted(key, ends).int()
        cache[geometry] = (begin, arrays.t_row[order], arrays.t_index[order], arrays.column_order)
    return cache[geometry]


def _check_output(dy: Tensor, size: Sequence[int]) -> None:
    if list(dy.shape[2:]) != list(size):
        raise ValueError(f"dy has shape {tuple(dy.shape)}, a convolution of this x gives height and width {size}")


def _check_groups(pattern: Pattern, groups: int) -> None:
    if groups != pattern.groups:
        raise ValueError(f"groups={groups}, but the pattern was made for {pattern.groups}")


def _pair(sizes: Sequence[int]) -> tuple[int, int]:
    return (int(sizes[0]), int(sizes[1]))


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _channels_last(x: Tensor) -> Tensor:
    """`x` itself if a pixel's channels are contiguous, else a channels_last copy."""
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous(memory_format=torch.channels_last)
