"""The work of the GPU kernels, counted from their compiled code, without a GPU.

    python -m benchmarks.bench_gpu [--only TEXT] [--shares 0.05 …] [--jobs 2] [--out benchmarks/gpu_work.md]

Every kernel is compiled for sm_80 and executed in the emulator of `tests/gpuless` on a sample of its programs that
stands for all of them: a tile of activations (for a convolution, tiles of a whole image) times all block rows, or for
wgrad all parts of the batch times a live block (for a convolution, 18 that are evenly spread, since taps at the border
of an image read fewer sectors). Matrix and all instructions are exact, and so are a linear layer's sectors. bf16 stands
for fp16, whose counts are the same. Written are, for the three passes together or one by one,

    matrix    matrix instructions, relative to a full mask with the same blocks
    all       instructions of warps in PTX, relative to the dense kernel
    sectors   sectors of 32 bytes that warps read and write (before any cache), relative to (b), (c) and (d):
    (a) the live share of blocks
    (b) a dense Triton kernel of `gpu_dense`, a matrix product or an implicit one, at the tile with the fewest
        instructions
    (b2) that with two products in a step, as the sparse kernels have: Triton then moves less through registers for
        sm_80. For a convolution also this project's kernel with a full mask and its best block, if that takes fewer
    (c) the least for the tiling: each program reads its live blocks and the activation tiles that these need once, and
        writes its result once
    (d) the least without a tiling: live values, x and y each once
    (e) for the linear forward pass, PyTorch's `bsr_dense_addmm` with the settings that PyTorch ships for an A100
    least     instructions that cannot be saved at these tiles: `gpu_floors.instructions_for_tiling`
    floor     what writing y and dx takes at least, for 512 bytes a store of a warp and, unless in fp32, four
              conversions, and (a) of the rest of the dense kernel's instructions; relative to these

`bound` is an upper bound, no measurement: the speed-up over a dense kernel that reaches 80 % of the tensor cores' peak,
if the sparse one were limited by nothing but peak arithmetic, its sectors at the second-level cache's bandwidth and (d)
at the memory's, whichever takes longest.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import math
import multiprocessing
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.gpu.cases import BLOCKS, Layer, precision
from tests.gpuless.driver import Launch, stand_in

from . import gpu_dense
from .gpu_floors import CARDS, bound, instructions_for_tiling, least, least_for_tiling, proportional

Counts = collections.Counter
SHARES = (1.0, 0.2, 0.07, 0.05, 0.03)
GPU = "sm_80"


LAYERS = {
    name: Layer("bf16", (32, 32), bias=False, exact=True, **options)
    for name, options in {
        "linear 1024": {"weight_shape": (1024, 1024), "batch": 4096},
        "linear 2048": {"weight_shape": (2048, 2048), "batch": 4096},
        "linear 4096": {"weight_shape": (4096, 4096), "batch": 4096},
        "lenet-wide 784-2048": {"weight_shape": (2048, 784), "batch": 128},
        "lenet-wide 2048-1024": {"weight_shape": (1024, 2048), "batch": 128},
        "VGG-19 128, 16x16": {"weight_shape": (128, 128, 3, 3), "batch": 64, "image": (16, 16), "padding": (1, 1)},
        "VGG-19 256, 8x8": {"weight_shape": (256, 256, 3, 3), "batch": 64, "image": (8, 8), "padding": (1, 1)},
        "VGG-19 512, 4x4": {"weight_shape": (512, 512, 3, 3), "batch": 64, "image": (4, 4), "padding": (1, 1)},
        "ResNet 64, 8x8": {"weight_shape": (64, 64, 3, 3), "batch": 128, "image": (8, 8), "padding": (1, 1)},
    }.items()
}
SPREAD = 18  # live blocks of a convolution that stand for all in wgrad
HEAD = (
    "Counted by `python -m benchmarks.bench_gpu`, whose docstring says what the columns hold. Nothing here is a time."
)
HEADS = (
    *("layer, block", "(a) live", "matrix", "all / (b)", "/ (b2)", "least / (b)", "floor", "sectors / (b)", "/ (c)"),
    *("/ (d)", "all / (e)", "sectors / (e)", "bound A100", "H100"),
)
PER_LAYER = "linear 2048"  # whose passes are listed one by one
IN_TF32 = "linear 1024"  # which is also counted in fp32 by tf32


def blocks_of(layer: Layer) -> list[int]:
    """Sizes of which the layer holds two in each direction."""
    return [b for b in BLOCKS if b <= min(layer.weight_shape[:2]) // 2]


def launched(
    run: Callable[[], Any], sample: Callable[[Launch], list[int]], kind: str = "bf16"
) -> list[tuple[Launch, float]]:
    """All launches of `run`, with what scales their counts from the programs that `sample` picks to the whole grid."""
    picked: list[list[int]] = []

    def programs(launch: Launch) -> list[int]:
        picked.append(sample(launch))
        return picked[-1]

    with stand_in(GPU, programs=programs, races=False) as gpu, precision(kind):
        run()
    return [(launch, math.prod(launch.grid) / len(chosen)) for launch, chosen in zip(gpu.launches, picked, strict=True)]


def counted(run: Callable[[], Any], sample: Callable[[Launch], list[int]], kind: str = "bf16") -> Counts:
    """What all launches of `run` count, scaled to the whole grid."""
    total: Counts = Counts()
    for launch, scale in launched(run, sample, kind):
        total.update({name: count * scale for name, count in launch.counts.items()})
    return total


def sampler(layer: Layer, nnz: int) -> Callable[[Launch], list[int]]:
    """Programs that stand for all: see above."""

    def sample(launch: Launch) -> list[int]:
        count = math.prod(launch.grid)
        given = dict(zip(launch.source.arg_names, launch.args, strict=True))
        if launch.name in ("add_parts_kernel", "round_kernel"):
            return [0]
        if "wgrad" in launch.name:
            tiles = (given["R"] // given["BR"]) * (given["C"] // given["BC"])
            programs = -(-nnz // given["BLOCKS"]) * tiles
            if layer.image is None:  # the programs with the first tile; all are alike if all see blocks of one row
                alike = layer.density == 1 and layer.weight_shape[1] % (given["C"] * given["BLOCKS"]) == 0
                return [pid for pid in range(0, count, tiles) if not alike or pid % programs == 0]
            spread = SPREAD if layer.density == 1 else programs // tiles
            entries = sorted({round(i * (programs // tiles - 1) / max(1, spread - 1)) for i in range(spread)})
            parts = range(0, count, programs)
            return [part + entry * tiles for part, entry in itertools.product(parts, entries)]
        group = min(given["tiles"], given["GROUP"])
        lines = count // given["tiles"] if layer.density < 1 else 1  # with a full mask all lines are alike
        whole = 1 if layer.image is None else max(1, math.prod(layer.image) // given["BM"])  # tiles of an image
        return [pid for pid in range(group * lines) if pid % group < whole]

    return sample


@functools.cache
def sparse_work(layer: Layer) -> tuple[dict[str, Counts], int]:
    """Counts of each pass, and live blocks."""
    nnz = layer.pattern().nnz
    sample = sampler(layer, nnz)
    return {name: counted(run, sample, layer.precision) for name, run in layer.sparse().items()}, nnz


@functools.cache
def dense_work(layer: Layer) -> tuple[dict[str, Counts], dict[str, Counts]]:
    """(b) and (b2): each pass by a dense kernel, at the tile with the fewest instructions."""
    full = []
    if layer.image is not None:
        blocks = [b for b in (32, 64, 128) if b <= min(layer.weight_shape[:2])]
        full = [sparse_work(replace(layer, block=(b, b), density=1.0))[0] for b in blocks]
    return _fewest(_dense(layer, 1)), _fewest([*_dense(layer, 2), *full])


def _dense(layer: Layer, products: int) -> Iterator[dict[str, Counts]]:
    """The passes at each tile; `products` of a step."""
    tensors = layer.tensors()
    for tile in gpu_dense.TILES:
        found = gpu_dense.passes(layer, tensors, tile, products)
        yield {name: counted(run, lambda _, p=programs: p, layer.precision) for name, (run, programs) in found.items()}


def _fewest(works: Iterable[dict[str, Counts]]) -> dict[str, Counts]:
    """Of each pass the one with the fewest instructions."""
    fewest: dict[str, Counts] = {}
    for work in works:
        for name, counts in work.items():
            fewest[name] = min(fewest.get(name, counts), counts, key=_instructions)
    return fewest


def bsr_work(layer: Layer) -> Counts | None:
    """(e): PyTorch's own block-sparse product for the forward pass; None where it has no kernel for the layer."""
    if layer.image is not None or any(size % 128 for size in (*layer.weight_shape, layer.batch)):
        return None
    if layer.dtype != torch.bfloat16:
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


