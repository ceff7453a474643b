"""Loads, stores and copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .memory import sectors
from .parse import Address, Immediate, Instruction, Operand

if TYPE_CHECKING:
    from .execute import Machine

Mask = np.ndarray | None
POISON = 0x7FFFDEAD  # a NaN where a copy has not landed yet


def global_offsets(
    machine: Machine, kind: str, thread: np.ndarray, address: np.ndarray, size: int, text: str
) -> np.ndarray:
    """Checks and counts an access to global memory; returns offsets into its bytes."""
    memory = machine.memory
    offset = memory.offsets(address, size, f"{kind} by {text}")
    memory.note(kind, machine.number[thread], offset, size, text)
    way = "read" if kind == "load" else "written"
    machine.counts[f"sectors {way}"] += sectors(thread, offset)
    machine.counts[f"bytes {way}"] += offset.size * size
    return offset


def _parts(operand: Operand) -> tuple:
    return operand if isinstance(operand, tuple) else (operand,)


def _units(machine: Machine, instruction: Instruction, kind: str, mask: Mask, address: Operand, parts: int) -> tuple:
    """(threads, the memory in units of an element, where each thread's first element is)."""
    width = int(instruction.type[1:]) // 8
    thread = machine.threads(mask)
    at = machine.address(address)[thread]
    if instruction.modifiers[0].startswith("shared"):
        machine.counts[f"shared bytes {kind}"] += at.size * width * parts
        units = machine.shared.units(machine.slot[thread], at, width * parts, width, instruction.text)
        return thread, machine.shared.views[width], units
    if "global" not in instruction.modifiers:
        raise NotImplementedError(instruction.text)
    offset = global_offsets(machine, kind, thread, at, width * parts, instruction.text)
    return thread, machine.memory.bytes.view(f"u{width}"), offset // width


def load(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    result, source = instruction.operands
    if instruction.modifiers[0] == "param":
        assert isinstance(source, Address)
        position, kind = machine.program.params[str(source.symbol)]
        value = machine.params[position] if position < len(machine.params) else 0  # behind: scratch nobody uses
        floating = kind.startswith("f")
        bits = int(kind[1:]) // 8
        stored = (
            np.array([value], f"f{bits}").view(f"u{bits}")
            if floating
            else np.array([int(value) % 2 ** (8 * bits)], f"u{bits}")
        )
        machine.write(result, stored[0], mask)
        return
    results = _parts(result)
    thread, memory, at = _units(machine, instruction, "load", mask, source, len(results))
    for i, part in enumerate(results):
        if part.name != "_":
            register = machine.register(part.name)
            value = memory[at + i]
            register[thread] = value.view(register.dtype) if value.itemsize == register.itemsize else value
    return


def store(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    destination, source = instruction.operands
    sources = _parts(source)
    thread, memory, at = _units(machine, instruction, "store", mask, destination, len(sources))
    for i, part in enumerate(sources):
        value = machine.read(part, instruction.type)
        memory[at + i] = value[thread] if np.ndim(value) else value


def copy(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """cp.async: global to shared memory, done when it is waited for."""
    if "commit_group" in instruction.modifiers:
        machine.copies.commit(machine.threads(mask))
        return
    if "wait_group" in instruction.modifiers:
        (latest,) = instruction.operands
        assert isinstance(latest, Immediate)
        machine.copies.wait(machine.threads(mask), latest.number)
        return
    if instruction.modifiers[1] not in ("ca", "cg"):
        raise NotImplementedError(instruction.text)
    to, source, size_, *given = instruction.operands
    assert isinstance(size_, Immediate)
    size, thread = size_.number, machine.threads(mask)
    target = machine.address(to)[thread]
    first = machine.shared.units(machine.slot[thread], target, size, 4, instruction.text)
    where = first[:, None] + np.arange(size // 4)
    bytes_ = np.broadcast_to(machine.read(given[0], "u32") if given else np.uint32(size), (machine.size,))[thread]
    reads = bytes_ > 0  # else zeros are written
    if (bytes_[reads] != size).any():
        raise NotImplementedError(f"a part of a copy: {instruction.text}")
    address = machine.address(source)[thread][reads]
    offset = global_offsets(machine, "load", thread[reads], address, size, instruction.text)
    data = np.zeros(where.shape, np.uint32)
    data[reads] = machine.memory.bytes.view(np.uint32)[(offset // 4)[:, None] + np.arange(size // 4)]
    machine.shared.views[4][where] = POISON

    def land(which: np.ndarray) -> None:
        machine.shared.views[4][where[which]] = data[which]

    machine.copies.begin(thread, land)


def load_matrix(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """ldmatrix: 8×8 matrices of 16-bit elements, the rows at addresses that threads give."""
    results, source = instruction.operands
    warp, matrices, row, column = _matrices(machine, instruction, source, mask, len(_parts(results)))
    for part, units in zip(_parts(results), matrices, strict=True):
        matrix = machine.shared.views[2][units]  # [warps, 8, 8]
        matrix = matrix.transpose(0, 2, 1) if "trans" in instruction.modifiers else matrix
        low, high = matrix[:, row, column].astype(np.uint32), matrix[:, row, column + 1].astype(np.uint32)
        machine.register(part.name).reshape(-1, 32)[warp] = low | (high << np.uint32(16))


def store_matrix(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """stmatrix, the inverse of ldmatrix."""
    destination, sources = instruction.operands
    warp, matrices, row, column = _matrices(machine, instruction, destination, mask, len(_parts(sources)))
    for part, units in zip(_parts(sources), matrices, strict=True):
        value = machine.register(part.name).reshape(-1, 32)[warp]
        matrix = np.zeros((warp.size, 8, 8), np.uint16)
        matrix[:, row, column] = (value & np.uint32(0xFFFF)).astype(np.uint16)
        matrix[:, row, column + 1] = (value >> np.uint32(16)).astype(np.uint16)
        matrix = matrix.transpose(0, 2, 1) if "trans" in instruction.modifiers else matrix
        machine.shared.views[2][units] = matrix


def _matrices(machine: Machine, instruction: Instruction, address: Operand, mask: Mask, count: int) -> tuple:
    """(warps, for each matrix the units of its elements [warps, 8, 8], row and first column of a thread's pair)."""
    warp = machine.whole_warps(mask, instruction.text)
    at = machine.address(address).reshape(-1, 32)[warp]
    slot = machine.slot.reshape(-1, 32)[warp]
    units = []
    for i in range(count):
        rows = slice(8 * i, 8 * i + 8)
        first = machine.shared.units(slot[:, rows].ravel(), at[:, rows].ravel(), 16, 2, instruction.text)
        units.append(first.reshape(-1, 8)[:, :, None] + np.arange(8))
    lane = np.arange(32)
    return warp, units, lane // 4, lane % 4 * 2


HANDLERS: dict[str, Callable[[Any, Instruction, Mask], None]] = {
    "ld": load,
    "st": store,
    "cp": copy,
    "ldmatrix": load_matrix,
    "stmatrix": store_matrix,
}
