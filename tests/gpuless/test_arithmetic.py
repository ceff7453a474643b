"""Single instructions whose results PTX's manual gives."""

import numpy as np
import pytest

from . import arithmetic
from .parse import Immediate, Instruction, Register, parse

KERNEL = """
.visible .entry kernel() .reqntid 32 {{
    {instruction};
}}
"""


class Registers:
    """As much of a machine as one thread's arithmetic needs."""

    size = 1

    def __init__(self, **registers: int) -> None:
        self.registers, self.result = registers, 0

    def read(self, operand: Register | Immediate, type: str) -> np.ndarray:
        bits = operand.number if isinstance(operand, Immediate) else self.registers[operand.name.lstrip("%")]
        return np.array([bits], {"b16": np.uint16, "u64": np.uint64}.get(type, np.uint32))

    def write(self, operand: Register, value: np.ndarray, mask: None) -> None:
        self.result = int(np.asarray(value).ravel()[0])


def result(text: str, **registers: int) -> int:
    machine = Registers(**registers)
    instruction: Instruction = parse(KERNEL.format(instruction=text)).instructions[0]
    arithmetic.HANDLERS[instruction.name](machine, instruction, None)
    return machine.result


@pytest.mark.parametrize(
    ("selector", "expected"),
    [("0x3210", 0x80FF7F01), ("0xbbb3", 0xFFFFFF80), ("0x9810", 0x00007F01), ("0x4444", 0x22222222)],
)
def test_bytes_and_copies_of_their_signs(selector, expected):
    assert result(f"prmt.b32 %r, %a, %b, {selector}", a=0x80FF7F01, b=0x11111122) == expected


def test_the_high_half_of_a_product_of_64_bits():
    assert result("mul.hi.u64 %r, %a, %b", a=2**64 - 1, b=2**63 + 1) == (2**64 - 1) * (2**63 + 1) >> 64


def test_sums_of_products_in_bf16_are_rounded_once():
    one, two, tiny = 0x3F80, 0x4000, 0x3B80  # 2 + 2⁻⁸ is halfway to the next number, and rounds to even
    assert result("fma.rn.bf16 %r, %a, %b, %c", a=one, b=two, c=tiny) == two
    assert result("fma.rn.bf16 %r, %a, %b, %c", a=two, b=two, c=one) == 0x40A0  # 5


def test_pairs_in_bf16_are_multiplied_half_by_half():
    one, two, five = 0x3F80, 0x4000, 0x40A0
    pairs = {"a": two << 16 | one, "b": two << 16 | two, "c": one << 16 | two}
    assert result("fma.rn.bf16x2 %r, %a, %b, %c", **pairs) == five << 16 | 0x4080  # 5 and 4