def _instructions(counts: Counts) -> float:
    return counts["instructions"]


def _sum(work: dict[str, Counts]) -> Counts:
    return sum(work.values(), Counts())


def _sectors(counts: Counts) -> float:
    return counts["sectors read"] + counts["sectors written"]


def table(only: str, shares: Sequence[float], jobs: int) -> Iterator[str]:
    """The lines of the Markdown tables; layers are counted in `jobs` processes."""
    plain, tf32 = LAYERS[PER_LAYER], replace(LAYERS[IN_TF32], precision="tf32")
    lines_at = functools.partial(_lines, shares=shares)
    tables = [("The three passes together, bf16 (fp16 counts alike)", LAYERS, lines_at)]
    tables += [("Pass by pass, bf16", {PER_LAYER: plain}, _lines_of_passes)]
    tables += [("fp32 by tf32", {IN_TF32: tf32}, lines_at)]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_alone) as pool:
        waiting = []
        for title, layers, lines in tables:
            for name, layer in layers.items():
                blocks = [b for b in blocks_of(layer) if only in f"{title}, {name}, {b}"]
                if blocks:
                    waiting.append((title, pool.submit(_lines_of_layer, lines, name, layer, blocks)))
        for title, group in itertools.groupby(waiting, lambda pair: pair[0]):
            yield f"\n{title}:\n"
            yield f"| {' | '.join(HEADS)} |"
            yield "|---" * len(HEADS) + "|"
            for _, future in group:
                yield from future.result()


