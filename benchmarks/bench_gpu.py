"""The work of the GPU kernels, counted from their compiled code, without a GPU.

    python -m benchmarks.bench_gpu [--only TEXT] [--out benchmarks/gpu_work.md]

Every kernel is compiled for sm_80 and executed in the emulator of `tests/gpuless` on a sample of its programs that
stands for all of them exactly: whole tiles of activations (for a convolution, whole images) times all block rows, or
for wgrad evenly spread live blocks times all parts of the batch. Written are, for the three passes together,

    matrix    matrix instructions, relative to a full mask with the same blocks
    all       instructions of warps, relative to the dense kernel
    sectors   sectors of 32 bytes that warps read and write (before any cache), relative to (b), (c) and (d):
    (a) the live share of blocks
    (b) a dense Triton kernel at its best tile: for linear the product below, for a convolution this project's kernel
        with a full mask and its best block
    (c) the least for the tiling: each program reads its live blocks and the activation tiles that these need once, and
        writes its result once
    (d) the least without a tiling: live values, x and y each once
    (e) for the linear forward pass, PyTorch's `bsr_dense_addmm` with the settings that PyTorch ships for an A100

`bound` is an upper bound, no measurement: the speed-up over a dense kernel that reaches 80 % of the tensor cores' peak,
if the sparse one were limited by nothing but peak arithmetic, its sectors at the second-level cache's bandwidth and (d)
at the memory's, whichever takes longest.
"""

from __future__ import annotations

import argparse
import collections
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor

from lottery_kernels.gpu import settings
from tests.gpu.cases import Layer, precision
from tests.gpuless.driver import Launch, stand_in
from tests.gpuless.memory import SECTOR

Counts = collections.Counter
SHARES = (1.0, 0.2, 0.07, 0.05, 0.03)
GPU = "sm_80"


@dataclass(frozen=True)
class Card:
    """Documented peaks: bf16 tensor cores in FLOP/s, second-level cache and memory in bytes/s."""

    flops: float
    cache: float
    memory: float


CARDS = {
    "A100": Card(312e12, 5120 * 1.41e9, 1555e9),  # 5120 bytes a clock: NVIDIA's white paper on the A100
    "H100": Card(989e12, 5120 * 1.755e9, 3350e9),  # the cache's width is taken as the A100's
}
LAYERS = {
    "linear 1024": Layer("bf16", (32, 32), (1024, 1024), 4096),
    "linear 2048": Layer("bf16", (32, 32), (2048, 2048), 4096),
    "linear 4096": Layer("bf16", (32, 32), (4096, 4096), 4096),
    "lenet-wide 784-2048": Layer("bf16", (32, 32), (2048, 784), 128),
    "lenet-wide 2048-1024": Layer("bf16", (32, 32), (1024, 2048), 128),
    "VGG-19 128, 16x16": Layer("bf16", (32, 32), (128, 128, 3, 3), 64, (16, 16), padding=(1, 1)),
    "VGG-19 256, 8x8": Layer("bf16", (32, 32), (256, 256, 3, 3), 64, (8, 8), padding=(1, 1)),
    "VGG-19 512, 4x4": Layer("bf16", (32, 32), (512, 512, 3, 3), 64, (4, 4), padding=(1, 1)),
    "ResNet 64, 8x8": Layer("bf16", (32, 32), (64, 64, 3, 3), 128, (8, 8), padding=(1, 1)),
}


