"""Small kernels that the equipment is tested with."""

import triton
import triton.language as tl


@triton.jit
def scale_kernel(x_ptr, y_ptr, size, factor, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """y [size] = factor · x [size]"""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < size if MASKED else None
    tl.store(y_ptr + o, (tl.load(x_ptr + o, mask=m).to(tl.float32) * factor).to(y_ptr.dtype.element_ty), mask=m)


@triton.jit
def sum_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr, SEPARATE: tl.constexpr):
    """y [programs] = sums of x [programs, BLOCK]; not SEPARATE: all into y[0]."""
    i = tl.program_id(0)
    total = tl.sum(tl.load(x_ptr + i * BLOCK + tl.arange(0, BLOCK)))
    tl.store(y_ptr + (i if SEPARATE else 0), total)


@triton.jit
def countdown_kernel(x_ptr, y_ptr):
    """y [programs] = the steps that Collatz' sequence takes from x to 1."""
    i = tl.program_id(0)
    number, steps = tl.load(x_ptr + i), 0
    while number != 1:
        number = number // 2 if number % 2 == 0 else 3 * number + 1
        steps += 1
    tl.store(y_ptr + i, steps)


@triton.jit
def product_kernel(
    a_ptr, b_ptr, c_ptr, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """c [BM, BN] = a [BM, K] · b [K, BN]"""
    o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    b_c = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        b_a = tl.load(a_ptr + o_m[:, None] * K + (k + o_k)[None, :])
        b_b = tl.load(b_ptr + (k + o_k)[:, None] * BN + o_n[None, :])
        b_c = tl.dot(b_a, b_b, b_c, input_precision=PRECISION)
    tl.store(c_ptr + o_m[:, None] * BN + o_n[None, :], b_c)


@triton.jit
def saturate_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """y = min(x + x, 100) of 16-bit integers, of which a register holds two."""
    o = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o)
    tl.store(y_ptr + o, tl.minimum(x + x, 100))
