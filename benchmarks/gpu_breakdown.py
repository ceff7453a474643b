"""Where the instructions of the GPU kernels go, for one matrix instruction of a warp, counted without a GPU.

    python -m benchmarks.gpu_breakdown [--layers "linear 1024, 16: y" …]

A column is a pass of a layer of `bench_gpu` with 5 % of its blocks live, in bf16 for sm_80, executed for the programs
that stand for all there; the dense kernel is its column (b). A loop is what lies between a label and the last branch
back to it, a main loop an innermost one that holds matrix instructions. Its basic blocks that store a result, or are
executed less often than others, are the end of a line and count as outside of it. Left out is `add_parts_kernel`, which
adds up the parts of dvalues.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from tests.gpuless.driver import Launch
from tests.gpuless.parse import Instruction, Program

from .bench_gpu import LAYERS, Counts, dense_work, launched, sampler

COLUMNS = (
    *("linear 1024, 16: y", "linear 1024, 16: dvalues", "linear 1024, 32: y", "linear 1024, 32: dvalues"),
    "VGG-19 256, 8x8, 16: y",
)
LIVE = 0.05
OFTEN = 0.9  # of the executions of a main loop; the end of a line has fewer
MATRIX = "matrix instruction"
COPIES, ADDITIONS = "loop: cp.async, commit, wait, barrier", "loop: additions for addresses, counting"
REST = "loop: rest (predicates, branches, moves, indices, shifts)"
KINDS = {  # of instructions in a main loop
    "ldmatrix": "loop: ldmatrix",
    **dict.fromkeys(("cp", "bar"), COPIES),
    **dict.fromkeys(("add", "sub", "mad"), ADDITIONS),
}
OUTSIDE = "before the loop, and behind a line or block: addresses, first copies, sums set to zero, conversion, stores"
ALL = "all (dvalues: without adding up the parts)"
ROWS = (MATRIX, *dict.fromkeys(KINDS.values()), REST, OUTSIDE)


def by_row(launch: Launch) -> Counts:
    """The instructions of a launch, as often as they were executed."""
    program, executed = launch.program, launch.executed
    assert program is not None and executed is not None
    inside = {place for loop in main_loops(program) for place in _steady(program, executed, loop)}
    total: Counts = Counts()
    for place, instruction in enumerate(program.instructions):
        row = KINDS.get(instruction.name, REST) if place in inside else OUTSIDE
        total[MATRIX if instruction.name == "mma" else row] += int(executed[place])
    return total


def main_loops(program: Program) -> list[range]:
    """Where their instructions are."""
    back = sorted((target, place + 1) for place, target in _branches(program) if target <= place)
    loops = [range(*span) for span in dict(back).items()]  # of several branches to a label the last counts
    loops = [loop for loop in loops if any(program.instructions[place].name == "mma" for place in loop)]
    return [loop for loop in loops if not any(set(other) < set(loop) for other in loops)]


def _steady(program: Program, executed: np.ndarray, loop: range) -> Iterator[int]:
    """Where the instructions of a main loop are that do not belong to the end of a line."""
    cuts = {cut for place, target in _branches(program) for cut in (place + 1, target) if cut in loop}
    for start, end in itertools.pairwise(sorted(cuts | {loop.start, loop.stop})):
        stores = any(_stores(instruction) for instruction in program.instructions[start:end])
        if not stores and executed[start] >= OFTEN * executed[loop.start : loop.stop].max():
            yield from range(start, end)


def _branches(program: Program) -> Iterator[tuple[int, int]]:
    """Where each branch is, and where it goes."""
    for place, instruction in enumerate(program.instructions):
        if instruction.target is not None:
            yield place, program.labels[instruction.target]


def _stores(instruction: Instruction) -> bool:
    return instruction.name == "st" and "global" in instruction.modifiers


def column(label: str) -> list[float]:
    """Of the table: what stands below `label`, as "linear 1024, 16: y"."""
    layer_block, key = label.split(": ")
    name, block = layer_block.rsplit(", ", 1)
    layer = replace(LAYERS[name], block=(int(block), int(block)), density=LIVE)
    total: Counts = Counts()
    for launch, scale in launched(layer.sparse()[key], sampler(layer, layer.pattern().nnz)):
        if launch.name != "add_parts_kernel":
            total.update({row: count * scale for row, count in by_row(launch).items()})
    dense = dense_work(LAYERS[name])[0][key]
    numbers = [total[row] / total[MATRIX] for row in ROWS]
    return [*numbers, sum(numbers), dense["instructions"] / dense["mma"]]


def table(labels: Sequence[str]) -> Iterator[str]:
    """The lines of the Markdown table."""
    yield f"| | {' | '.join(labels)} |"
    yield "|---" * (len(labels) + 1) + "|"
    columns = map(column, labels)
    for head, *numbers in zip((*ROWS, ALL, "the dense kernel"), *columns, strict=True):
        yield f"| {head} | {' | '.join(f'{number:.2f}' for number in numbers)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--layers", nargs="+", default=COLUMNS, help="columns, as 'linear 1024, 16: y'")
    for line in table(parser.parse_args().layers):
        print(line)


if __name__ == "__main__":
    main()