@triton.jit
def dense_kernel(a_ptr, b_ptr, c_ptr, M, N, K, am, ak, bk, bn, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c [M, N] = a [M, K] · b [K, N], any strides; sizes are multiples of the tile's."""
    tiles = N // BN
    i_m, i_n = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    o_m, o_n, o_k = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    p_a = a_ptr + o_m[:, None] * am + o_k[None, :] * ak
    p_b = b_ptr + o_k[:, None] * bk + o_n[None, :] * bn
    b_c = tl.zeros((BM, BN), dtype=tl.float32)
    for _ in range(K // BK):
        b_c = tl.dot(tl.load(p_a), tl.load(p_b), b_c)
        p_a += BK * ak
        p_b += BK * bk
    tl.store(c_ptr + o_m[:, None] * N + o_n[None, :], b_c.to(c_ptr.dtype.element_ty))


def counted(run: Callable[[], Any], sample: Callable[[Launch], list[int]]) -> Counts:
    """What all launches of `run` count, scaled from the programs that `sample` picks to the whole grid."""
    picked: list[list[int]] = []

    def programs(launch: Launch) -> list[int]:
        picked.append(sample(launch))
        return picked[-1]

    with stand_in(GPU, programs=programs, races=False) as gpu, precision("bf16"):
        run()
    total: Counts = Counts()
    for launch, chosen in zip(gpu.launches, picked, strict=True):
        scale = math.prod(launch.grid) / len(chosen)
        total.update({name: count * scale for name, count in launch.counts.items()})
    return total


def sampler(layer: Layer, block: tuple[int, int], nnz: int) -> Callable[[Launch], list[int]]:
    """Programs that stand for all: see above."""

    def sample(launch: Launch) -> list[int]:
        count = math.prod(launch.grid)
        if launch.name == "add_parts_kernel" or launch.name == "dense_kernel":
            return list(range(min(count, 4)))
        if "wgrad" in launch.name:
            per_part = count // _parts(launch, nnz, block)
            tiles = per_part // nnz
            entries = sorted({round(i * (nnz - 1) / 15) for i in range(16)})
            return [
                part * per_part + entry * tiles + tile
                for part in range(count // per_part)
                for entry in entries
                for tile in range(tiles)
            ]
        tiles = launch.args[launch.source.arg_names.index("tiles")]  # of activations
        lines = count // tiles
        group = min(tiles, settings.Tile.group)
        tall = launch.args[launch.source.arg_names.index("BM")]
        whole = 1 if layer.image is None else max(1, math.prod(layer.image) // tall)  # tiles of an image
        return [pid for pid in range(group * lines) if pid % group < whole]

    return sample


def _parts(launch: Launch, nnz: int, block: tuple[int, int]) -> int:
    tile = settings.wgrad_tile(block, torch.bfloat16, "ieee", settings.Target("cuda", 80, 108))
    return math.prod(launch.grid) // (nnz * (block[0] // tile.cols) * (block[1] // tile.depth))


def sparse_work(layer: Layer) -> tuple[dict[str, Counts], int]:
    """Counts of each pass, and live blocks."""
    pattern = layer.pattern()
    sample = sampler(layer, layer.block, pattern.nnz)
    return {name: counted(run, sample) for name, run in layer.sparse().items()}, pattern.nnz


def dense_work(layer: Layer) -> dict[str, Counts]:
    """Each pass by a dense kernel at the tile with the fewest instructions."""
    if layer.image is not None:
        blocks = [b for b in (32, 64, 128) if b <= min(layer.weight_shape[:2])]
        full = [sparse_work(replace(layer, block=(b, b), density=1.0))[0] for b in blocks]
        return {name: min((work[name] for work in full), key=_instructions) for name in full[0]}
    (out, inputs), batch = layer.weight_shape, layer.batch
    x, w, dy = (torch.zeros(shape, dtype=layer.dtype) for shape in ((batch, inputs), (out, inputs), (batch, out)))
    return {name: _best_product(a, b) for name, (a, b) in {"y": (x, w.T), "dx": (dy, w), "dvalues": (dy.T, x)}.items()}


def _best_product(a: Tensor, b: Tensor) -> Counts:
    (m, k), n = a.shape, b.shape[1]
    c = a.new_empty(m, n)
    found = []
    for tile in (
        (128, 128, 32, 8, 4),
        (128, 128, 64, 8, 3),
        (128, 64, 64, 4, 4),
        (64, 64, 64, 4, 4),
        (128, 16, 16, 4, 4),
    ):
        rows, cols, depth, warps, stages = tile
        if m % rows or n % cols or k % depth:
            continue
        grid, strides = (m // rows * (n // cols),), (*a.stride(), *b.stride())
        options = {"BM": rows, "BN": cols, "BK": depth, "num_warps": warps, "num_stages": stages}
        found.append(counted(lambda: dense_kernel[grid](a, b, c, m, n, k, *strides, **options), lambda launch: [0]))  # noqa: B023
    return min(found, key=_instructions)


def bsr_work(layer: Layer) -> Counts | None:
    """(e): PyTorch's own block-sparse product for the forward pass; None where it has no kernel for the layer."""
    if layer.image is not None or any(size % 128 for size in (*layer.weight_shape, layer.batch)):
        return None
    with mock.patch("torch.utils._triton.has_triton", return_value=True):
        from torch.sparse import _triton_ops
    pattern = layer.pattern()
    x, weight = layer.tensors()["x"], layer.tensors()["weight"]
    bsr = torch.sparse_bsr_tensor(pattern.row_ptr, pattern.col, pattern.pack(weight), layer.weight_shape)
    y = x.new_zeros(layer.weight_shape[0], layer.batch)

    def sample(launch: Launch) -> list[int]:
        """One tile of the batch, all block rows, as the kernel's `tl.swizzle2d` numbers them."""
        lines, columns, _ = launch.grid
        group = launch.args[launch.source.arg_names.index("GROUP_SIZE_ROW")]
        chosen = []
        for line in range(lines):
            for column in range(columns):
                place = line * columns + column
                first = place // (group * columns) * group
                if place % (group * columns) < min(lines - first, group):
                    chosen.append(line + column * lines)
        return chosen

    def launch_whole(kernel: Any, tensors: dict[Tensor, Any], grid: tuple, *_: Any) -> None:
        kernel(grid[::-1], *tensors)  # slices of the pointers, which PyTorch passes, end before what is read

    with (
        mock.patch.object(_triton_ops, "_get_device_name", lambda: "NVIDIA A100-SXM4-80GB"),
        mock.patch.object(_triton_ops, "launch_kernel", launch_whole),
    ):
        return counted(lambda: _triton_ops.bsr_dense_addmm(y, bsr, x.T, beta=0, out=y), sample)


def least_for_tiling(layer: Layer, nnz: int) -> float:
    """(c) in sectors, for the three passes."""
    (r, c), size, target = layer.block, layer.dtype.itemsize, settings.Target("cuda", 80, 108)
    rows = layer.batch * math.prod(layer.image or ())
    out, inputs = layer.weight_shape[0], layer.weight_shape[1]
    total = 0.0
    for cols, depth, features in ((r, c, out), (c, r, inputs)):
        tile = settings.product_tile(rows, cols, depth, layer.dtype, "ieee", target)
        tiles, per_line = -(-rows // tile.rows), cols // tile.cols
        total += tiles * nnz * per_line * (depth * tile.cols + min(rows, tile.rows) * depth) + rows * features
    tile = settings.wgrad_tile(layer.block, layer.dtype, "ieee", target)
    programs = nnz * (r // tile.cols) * (c // tile.depth)
    _, parts = settings.wgrad_split(programs, rows, tile.rows, target)
    total += programs * rows * (tile.cols + tile.depth) + nnz * r * c
    partial = 2 * parts * nnz * r * c * 4 if parts > 1 else 0  # fp32, written and read
    return (total * size + partial) / SECTOR


def least(layer: Layer, nnz: int) -> float:
    """(d) in sectors, for the three passes."""
    rows = layer.batch * math.prod(layer.image or ())
    activations = rows * (layer.weight_shape[0] + layer.weight_shape[1])
    return 3 * (activations + nnz * math.prod(layer.block)) * layer.dtype.itemsize / SECTOR


def bound(card: Card, layer: Layer, nnz: int, sectors: float) -> float:
    """Upper bound of the speed-up over dense at 80 % of peak, for the three passes."""
    rows = layer.batch * math.prod(layer.image or ())
    flops = 6 * rows * math.prod(layer.weight_shape)
    share = nnz * math.prod(layer.block) / math.prod(layer.weight_shape)
    sparse = max(flops * share / card.flops, sectors * SECTOR / card.cache, least(layer, nnz) * SECTOR / card.memory)
    return flops / (0.8 * card.flops) / sparse


def _instructions(counts: Counts) -> float:
    return counts["instructions"]


def _sum(work: dict[str, Counts]) -> Counts:
    return sum(work.values(), Counts())


def _sectors(counts: Counts) -> float:
    return counts["sectors read"] + counts["sectors written"]


def table(only: str) -> Iterator[str]:
    """The lines of the Markdown table."""
    heads = ("layer, block", "(a) live", "matrix", "all / (b)", "sectors / (b)", "/ (c)", "/ (d)", "all / (e)")
    yield f"| {' | '.join(heads)} | sectors / (e) | bound A100 | H100 |"
    yield "|---" * (len(heads) + 3) + "|"
    for name, plain in LAYERS.items():
        blocks = [b for b in (16, 32, 64, 128) if b <= min(plain.weight_shape[:2]) // 2]
        if not any(only in f"{name}, {b}" for b in blocks):
            continue
        dense = _sum(dense_work(plain))
        for block in blocks:
            if only in f"{name}, {block}":
                yield from _lines(name, replace(plain, block=(block, block)), dense)


def _lines(name: str, plain: Layer, dense: Counts) -> Iterator[str]:
    for share in SHARES:
        layer = replace(plain, density=share)
        passes, nnz = sparse_work(layer)
        if share == 1.0:
            full, blocks = _sum(passes), nnz
        if nnz == 0:
            continue
        work, peer = _sum(passes), bsr_work(layer)
        sectors, live = _sectors(work), nnz / blocks
        matrix = work["mma"] / full["mma"]
        against = "– | –"
        if peer:
            y = passes["y"]
            against = f"{_instructions(y) / _instructions(peer):.2f} | {_sectors(y) / _sectors(peer):.2f}"
        ratios = (_instructions(work) / _instructions(dense), sectors / _sectors(dense))
        least_ = (sectors / least_for_tiling(layer, nnz), sectors / least(layer, nnz))
        bounds = " | ".join(f"{bound(card, layer, nnz, sectors):.1f}" for card in CARDS.values())
        exact = "= (a)" if math.isclose(matrix, live, rel_tol=1e-9) else f"{matrix:.4f}"
        yield (
            f"| {name}, {layer.block[0]} | {live:.2%} | {exact} | {ratios[0]:.1%} | {ratios[1]:.1%} | {least_[0]:.2f} "
            f"| {least_[1]:.1f} | {against} | {bounds} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--only", default="", help="layers whose line contains this text, for example 'linear 4096, 32'"
    )
    parser.add_argument("--out", type=Path, help="Markdown file to write the table to")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Sparse ")  # of PyTorch about its block-sparse tensors
    lines = []
    for line in table(given.only):
        print(line, flush=True)
        lines.append(line)
    if given.out:
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
