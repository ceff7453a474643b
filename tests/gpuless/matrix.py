"""Matrix instructions: mma.sync of a warp, wgmma of four. Products are exact, sums are in fp32."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .arithmetic import bf16_to_float, to_tf32
from .parse import Immediate, Instruction, Operand

if TYPE_CHECKING:
    from .execute import Machine

Mask = np.ndarray | None
LANE = np.arange(32)
ROW, PAIR = LANE // 4, LANE % 4  # where a thread's elements of a fragment lie
SPANS = {0: 0, 1: 3, 2: 2, 3: 1}  # swizzle mode of a descriptor -> log2 of its span / 16 bytes


def _decoded(bits: np.ndarray, kind: str) -> np.ndarray:
    if kind == "tf32":
        return to_tf32(bits)
    return bf16_to_float(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def _fragment(machine: Machine, operand: Operand, warp: np.ndarray) -> np.ndarray:
    """Registers of a fragment, `[warps, 32, registers]`."""
    assert isinstance(operand, tuple)
    return np.stack([machine.register(part.name).reshape(-1, 32)[warp] for part in operand], 2)


def _halves(bits: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    low, high = (bits & np.uint32(0xFFFF)).astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)
    return _decoded(low, kind), _decoded(high, kind)


def _matrix_a(bits: np.ndarray, kind: str) -> np.ndarray:
    """A, `[warps, 16, 16]` or for tf32 `[warps, 16, 8]`, from its fragment."""
    if kind == "tf32":
        a = np.zeros((bits.shape[0], 16, 8), np.float32)
        for i in range(4):
            a[:, ROW + 8 * (i & 1), PAIR + 4 * (i >> 1)] = _decoded(bits[:, :, i], kind)
        return a
    a = np.zeros((bits.shape[0], 16, 16), np.float32)
    low, high = _halves(bits, kind)
    for i in range(4):
        row, k = ROW + 8 * (i & 1), 2 * PAIR + 8 * (i >> 1)
        a[:, row, k], a[:, row, k + 1] = low[:, :, i], high[:, :, i]
    return a


def _matrix_b(bits: np.ndarray, kind: str) -> np.ndarray:
    """B, `[warps, 16, 8]` or for tf32 `[warps, 8, 8]`, from its fragment."""
    if kind == "tf32":
        b = np.zeros((bits.shape[0], 8, 8), np.float32)
        for i in range(2):
            b[:, PAIR + 4 * i, ROW] = _decoded(bits[:, :, i], kind)
        return b
    b = np.zeros((bits.shape[0], 16, 8), np.float32)
    low, high = _halves(bits, kind)
    for i in range(2):
        k = 2 * PAIR + 8 * i
        b[:, k, ROW], b[:, k + 1, ROW] = low[:, :, i], high[:, :, i]
    return b


def multiply_of_a_warp(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """mma.sync: D [16, 8] = A B + C."""
    d, a, b, c = instruction.operands
    shape, kind = instruction.modifiers[2], instruction.modifiers[-2]
    if (shape, kind) not in (("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "tf32")):
        raise NotImplementedError(instruction.text)
    warp = machine.whole_warps(mask, instruction.text)
    machine.counts["mma"] += warp.size
    machine.counts["multiply-adds"] += warp.size * 16 * 8 * int(shape.split("k")[1])
    product = _matrix_a(_fragment(machine, a, warp), kind) @ _matrix_b(_fragment(machine, b, warp), kind)
    assert isinstance(d, tuple) and isinstance(c, tuple)
    for i, (result, addend) in enumerate(zip(d, c, strict=True)):
        added = machine.read(addend, "f32")
        added = added.reshape(-1, 32)[warp] if np.ndim(added) else added
        total = added + product[:, ROW + 8 * (i >> 1), 2 * PAIR + (i & 1)]
        machine.register(result.name).reshape(-1, 32)[warp] = total.astype(np.float32).view(np.uint32)


def multiply_of_four_warps(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """wgmma: D [64, n] = A B + D with B, and mostly A, in shared memory; done when it is waited for."""
    if "mma_async" not in instruction.modifiers:
        if "commit_group" in instruction.modifiers:
            machine.products.commit(machine.whole_warps(mask, instruction.text))
        elif "wait_group" in instruction.modifiers:
            (latest,) = instruction.operands
            assert isinstance(latest, Immediate)
            machine.products.wait(machine.whole_warps(mask, instruction.text), latest.number)
        return
    warp = machine.whole_warps(mask, instruction.text)
    n, k = map(int, re.search(r"n(\d+)k(\d+)", instruction.text).groups())  # type: ignore[union-attr]
    machine.counts["mma"] += warp.size // 4
    machine.counts["multiply-adds"] += warp.size // 4 * 64 * n * k
    d, a, b, scale, *numbers = instruction.operands
    options = [number.number for number in numbers if isinstance(number, Immediate)]
    if options[:2] != [1, 1]:
        raise NotImplementedError(f"negated operands: {instruction.text}")
    kind, transposed = instruction.type, options[2:]  # of half types, for each operand in shared memory
    keep = np.broadcast_to(machine.read(scale, "pred"), (machine.size,)).reshape(-1, 32)[warp, 0].copy()
    # Registers may not change before the wait, but the descriptors' registers may.
    described = {name: machine.register(name).copy() for name in _descriptors(a, b)}

    def finish(which: np.ndarray) -> None:
        warps = warp[which]
        first = warps[::4]  # of each four
        slot = machine.slot[first * 32]
        trans_a, trans_b = (
            (transposed[0], transposed[1]) if len(transposed) == 2 else (0, transposed[0] if transposed else 0)
        )
        if isinstance(a, tuple):
            left = _matrix_a(_fragment(machine, a, warps), kind).reshape(-1, 64, k)
        else:
            left = _tile(machine, described[a.name][first * 32], (64, k), kind, trans_a, slot, instruction.text)
        right = _tile(machine, described[b.name][first * 32], (n, k), kind, trans_b, slot, instruction.text)
        product = (left @ right.transpose(0, 2, 1)).reshape(-1, 16, n)  # for each warp its 16 rows
        assert isinstance(d, tuple)
        for i, result in enumerate(d):
            register = machine.register(result.name).reshape(-1, 32)
            old = np.where(keep[which][:, None], register[warps].view(np.float32), np.float32(0))
            new = old + product[:, ROW + 8 * ((i >> 1) & 1), 8 * (i >> 2) + 2 * PAIR + (i & 1)]
            register[warps] = new.astype(np.float32).view(np.uint32)

    machine.products.begin(warp, finish)


def _descriptors(*operands: Operand) -> list[str]:
    return [operand.name for operand in operands if not isinstance(operand, tuple)]  # type: ignore[union-attr]


def _tile(
    machine: Machine,
    descriptor: np.ndarray,
    shape: tuple[int, int],
    kind: str,
    transposed: int,
    slot: np.ndarray,
    text: str,
) -> np.ndarray:
    """A matrix `[n, rows, k]` from shared memory, as a matrix descriptor describes its canonical layout."""

    def field(first: int, bits: int) -> np.ndarray:
        return ((descriptor >> np.uint64(first)) & np.uint64((1 << bits) - 1)).astype(np.int64)[:, None, None]

    start, leading, stride, swizzle = field(0, 14) * 16, field(16, 14) * 16, field(32, 14) * 16, field(62, 2)
    if (swizzle != swizzle[0]).any() or field(49, 3).any():
        raise NotImplementedError(f"descriptors that differ or have an offset: {text}")
    size = 4 if kind == "tf32" else 2
    log_span = SPANS[int(swizzle[0, 0, 0])]
    span = 16 << log_span  # bytes of a row of the swizzle pattern
    row, column = np.arange(shape[0])[:, None], np.arange(shape[1])[None, :]
    if not transposed:
        within = column * size
        offset = row // 8 * stride + row % 8 * span + within
        if not log_span:
            offset = row // 8 * stride + row % 8 * 16 + within // 16 * leading + within % 16
    else:
        across = span // size
        inner = column // 8 * stride + column % 8 * span
        offset = row // across * leading + row % across * size + inner
        if not log_span:
            offset = row // across * stride + row % across * size + column // 8 * leading + column % 8 * 16
    at = start + offset
    at = at ^ (((at >> 7) & ((1 << log_span) - 1)) << 4)
    units = machine.shared.units(np.broadcast_to(slot[:, None, None], at.shape), at, size, size, text)
    return _decoded(np.ascontiguousarray(machine.shared.views[size][units]), kind)


HANDLERS: dict[str, Callable[[Any, Instruction, Mask], None]] = {
    "mma": multiply_of_a_warp,
    "wgmma": multiply_of_four_warps,
}
