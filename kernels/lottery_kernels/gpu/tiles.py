"""What the kernels of linear layers and convolutions have in common: which tile a program computes, where it lies, how
it is read and written."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grouped_tile(pid, tiles, lines, GROUP: tl.constexpr):
    """Program number -> (activation tile, line), `GROUP` tiles at a time with the line changing slowest."""
    first = pid // (GROUP * lines) * GROUP
    size = tl.minimum(tiles - first, GROUP)
    within = pid % (GROUP * lines)
    return first + within % size, within // size


@triton.jit
def any_empty(begin_ptr, first, lines, begin, end, LINES: tl.constexpr):
    """Whether any of LINES lines from `first` on, which have entries `begin` to `end`, has none."""
    if LINES == 1:
        return begin == end
    else:
        p_begin = begin_ptr + tl.minimum(first + tl.arange(0, LINES), lines - 1)
        return tl.max((tl.load(p_begin) == tl.load(p_begin + 1)).to(tl.int32), 0) > 0


@triton.jit
def entry_of(step, PER_BLOCK: tl.constexpr):
    """step // PER_BLOCK, which takes fewer instructions without a sign."""
    return step if PER_BLOCK == 1 else (tl.cast(step, tl.uint32) // PER_BLOCK).to(tl.int32)


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
def load_rows(p, m_features, m_rows, TAIL: tl.constexpr, EVEN_M: tl.constexpr):
    """A tile at p, zero where masked; TAIL: features are; EVEN_M: rows are not."""
    if EVEN_M:
        return tl.load(p, mask=m_features if TAIL else None, other=0.0 if TAIL else None)
    else:
        return tl.load(p, mask=m_features & m_rows if TAIL else m_rows, other=0.0)


@triton.jit
def rounded(b, PRECISION: tl.constexpr):
    """b for a product in tf32, of which this is one operand. A tensor core drops the last 13 bits of fp32, of both
    operands, so that by itself every product comes out too small and results err 2.6 times as much as cuBLAS's, which
    rounds both. The other one may be multiplied from shared memory, where nothing can be changed on the way. So this
    one is rounded up from an eighth of its last bit on, which takes back three quarters of what the other loses on
    average: 1.1 times, and 1.6 times where the other has no bits to lose. What tf32 can hold stays as it is."""
    if PRECISION == "tf32":
        power = (b.to(tl.int32, bitcast=True) & -0x800000).to(tl.float32, bitcast=True)  # its sign and exponent
        return tl.fma(power, 0.875 / 1024, b)
    else:
        return b


@triton.jit
def add_product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a · b. In exact fp32 the product is summed by itself first: rounding errors then grow with the number of
    steps, not with that of the products in them."""
    if PRECISION == "ieee" and a.dtype == tl.float32:
        return tl.fma(tl.dot(a, b, input_precision="ieee"), 1.0, acc)  # `+` would be merged into the product again
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


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
def of_one_row(row_ptr, first, last, nnz):
    """Whether blocks first to last, both included, are of one block row."""
    return (last < nnz) & (tl.load(row_ptr + first) == tl.load(row_ptr + tl.minimum(last, nnz - 1)))


@triton.jit
def sum_entries(
    sum_blocks: tl.constexpr,
    tensors,  # dy, x, out, row, col, alive, nnz, M, part
    layer: tl.constexpr,
    tile: tl.constexpr,  # R, C, BR, BC
    flags: tl.constexpr,
    BM: tl.constexpr,
    MORE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """What a program of wgrad does by `sum_blocks`: the tile of BLOCKS blocks that follow each other, 1, 2 or 4, over a
    part of the sum; in one product where they are of one block row, since they then share what is read of dy, else in
    pairs of one row and one by one, MORE rows in a step instead of BM."""
    TILES_C: tl.constexpr = tile[1] // tile[3]
    TILES: tl.constexpr = tile[0] // tile[2] * TILES_C  # programs that share a block
    HALF: tl.constexpr = BLOCKS // 2
    row_ptr, nnz = tensors[3], tensors[6]
    pid = tl.program_id(0)
    programs = tl.cdiv(nnz, BLOCKS) * TILES
    begin = pid % programs // TILES * BLOCKS
    end = tl.minimum(begin + BLOCKS, nnz)
    i_part = pid // programs
    i_tile = pid % TILES
    first_r = i_tile // TILES_C * tile[2]
    first_c = i_tile % TILES_C * tile[3]
    if BLOCKS == 1:
        sum_blocks(*tensors, i_part, begin, first_r, first_c, layer, tile, flags, BM, 1)
    elif of_one_row(row_ptr, begin, begin + BLOCKS - 1, nnz):
        sum_blocks(*tensors, i_part, begin, first_r, first_c, layer, tile, flags, BM, BLOCKS)
    else:
        for i in range(begin, end, HALF):
            if of_one_row(row_ptr, i, i + HALF - 1, nnz) if HALF > 1 else False:
                sum_blocks(*tensors, i_part, i, first_r, first_c, layer, tile, flags, MORE, HALF)
            else:
                for j in range(i, tl.minimum(i + HALF, end)):
                    sum_blocks(*tensors, i_part, j, first_r, first_c, layer, tile, flags, MORE, 1)
