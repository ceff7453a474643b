"""The weight gradient of block-sparse 2-D convolutions on a GPU: kernel, then its launchers.

A program sums a live block, a (tap, channel block) of a block row, or if they are narrow a few of one row, over the
pixels of dy or over a part of them. Images are channels_last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pattern import Pattern
from .geometry import Geometry, check_groups
from .launch import Index, check, launch_wgrad
from .settings import channels_last
from .tiles import add_product, load_rows, pixel_offsets, rounded, row_offsets, store_block, sum_entries


@triton.jit
def load_pixels(
    p_c,
    m,
    o_m,
    m_k,
    last,
    shift_h,
    shift_w,
    image: tl.constexpr,  # YH, YW, XH, XW, strides of x, STRIDE_H and STRIDE_W of the convolution, INSIDE
    EVEN_M: tl.constexpr,
    TAIL_K: tl.constexpr,
    HALF: tl.constexpr,
    HOISTED: tl.constexpr,
):
    """x [HM, columns] where dy's pixels m + HALF + o_m look through each column's tap, shifted by shift_h and shift_w
    [1, columns], zero outside of the image and from pixel `last` on. p_c [1, columns] is where pixel 0 looks. HOISTED:
    m is the first of an image, so that the pixels look the same way every time; masks leave the loop."""
    YW: tl.constexpr = image[1]
    XH: tl.constexpr = image[2]
    XW: tl.constexpr = image[3]
    STRIDE_XN: tl.constexpr = image[4]
    STRIDE_XH: tl.constexpr = image[5]
    STRIDE_XW: tl.constexpr = image[6]
    STRIDE_H: tl.constexpr = image[7]
    STRIDE_W: tl.constexpr = image[8]
    INSIDE: tl.constexpr = image[9]
    HM: tl.constexpr = o_m.shape[0]
    PIXELS: tl.constexpr = image[0] * YW
    if HOISTED:
        begin_image = m // PIXELS
        o_pixel = HALF + o_m
        begin_h = 0
    else:
        ALIGNED: tl.constexpr = HM % YW == 0 and (HM % PIXELS == 0 or PIXELS % HM == 0)  # whole rows or images
        begin_image = (m + HALF) // PIXELS
        o_pixel = o_m if ALIGNED else (m + HALF) % PIXELS + o_m
        begin_h = ((m + HALF) % PIXELS // YW if ALIGNED else 0) * STRIDE_H
    o_h = o_pixel % PIXELS // YW * STRIDE_H
    o_w = o_pixel % YW * STRIDE_W
    IMAGES: tl.constexpr = HM // PIXELS + 2
    o_x = pixel_offsets(o_pixel // PIXELS, o_h, o_w, IMAGES, XH, STRIDE_XN, STRIDE_XH, STRIDE_XW)
    begin_x = tl.cast(begin_image, tl.int64) * STRIDE_XN + tl.cast(begin_h, tl.int64) * STRIDE_XH
    p_x = (p_c + begin_x) + o_x[:, None]
    if EVEN_M and INSIDE:
        return tl.load(p_x, mask=m_k if TAIL_K else None, other=0.0 if TAIL_K else None)
    else:  # a negative coordinate is a large unsigned one
        x_h = o_h[:, None] + (begin_h + shift_h)
        m_x = (x_h.to(tl.uint32) < XH) & ((o_w[:, None] + shift_w).to(tl.uint32) < XW)
        m_x = m_x if EVEN_M else m_x & (m + HALF + o_m < last)[:, None]
        return tl.load(p_x, mask=m_x & m_k if TAIL_K else m_x, other=0.0)


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
    layer: tl.constexpr,  # image as for `load_pixels`; KW, padding and dilation; N, K, GROUPS
    tile: tl.constexpr,  # R, C, BR, BC
    flags: tl.constexpr,  # HALVES, EVEN_M, SPLIT, HAS_ALIVE, PRECISION
    BM: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """A tile [BR, BC] of each of BLOCKS blocks from i_entry on, which are of one block row: one product."""
    image: tl.constexpr = layer[0]
    tap: tl.constexpr = layer[1]
    N: tl.constexpr = layer[2]
    K: tl.constexpr = layer[3]
    GROUPS: tl.constexpr = layer[4]
    R: tl.constexpr = tile[0]
    C: tl.constexpr = tile[1]
    BR: tl.constexpr = tile[2]
    BC: tl.constexpr = tile[3]
    HALVES: tl.constexpr = flags[0]
    EVEN_M: tl.constexpr = flags[1]
    PRECISION: tl.constexpr = flags[4]
    KW: tl.constexpr = tap[0]
    PAD_H: tl.constexpr = tap[1]
    PAD_W: tl.constexpr = tap[2]
    DILATION_H: tl.constexpr = tap[3]
    DILATION_W: tl.constexpr = tap[4]
    BLOCKS_N: tl.constexpr = (N + R - 1) // R
    BLOCKS_K: tl.constexpr = (K + C - 1) // C
    TAIL_N: tl.constexpr = N % R != 0
    TAIL_K: tl.constexpr = K % C != 0
    HM: tl.constexpr = BM // 2 if HALVES == "depth" else BM
    EXACT: tl.constexpr = PRECISION == "ieee" and x_ptr.dtype.element_ty == tl.float32  # short of registers
    # Where tiles are larger, registers do not suffice.
    HOISTED: tl.constexpr = BM % (image[0] * image[1]) == 0 and BR * BC * BLOCKS < 64 * 64
    i_row = tl.load(row_ptr + i_entry)
    i_group = i_row // BLOCKS_N if GROUPS > 1 else 0
    o_r = first_r + tl.arange(0, BR)
    o_j = tl.arange(0, BLOCKS * BC) // BC  # which of the blocks
    o_c = first_c + tl.arange(0, BLOCKS * BC) % BC
    i_col = tl.load(col_ptr + i_entry) + tl.zeros((BLOCKS * BC,), dtype=tl.int32)
    for j in tl.static_range(1, BLOCKS):
        i_col = tl.where(o_j == j, tl.load(col_ptr + i_entry + j), i_col)
    first_n = (i_row % BLOCKS_N if GROUPS > 1 else i_row) * R  # within the group
    i_col = i_col.to(tl.uint32)  # without a sign divisions take fewer instructions
    o_k = (i_col % BLOCKS_K).to(tl.int32) * C + o_c
    m_n = (first_n + o_r < N)[:, None]
    m_k = (o_k < K)[None, :]
    shift_h = ((i_col // BLOCKS_K // KW).to(tl.int32) * DILATION_H - PAD_H)[None, :]
    shift_w = ((i_col // BLOCKS_K % KW).to(tl.int32) * DILATION_W - PAD_W)[None, :]
    p_c = x_ptr + i_group * K + (shift_h.to(tl.int64) * image[5] + (shift_w * image[6] + o_k[None, :]))
    first = i_part * part
    last = tl.minimum(first + part, M)
    o_m = tl.arange(0, HM)
    # dy is read as its transpose: a tile that is transposed after it was loaded would not be copied asynchronously.
    p_dy = dy_ptr + (i_group * N + first_n) + o_r[:, None]
    p_dy1 = p_dy + row_offsets(HM + o_m if EXACT else (HM + o_m).to(tl.int64), GROUPS * N)[None, :]
    p_dy += row_offsets(o_m if EXACT else o_m.to(tl.int64), GROUPS * N)[None, :]  # [BR, HM]
    b_dw = tl.zeros((BR, BLOCKS * BC), dtype=tl.float32)
    for m in range(first, last, BM):
        o_dy = tl.cast(m, tl.int64) * (GROUPS * N)
        b_dy = load_rows(p_dy + o_dy, m_n, (m + o_m < last)[None, :], TAIL_N, EVEN_M)
        b_x = load_pixels(p_c, m, o_m, m_k, last, shift_h, shift_w, image, EVEN_M, TAIL_K, 0, HOISTED)
        if HALVES == "depth":
            b_dy1 = load_rows(p_dy1 + o_dy, m_n, (m + HM + o_m < last)[None, :], TAIL_N, EVEN_M)
            b_x1 = load_pixels(p_c, m, o_m, m_k, last, shift_h, shift_w, image, EVEN_M, TAIL_K, HM, HOISTED)
        b_dw = add_product(rounded(b_dy, PRECISION), b_x, b_dw, PRECISION)
        if HALVES == "depth":
            b_dw = add_product(rounded(b_dy1, PRECISION), b_x1, b_dw, PRECISION)
    o_out = o_r[:, None] * C + (o_j * (R * C) + o_c)[None, :]
    store_block(out_ptr, alive_ptr, b_dw, o_out, i_entry, i_part, nnz, R * C, flags[2], flags[3])


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
    """dvalues [nnz, R, C], the sum over dy's pixels at the live blocks; with SPLIT, [parts, nnz, R, C] of `part` pixels
    each. dy is [n, YH, YW, GROUPS · N], contiguous, x is [n, XH, XW, GROUPS · K].

    A program's share is that of `sum_entries`."""
    tensors = (dy_ptr, x_ptr, out_ptr, row_ptr, col_ptr, alive_ptr, nnz, M, part)
    image: tl.constexpr = (YH, YW, XH, XW, STRIDE_XN, STRIDE_XH, STRIDE_XW, STRIDE_H, STRIDE_W, INSIDE)
    tap: tl.constexpr = (KW, PAD_H, PAD_W, DILATION_H, DILATION_W)
    layer: tl.constexpr = (image, tap, N, K, GROUPS)
    tile: tl.constexpr = (R, C, BR, BC)
    flags: tl.constexpr = (HALVES, EVEN_M, SPLIT, HAS_ALIVE, PRECISION)
    sum_entries(sum_blocks, tensors, layer, tile, flags, BM, MORE, BLOCKS)


# Launchers


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
    check_groups(pattern, groups)
    rest = (pattern.weight_shape, pattern.block, stride, padding, dilation, groups)
    return block_gradient(dy, x, pattern.scheduled_index, *rest)


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
    dy, x = dy.contiguous(memory_format=torch.channels_last), channels_last(x)
    launch_wgrad(
        conv2d_wgrad_kernel,
        dy,
        x,
        dvalues,
        arrays,
        dy.shape[0] * dy.shape[2] * dy.shape[3],
        "conv",
        target,
        # Of other images each step has its own coordinates, for which several blocks leave no registers.
        several=all(size in (1, 2, 4, 8, 16, 32) for size in dy.shape[2:]),
        INSIDE=not any(geometry.padding),
        **geometry.constants(dy, x, weight_shape, groups),
    )
    return dvalues
