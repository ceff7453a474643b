"""PTX text as a list of instructions."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import numpy as np

WIDTHS = {"pred": bool, "b16": np.uint16, "b32": np.uint32, "f32": np.uint32, "b64": np.uint64, "f64": np.uint64}
FLOAT = re.compile(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}")


@dataclass(frozen=True)
class Register:
    """A register, `_` for a result that nobody wants; `negated` only of a predicate."""

    name: str
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    """A number, its bits if it is written as a hexadecimal float."""

    number: int
    float_bits: int = 0  # 32 or 64 if `number` is the bits of a float


@dataclass(frozen=True)
class Address:
    """`[%register + offset]`; `symbol` is a parameter's name, or None. Shared memory begins at 0."""

    registers: tuple[str, ...]
    offset: int
    symbol: str | None = None


Operand = Register | Immediate | Address | tuple


@dataclass(frozen=True)
class Instruction:
    """`@guard name.modifiers operands`; `target` is where a branch goes."""

    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    target: str | None
    text: str

    @property
    def type(self) -> str:
        return self.modifiers[-1]


@dataclass(frozen=True)
class Program:
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # name -> the instruction behind it
    registers: dict[str, type]  # name -> what holds its bits
    params: dict[str, tuple[int, str]]  # name -> (position, type)
    threads: int


@functools.lru_cache(maxsize=64)
def parse(ptx: str) -> Program:
    """The one kernel in `ptx`."""
    head, body = ptx[ptx.index(".entry") :].split(".reqntid", 1)
    params = {
        name: (i, kind) for i, (kind, name) in enumerate(re.findall(r"\.param \.(\w+)[^,)]*?(\w+)(?=[,\s]*[,)])", head))
    }
    threads = int(re.match(r"\s*(\d+)", body)[1])  # type: ignore[index]
    body = body[body.index("{") + 1 :]
    body = re.sub(r"//[^\n]*", "", body)
    body = re.sub(r"^\s*\.(?:loc|file|pragma)[^\n]*$", "", body, flags=re.MULTILINE)
    body = re.sub(r"\n\s*\.section.*", "", body, flags=re.DOTALL)
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    registers: dict[str, type] = {}
    for statement in body.split(";"):
        text = " ".join(statement.split()).lstrip("{} ")
        while label := re.match(r"(\$[\w$]+):\s*(.*)", text):
            labels[label[1]] = len(instructions)
            text = label[2].lstrip("{} ")
        if declared := re.match(r"\.reg \.(\w+) (%\w+)<(\d+)>", text):
            registers |= {f"{declared[2]}{i}": WIDTHS[declared[1]] for i in range(int(declared[3]))}
        elif declared := re.match(r"\.reg \.(\w+) ([%\w, ]+)", text):
            registers |= {name.strip(): WIDTHS[declared[1]] for name in declared[2].split(",")}
        elif text and not text.startswith("."):
            instructions.append(_instruction(text))
    return Program(tuple(instructions), labels, registers, params, threads)


def _instruction(text: str) -> Instruction:
    guarded = re.match(r"@(!?)(%?\w+) (.*)", text)
    guard = Register(guarded[2], guarded[1] == "!") if guarded else None
    opcode, _, rest = (guarded[3] if guarded else text).partition(" ")
    name, *modifiers = opcode.replace("::", "_").split(".")
    if name == "bra":
        return Instruction(name, tuple(modifiers), (), guard, rest.strip(), text)
    return Instruction(name, tuple(modifiers), tuple(map(_operand, _split(rest))), guard, None, text)


def _split(text: str) -> list[str]:
    """At the commas outside of braces and brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(map(_operand, _split(text[1:-1])))
    if text.startswith("["):
        return _address(text[1:-1])
    if "|" in text:
        return tuple(map(_operand, text.split("|")))
    if FLOAT.fullmatch(text):
        return Immediate(int(text[2:], 16), 32 if text[1] in "fF" else 64)
    if re.match(r"-?\d", text):
        return Immediate(int(text.rstrip("U"), 0))
    if text == "global_smem":
        return Immediate(0)
    return Register(text.lstrip("!"), text.startswith("!"))


def _address(text: str) -> Address:
    registers, offset, symbol = [], 0, None
    for term in re.split(r"\s*\+\s*", text.strip()):
        if term.startswith("%"):
            registers.append(term)
        elif re.match(r"-?\d", term):
            offset += int(term, 0)
        elif term != "global_smem":
            symbol = term
    return Address(tuple(registers), offset, symbol)