def _alone() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Sparse ")  # of PyTorch about its block-sparse tensors


def _lines_of_layer(lines: Callable[..., Iterator[str]], name: str, layer: Layer, blocks: list[int]) -> list[str]:
    dense = dense_work(layer)
    return [line for block in blocks for line in lines(name, replace(layer, block=(block, block)), dense)]


def _lines(name: str, plain: Layer, dense: Sequence[dict[str, Counts]], shares: Sequence[float]) -> Iterator[str]:
    full, blocks = sparse_work(replace(plain, density=1.0))
    for share in shares:
        layer = replace(plain, density=share)
        passes, nnz = (full, blocks) if share == 1.0 else sparse_work(layer)
        if nnz:
            yield _line(f"{name}, {layer.block[0]}", layer, nnz, nnz / blocks, passes, full, dense, bsr_work(layer))


def _lines_of_passes(name: str, plain: Layer, dense: Sequence[dict[str, Counts]]) -> Iterator[str]:
    layer = replace(plain, density=0.05)
    (passes, nnz), (full, blocks) = sparse_work(layer), sparse_work(replace(plain, density=1.0))
    for key in passes:
        one = [{key: work[key]} for work in (passes, full)]
        only = [{key: work[key]} for work in dense]
        yield _line(f"{name}, {layer.block[0]}: {key}", layer, nnz, nnz / blocks, *one, only, None)


def _line(
    label: str,
    layer: Layer,
    nnz: int,
    live: float,
    passes: dict[str, Counts],
    full: dict[str, Counts],
    denses: Sequence[dict[str, Counts]],
    peer: Counts | None,
) -> str:
    work, sectors = _sum(passes), _sectors(_sum(passes))
    matrix = work["mma"] / _sum(full)["mma"]
    exact = "= (a)" if math.isclose(matrix, live, rel_tol=1e-9) else f"{matrix:.4f}"
    dense = denses[0]
    shares = [f"{_instructions(work) / _instructions(_sum(one)):.1%}" for one in denses]
    cells = [f"{live:.2%}", exact, *shares]
    tiling = least_for_tiling(layer, nnz)
    against = f"{sectors / sum(tiling[name] for name in passes):.2f}"
    if len(passes) < 3:
        cells += ["–", "–", f"{sectors / _sectors(_sum(dense)):.1%}", against, "–", "–", "–", "–", "–"]
        return f"| {label} | {' | '.join(cells)} |"
    whole = _instructions(_sum(dense))
    half = layer.dtype.itemsize == 2
    cells.append(f"{instructions_for_tiling(layer, nnz) / whole:.1%}" if half else "–")
    cells += [f"{proportional(layer, whole, live):.1%}", f"{sectors / _sectors(_sum(dense)):.1%}", against]
    cells.append(f"{sectors / least(layer, nnz):.1f}")
    if peer:
        y = passes["y"]
        cells += [f"{_instructions(y) / _instructions(peer):.2f}", f"{_sectors(y) / _sectors(peer):.2f}"]
    else:
        cells += ["–", "–"]
    cells += [f"{bound(card, layer, nnz, sectors):.1f}" if half else "–" for card in CARDS.values()]
    return f"| {label} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--only", default="", help="layers whose line contains this text, for example 'linear 4096, 32'"
    )
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="live shares of blocks to count at")
    parser.add_argument("--jobs", type=int, default=1, help="processes that count at the same time")
    parser.add_argument("--out", type=Path, help="Markdown file to write the table to")
    given = parser.parse_args()
    gpu_dense.check_results()
    lines = [HEAD]
    for line in table(given.only, given.shares, given.jobs):
        print(line, flush=True)
        lines.append(line)
    if given.out:
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
