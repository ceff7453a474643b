"""Every kernel compiled for every target with the launch settings that are shipped.

    python -m tests.gpu.matrix          # compile all and rewrite compiled.csv beside this file

A row of the table names in `misses` what falls short of what was asked for (no spills, shared memory within the
target's limit, the target's class of matrix instruction, copies of 16 bytes, 2 buffers), each with a key of `REASONS`.
"""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from tests.gpuless.driver import stand_in
from tests.gpuless.facts import Facts, facts
from tests.gpuless.targets import GPUS

from .cases import PRECISIONS, Layer, precision

TABLE = Path(__file__).with_name("compiled.csv")
BLOCKS = [(16, 16), (32, 32), (64, 64), (128, 128), (16, 64), (64, 16), (32, 128), (128, 32)]
OPERATORS = {
    name: (kind, result)
    for kind in ("linear", "conv2d")
    for name, result in ((kind, "y"), (f"{kind}_dgrad", "dx"), (f"{kind}_wgrad", "dvalues"))
}
MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "sm_120": "mma.sync", "gfx942": "mfma"}
REASONS = {
    "exact": "exact fp32 has no matrix instruction on NVIDIA's GPUs",
    "narrow": "wgmma and tcgen05 compute 64 rows at least; wgrad has as many as a block has",
    "tf32": "tf32 instructions want both operands contiguous along the sum: this one is transposed while it is copied",
    "small": "a tile of the loop has fewer than 16 bytes for each thread",
    "amd": "Triton's pipeline for gfx942 holds the next tile in registers beside one in shared memory",
}


class Row(NamedTuple):
    gpu: str
    operator: str
    precision: str
    block: tuple[int, int]

    @property
    def key(self) -> str:
        return f"{self.gpu} {self.operator} {self.precision} {self.block[0]}x{self.block[1]}"


def rows() -> Iterator[Row]:
    for row in itertools.product(GPUS, OPERATORS, PRECISIONS, BLOCKS):
        yield Row(*row)


def compiled(row: Row, image: tuple[int, int] = (12, 12)) -> Facts:
    """Facts of the kernel that the launcher compiles for a plain layer, larger than every tile, with several lines a
    program where the settings allow it and all blocks live; images of 12×12 fill no tile exactly."""
    kind, result = OPERATORS[row.operator]
    together = 4 if row.gpu == "sm_80" else None
    if kind == "linear":
        layer = Layer(row.precision, row.block, (256, 256), 4096, together=together, density=1.0)
    else:
        layer = Layer(
            row.precision, row.block, (256, 256, 3, 3), 32, image, padding=(1, 1), together=together, density=1.0
        )
    with stand_in(row.gpu, execute=None) as gpu, precision(row.precision):
        layer.sparse()[result]()
    launch = next(launch for launch in gpu.launches if launch.name != "round_kernel")
    return facts(launch.asm, launch.metadata)


def misses(row: Row, found: Facts) -> dict[str, str]:
    """What falls short, with the key of its reason, or "?" where there is none."""
    short = []
    if found.spilled:
        short.append("spills")
    if found.shared > GPUS[row.gpu].shared:
        short.append("shared")
    if found.matrix != MATRIX[row.gpu]:
        short.append("matrix")
    if found.copy < 16:
        short.append("copy")
    if found.buffers < 2:
        short.append("buffers")
    return {name: _reason(name, row, found) for name in short}


def _reason(miss: str, row: Row, found: Facts) -> str:
    wgrad = row.operator.endswith("wgrad")
    if miss == "matrix" and row.precision == "fp32" and row.gpu != "gfx942":
        return "exact"
    if miss == "matrix" and found.matrix == "mma.sync" and wgrad and row.block[0] < 64:
        return "narrow"
    if miss == "buffers" and row.gpu == "gfx942":
        return "amd"
    if miss == "copy" and row.precision == "tf32" and (wgrad or row.operator.endswith("dgrad")):
        return "tf32"
    if miss == "copy" and _least_tile(row) < 16 * found.warps * GPUS[row.gpu].target.warp_size:
        return "small"
    return "?"


def _least_tile(row: Row) -> int:
    """Bytes of the smaller tile of a step: the weights', or in wgrad that of one activation."""
    size = PRECISIONS[row.precision][0].itemsize
    if row.operator.endswith("wgrad"):
        return 32 * min(row.block) * size
    cols, depth = row.block if not row.operator.endswith("dgrad") else row.block[::-1]
    return min(depth, 128 // size) * min(cols, 64) * size


def read() -> dict[str, dict[str, str]]:
    """The table: a row's key -> its columns."""
    with TABLE.open(newline="") as file:
        return {line.pop("kernel"): line for line in csv.DictReader(file)}


def named(columns: dict[str, str]) -> dict[str, str]:
    """What a row's column `misses` names: what falls short -> the key of its reason."""
    return dict(miss.split(":") for miss in columns["misses"].split())


def main() -> None:
    torch.set_num_threads(1)
    wanted = sys.argv[1:]
    table = read() if wanted and TABLE.exists() else {}
    for row in rows():
        if wanted and not any(row.key.startswith(prefix) for prefix in wanted):
            continue
        found = compiled(row)
        short = " ".join(f"{name}:{reason}" for name, reason in misses(row, found).items())
        table[row.key] = {name: str(value) for name, value in asdict(found).items()} | {"misses": short}
        print(row.key, *table[row.key].values(), flush=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kernel", *Facts.__dataclass_fields__, "misses"])
        for key in (row.key for row in rows() if row.key in table):
            writer.writerow([key, *table[key].values()])


if __name__ == "__main__":
    main()
