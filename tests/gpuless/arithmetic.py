"""Instructions that compute registers from registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .parse import Instruction

if TYPE_CHECKING:
    from .execute import Machine

Mask = np.ndarray | None
WIDER = {"s16": np.int32, "u16": np.uint32, "s32": np.int64, "u32": np.uint64}
COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}


def bf16_to_float(bits: np.ndarray) -> np.ndarray:
    """uint16 -> float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bf16(number: np.ndarray) -> np.ndarray:
    """float32 -> uint16, to the nearest, halves to even."""
    bits = np.ascontiguousarray(number, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(number), np.uint16(0x7FFF), rounded.astype(np.uint16))


def to_tf32(bits: np.ndarray) -> np.ndarray:
    """uint32 -> float32, cut off after the 10 bits of mantissa that a tf32 matrix instruction reads."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def elementwise(compute: Callable[..., Any]) -> Callable[[Machine, Instruction, Mask], None]:
    def run(machine: Machine, instruction: Instruction, mask: Mask) -> None:
        result, *operands = instruction.operands
        kind = _plain(instruction.type)
        if kind in ("s16x2", "u16x2"):  # two numbers in a register
            half = np.dtype("i2" if kind[0] == "s" else "u2")
            bits = (np.broadcast_to(machine.read(operand, "u32"), machine.size) for operand in operands)
            value = compute(*(np.ascontiguousarray(pair).view(half) for pair in bits)).astype(half).view(np.uint32)
        else:
            value = compute(*(machine.read(operand, kind) for operand in operands))
        machine.write(result, value, mask)

    return run


def bitwise(on_bits: Callable[..., Any], on_predicates: Callable[..., Any]) -> Callable[..., None]:
    def run(machine: Machine, instruction: Instruction, mask: Mask) -> None:
        compute = on_predicates if instruction.type == "pred" else on_bits
        elementwise(compute)(machine, instruction, mask)

    return run


def _plain(kind: str) -> str:
    return {"bf16": "b16", "bf16x2": "b32", "f16x2": "b32"}.get(kind, kind)


def _extremum(wins: Callable[..., Any], ignoring_nan: Callable[..., Any]) -> Callable[..., None]:
    """min and max: of a number and a NaN the number, unless told .NaN."""

    def run(machine: Machine, instruction: Instruction, mask: Mask) -> None:
        floats = instruction.type.startswith("f") and "NaN" not in instruction.modifiers
        elementwise(ignoring_nan if floats else wins)(machine, instruction, mask)

    return run


def multiply(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    kind, (result, a, b, *added) = instruction.type, instruction.operands
    x, y = machine.read(a, kind), machine.read(b, kind)
    if "hi" in instruction.modifiers and x.itemsize == 8:  # Python's integers hold the product
        product = np.asarray(x.astype(object) * y.astype(object) >> 64).astype(x.dtype)
    elif "wide" in instruction.modifiers or "hi" in instruction.modifiers:
        wide = WIDER[kind]
        product = x.astype(wide) * y.astype(wide)
        if "hi" in instruction.modifiers:
            product = (product >> wide(x.itemsize * 8)).astype(x.dtype)
    else:
        product = x * y
    for operand in added:  # mad
        product = product + machine.read(operand, f"b{product.itemsize * 8}").view(product.dtype)
    machine.write(result, product, mask)


def fused_multiply_add(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Rounded once; twice in rare cases, since fp64 holds the product exactly but not always the sum."""
    result, *operands = instruction.operands
    kind = instruction.type
    if kind == "bf16":
        halves = [np.asarray(machine.read(operand, "b16")) for operand in operands]
        machine.write(result, _multiply_add_bf16(*halves), mask)
        return
    if kind == "bf16x2":
        pairs = [np.asarray(machine.read(operand, "b32")) for operand in operands]
        low, high = _multiply_add_bf16(*pairs), _multiply_add_bf16(*(pair >> 16 for pair in pairs))
        machine.write(result, high.astype(np.uint32) << 16 | low, mask)
        return
    if kind not in ("f16", "f32", "f64"):
        raise NotImplementedError(instruction.text)
    a, b, c = (machine.read(operand, kind).astype(np.float64) for operand in operands)
    machine.write(result, (a * b + c).astype(machine.read(operands[0], kind).dtype), mask)


