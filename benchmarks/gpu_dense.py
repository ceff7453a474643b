"""Dense Triton kernels that the block-sparse ones are counted against: matrix products, and 3×3 convolutions as
implicit matrix products, each the plain loop of Triton's tutorial. A step of BK is one product or, with PRODUCTS, two.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tests.gpu.cases import Layer, as_tensor_core, check
from tests.gpuless.driver import stand_in

TILES = (  # rows, cols, depth, warps, stages
    *((128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 128, 32, 4, 4)),
    *((256, 64, 64, 4, 3), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4)),
)


@triton.jit
def dense_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    M,
    N,
    K,
    am,
    ak,
    bk,
    bn,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """c [M, N] = a [M, K] · b [K, N], any strides; sizes are multiples of the tile's."""
    HK: tl.constexpr = BK // PRODUCTS
    tiles = N // BN
    i_m, i_n = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    o_m, o_n, o_k = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN), tl.arange(0, HK)
    p_a = a_ptr + o_m[:, None] * am + o_k[None, :] * ak
    p_b = b_ptr + o_k[:, None] * bk + o_n[None, :] * bn
    b_c = tl.zeros((BM, BN), dtype=tl.float32)
    for _ in range(K // BK):
        b_a, b_b = tl.load(p_a), tl.load(p_b)
        if PRODUCTS == 2:
            b_a1, b_b1 = tl.load(p_a + HK * ak), tl.load(p_b + HK * bk)
        b_c = tl.dot(b_a, b_b, b_c)
        if PRODUCTS == 2:
            b_c = tl.dot(b_a1, b_b1, b_c)
        p_a += BK * ak
        p_b += BK * bk
    tl.store(c_ptr + o_m[:, None] * N + o_n[None, :], b_c.to(c_ptr.dtype.element_ty))


@triton.jit
def sees(pixel, shift_h, shift_w, H: tl.constexpr, W: tl.constexpr):
    """Whether pixels of images look inside of theirs when they are shifted; a negative coordinate is a large one."""
    h, w = pixel % (H * W) // W, pixel % W
    return ((h + shift_h).to(tl.uint32) < H) & ((w + shift_w).to(tl.uint32) < W)


@triton.jit
def dense_conv_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    N,
    wt,
    wk,
    wn,
    H: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
    SIGN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """y [pixels, N], the sum over taps t of x [pixels moved by SIGN · t, K] · w [t, K, N], any strides of w; 3×3 with
    stride and padding 1; sizes are multiples of the tile's."""
    HK: tl.constexpr = BK // PRODUCTS
    tiles = N // BN
    i_m, i_n = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    o_m, o_n, o_k = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN), tl.arange(0, HK)
    p_x = x_ptr + o_m[:, None] * K + o_k[None, :]
    p_w = w_ptr + o_k[:, None] * wk + o_n[None, :] * wn
    b_y = tl.zeros((BM, BN), dtype=tl.float32)
    for step in range(9 * (K // BK)):
        tap = step // (K // BK)
        first = step % (K // BK) * BK
        shift_h, shift_w = SIGN * (tap // 3 - 1), SIGN * (tap % 3 - 1)
        m_x = sees(o_m, shift_h, shift_w, H, W)[:, None]
        o_x = (shift_h * W + shift_w) * K + first
        o_w = tap * wt + first * wk
        b_x, b_w = tl.load(p_x + o_x, mask=m_x, other=0.0), tl.load(p_w + o_w)
        if PRODUCTS == 2:
            b_x1, b_w1 = tl.load(p_x + (o_x + HK), mask=m_x, other=0.0), tl.load(p_w + (o_w + HK * wk))
        b_y = tl.dot(b_x, b_w, b_y)
        if PRODUCTS == 2:
            b_y = tl.dot(b_x1, b_w1, b_y)
    tl.store(y_ptr + o_m[:, None] * N + o_n[None, :], b_y.to(y_ptr.dtype.element_ty))


@triton.jit
def dense_conv_wgrad_kernel(
    dy_ptr,
    x_ptr,
    out_ptr,
    M,
    N: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """out [N, 9, K], the sum over M pixels of dyᵀ [N, pixels] · x [pixels moved by a tap, K]; a tile has one tap. BK
    pixels are a step."""
    HK: tl.constexpr = BK // PRODUCTS
    WHOLE: tl.constexpr = HK % (H * W) == 0  # images, so that masks leave the loop
    tiles = 9 * K // BN
    i_m, i_n = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    o_n, o_c, o_m = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN), tl.arange(0, HK)
    tap = i_n * BN // K
    shift_h, shift_w = tap // 3 - 1, tap % 3 - 1
    p_dy = dy_ptr + o_n[:, None] + o_m[None, :] * N
    p_x = x_ptr + (o_m[:, None] + (shift_h * W + shift_w)) * K + (o_c % K)[None, :]
    b_dw = tl.zeros((BM, BN), dtype=tl.float32)
    for m in range(0, M, BK):
        m_x = sees(o_m if WHOLE else m + o_m, shift_h, shift_w, H, W)[:, None]
        b_dy, b_x = tl.load(p_dy), tl.load(p_x, mask=m_x, other=0.0)
        if PRODUCTS == 2:
            m_x1 = sees(o_m if WHOLE else m + HK + o_m, shift_h, shift_w, H, W)[:, None]
            b_dy1, b_x1 = tl.load(p_dy + HK * N), tl.load(p_x + HK * K, mask=m_x1, other=0.0)
        b_dw = tl.dot(b_dy, b_x, b_dw)
        if PRODUCTS == 2:
            b_dw = tl.dot(b_dy1, b_x1, b_dw)
        p_dy += BK * N
        p_x += BK * K
    tl.store(out_ptr + o_n[:, None] * (9 * K) + o_c[None, :], b_dw.to(out_ptr.dtype.element_ty))


class Pass(NamedTuple):
    """A dense pass at a tile: what computes it, and the numbers of the programs that stand for all."""

    run: Callable[[], Tensor]
    programs: list[int]


def passes(layer: Layer, tensors: dict[str, Tensor], tile: tuple[int, ...], products: int) -> dict[str, Pass]:
    """The passes of `layer` for which a tile of `TILES` can be used, of `tensors` as `Layer.tensors` draws them."""
    rows, cols, depth, warps, stages = tile
    depth = depth if layer.dtype.itemsize == 2 else depth // 2
    options = {"BM": rows, "BN": cols, "BK": depth, "PRODUCTS": products, "num_warps": warps, "num_stages": stages}
    x, weight, dy = (tensors[name] for name in ("x", "weight", "dy"))
    return _products(x, weight, dy, options) if layer.image is None else _convolutions(x, weight, dy, options)


def _products(x: Tensor, weight: Tensor, dy: Tensor, options: dict[str, int]) -> dict[str, Pass]:
    """Of a linear layer; sizes are rounded up to the tile's."""
    rows, cols, depth = (options[name] for name in ("BM", "BN", "BK"))

    def padded(t: Tensor, high: int, wide: int) -> Tensor:
        return F.pad(t, (0, -t.shape[1] % wide, 0, -t.shape[0] % high))

    def product(a: Tensor, b: Tensor) -> Tensor:
        (m, k), n = a.shape, b.shape[1]
        c = a.new_empty(m, n)
        dense_kernel[(m // rows * (n // cols),)](a, b, c, m, n, k, *a.stride(), *b.stride(), **options)
        return c

    return {
        "y": Pass(lambda: product(padded(x, rows, depth), padded(weight, cols, depth).T), [0]),
        "dx": Pass(lambda: product(padded(dy, rows, depth), padded(weight, depth, cols)), [0]),
        "dvalues": Pass(lambda: product(padded(dy, depth, rows).T, padded(x, depth, cols)), [0]),
    }


def _convolutions(x: Tensor, weight: Tensor, dy: Tensor, options: dict[str, int]) -> dict[str, Pass]:
    """Of a 3×3 convolution with stride and padding 1, whose channels the tile must divide."""
    rows, cols = options["BM"], options["BN"]
    out, inputs = weight.shape[:2]
    images = {"H": x.shape[2], "W": x.shape[3]}
    pixels = x.shape[0] * images["H"] * images["W"]
    x, weight, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight, dy))

    def product(source: Tensor, channels: int, strides: tuple[int, int, int], sign: int) -> Tensor:
        shape = (source.shape[0], channels, *source.shape[2:])
        y = torch.empty(shape, dtype=source.dtype, memory_format=torch.channels_last)
        constants = {**images, "K": source.shape[1], "SIGN": sign}
        dense_conv_kernel[(pixels // rows * (channels // cols),)](
            source, weight, y, channels, *strides, **constants, **options
        )
        return y

    def wgrad() -> Tensor:
        dw = torch.empty_like(weight)
        grid = (out // rows * (9 * inputs // cols),)
        dense_conv_wgrad_kernel[grid](dy, x, dw, pixels, out, **images, K=inputs, **options)
        return dw

    def tiles_of_image(channels: int) -> list[int]:
        return [i * (channels // cols) for i in range(max(1, images["H"] * images["W"] // rows))]

    found = {}
    if out % cols == 0:
        strides = (inputs, 1, 9 * inputs)  # of tap, x's channel and y's channel
        found["y"] = Pass(lambda: product(x, out, strides, 1), tiles_of_image(out))
    if inputs % cols == 0:
        found["dx"] = Pass(lambda: product(dy, inputs, (inputs, 9 * inputs, 1), -1), tiles_of_image(inputs))
    if out % rows == 0 and inputs % cols == 0:
        found["dvalues"] = Pass(wgrad, [tap * (inputs // cols) for tap in range(9)])
    return found


def check_results() -> None:
    """Raises unless these kernels compute what PyTorch does."""
    common: dict[str, Any] = {"precision": "bf16", "block": (64, 64), "bias": False, "density": 1.0}
    linear = Layer(weight_shape=(128, 64), batch=64, **common)
    images = Layer(weight_shape=(128, 64, 3, 3), batch=4, image=(8, 4), padding=(1, 1), **common)
    larger = replace(images, weight_shape=(64, 64, 3, 3), batch=1, image=(16, 16))
    for layer, products in itertools.product((linear, images, larger), (1, 2)):
        exact, torchs, pattern = layer.dense(lambda t: t.double()), as_tensor_core(layer), layer.pattern()
        for name, (run, _) in passes(layer, layer.tensors(), (64, 64, 64, 4, 3), products).items():
            with stand_in("sm_80"):
                found = pattern.pack(run()) if name == "dvalues" else run()
            check(found, exact[name], torchs[name], f"{name} of the dense kernels, {layer}")