def _multiply_add_bf16(*bits: np.ndarray) -> np.ndarray:
    """a · b + c of the low halves, as bits."""
    a, b, c = (bf16_to_float(one.astype(np.uint16)).astype(np.float64) for one in bits)
    return float_to_bf16((a * b + c).astype(np.float32))


def _quotient(a: Any, b: Any) -> Any:
    if np.issubdtype(np.asarray(a).dtype, np.floating):
        return a / b
    b = np.where(b == 0, np.ones_like(b), b)
    return ((a - np.fmod(a, b)) // b).astype(np.asarray(a).dtype)  # towards zero


def _remainder(a: Any, b: Any) -> Any:
    return np.fmod(a, np.where(b == 0, np.ones_like(b), b))


def shift(compute: Callable[..., Any]) -> Callable[..., None]:
    """Shifts by the width or more give what shifting one by one would."""

    def run(machine: Machine, instruction: Instruction, mask: Mask) -> None:
        result, a, by = instruction.operands
        value, count = machine.read(a, instruction.type), machine.read(by, "u32")
        bits = value.itemsize * 8
        shifted = compute(value, np.minimum(count, np.uint32(bits - 1)).astype(value.dtype))
        gone = (value >> value.dtype.type(bits - 1)) if instruction.type.startswith("s") else np.zeros_like(value)
        machine.write(result, np.where(count < bits, shifted, gone), mask)

    return run


def bit_field_extract(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    result, a, first, width = instruction.operands
    value, start, length = (machine.read(operand, "u32") for operand in (a, first, width))
    if np.ndim(start) or np.ndim(length) or start + length > 32:
        raise NotImplementedError(instruction.text)
    field = (value >> start) & np.uint32((1 << int(length)) - 1)
    if instruction.type == "s32":
        left = np.int32(32 - int(length))
        field = (np.asarray(field).view(np.int32) << left) >> left
    machine.write(result, field, mask)


def bit_field_insert(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    result, *operands = instruction.operands
    field, base, start, length = (machine.read(operand, "u32") for operand in operands)
    if np.ndim(start) or np.ndim(length):
        raise NotImplementedError(instruction.text)
    hole = np.uint32(((1 << int(length)) - 1) << int(start))
    machine.write(result, (base & ~hole) | ((field << start) & hole), mask)


def permute_bytes(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    result, *operands = instruction.operands
    a, b, selector = (machine.read(operand, "u32") for operand in operands)
    source = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    value = np.zeros(machine.size, np.uint32)
    for i in range(4):
        pick = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (source >> ((pick & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
        sign = (byte >> np.uint64(7)) * np.uint64(255)  # what a selector from 8 on asks for
        byte = np.where(pick > 7, sign, byte)
        value = value | (byte.astype(np.uint32) << np.uint32(8 * i))
    machine.write(result, value, mask)


def funnel_shift(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """shf: 32 bits out of a pair of registers."""
    result, *operands = instruction.operands
    low, high, by = (machine.read(operand, "u32") for operand in operands)
    count = (by & np.uint32(31) if "wrap" in instruction.modifiers else np.minimum(by, 32)).astype(np.uint64)
    pair = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
    shifted = pair >> count if "r" in instruction.modifiers else (pair << count) >> np.uint64(32)
    machine.write(result, shifted.astype(np.uint32), mask)


def compare(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """setp, with a third predicate also the combination with it."""
    result, a, b, *combined = instruction.operands
    name, kind = instruction.modifiers[0], instruction.type
    unordered = name.endswith("u") and name not in ("eq", "ne")
    unsigned = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
    relation = unsigned.get(name) or (name[:-1] if unordered else name)
    x, y = machine.read(a, kind), machine.read(b, kind)
    holds = COMPARISONS[relation](x, y)
    if kind.startswith("f") and relation == "ne" and not unordered:  # false if one is NaN
        holds = holds & ~(np.isnan(x) | np.isnan(y))
    elif unordered:
        holds = holds | np.isnan(x) | np.isnan(y)
    if combined:
        with_ = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[instruction.modifiers[1]]
        holds = with_(holds, machine.read(combined[0], "pred"))
    machine.write(result, holds, mask)


def select(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    result, a, b, condition = instruction.operands
    kind = instruction.type
    machine.write(result, np.where(machine.read(condition, "pred"), machine.read(a, kind), machine.read(b, kind)), mask)


def move(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """mov, which also packs several registers into one and takes one apart."""
    result, source = instruction.operands
    kind = instruction.type
    if isinstance(result, tuple):
        value = machine.read(source, kind)
        width = value.itemsize * 8 // len(result)
        for i, part in enumerate(result):
            machine.write(part, (value >> value.dtype.type(i * width)).astype(f"u{width // 8}"), mask)
    elif isinstance(source, tuple):
        bits = int(kind[1:])
        width = bits // len(source)
        value = np.zeros(machine.size, f"u{bits // 8}")
        for i, part in enumerate(source):
            piece = machine.read(part, f"b{width}").astype(value.dtype)
            value |= piece << value.dtype.type(i * width)
        machine.write(result, value, mask)
    else:
        machine.write(result, machine.read(source, kind), mask)


def convert(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    result, *sources = instruction.operands
    to, of = instruction.modifiers[-2:]
    if to in ("bf16x2", "f16x2"):
        narrow = float_to_bf16 if to == "bf16x2" else (lambda number: number.astype(np.float16).view(np.uint16))
        high, low = (narrow(machine.read(source, "f32")).astype(np.uint32) for source in sources)
        value = (high << np.uint32(16)) | low
    elif to == "tf32":
        value = (machine.read(sources[0], "b32") + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    else:
        value = bf16_to_float(machine.read(sources[0], "b16")) if of == "bf16" else machine.read(sources[0], of)
        if to == "bf16":
            value = float_to_bf16(value.astype(np.float32))
        else:
            if to[0] in "su" and of[0] in "fb":
                value = np.rint(value) if "rni" in instruction.modifiers else np.trunc(value)
            value = value.astype(machine_type(to))
    machine.write(result, value, mask)


def machine_type(kind: str) -> np.dtype:
    return np.dtype({"f": "float", "s": "int", "u": "uint", "b": "uint"}[kind[0]] + kind[1:])


def shuffle(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """shfl.sync: a register of another thread of the warp."""
    result, source, by, *_ = instruction.operands
    result = result[0] if isinstance(result, tuple) else result
    count, lane = machine.read(by, "s32"), np.arange(machine.size)
    within, first = lane % 32, lane // 32 * 32
    start = {
        "bfly": within ^ count,
        "idx": np.broadcast_to(count % 32, within.shape),
        "down": np.where(within + count < 32, within + count, within),
        "up": np.where(within >= count, within - count, within),
    }[instruction.modifiers[1]]
    machine.write(result, np.asarray(machine.read(source, "b32"))[first + start], mask)


HANDLERS: dict[str, Callable[[Any, Instruction, Mask], None]] = {
    "add": elementwise(np.add),
    "sub": elementwise(np.subtract),
    "neg": elementwise(np.negative),
    "abs": elementwise(np.abs),
    "div": elementwise(_quotient),
    "rem": elementwise(_remainder),
    "min": _extremum(np.minimum, np.fmin),
    "max": _extremum(np.maximum, np.fmax),
    "ex2": elementwise(np.exp2),
    "mul": multiply,
    "mad": multiply,
    "fma": fused_multiply_add,
    "and": bitwise(np.bitwise_and, np.logical_and),
    "or": bitwise(np.bitwise_or, np.logical_or),
    "xor": bitwise(np.bitwise_xor, np.logical_xor),
    "not": bitwise(np.invert, np.logical_not),
    "shl": shift(np.left_shift),
    "shr": shift(np.right_shift),
    "shf": funnel_shift,
    "bfe": bit_field_extract,
    "bfi": bit_field_insert,
    "prmt": permute_bytes,
    "setp": compare,
    "selp": select,
    "mov": move,
    "cvta": move,
    "cvt": convert,
    "shfl": shuffle,
}
