"""Triton's interpreter made honest.

As it comes, it multiplies the raw bits of bf16, computes tf32 exactly, reads outside of tensors in silence and sees no
race. Here `tl.dot` rounds as tensor cores do and has their least size, every access is checked against the kernel's
arguments, programs that touch what another one writes are found, and multiply-adds are counted.
"""

from __future__ import annotations

import collections
import contextlib
import types
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton._C.libtriton import ir
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.jit import JITFunction

from .arithmetic import bf16_to_float, float_to_bf16, to_tf32
from .memory import ATOMIC, NOBODY, SEVERAL, Fault

Builder, Handle = triton_interpreter.InterpreterBuilder, triton_interpreter.TensorHandle
LEAST_DEPTH = {8: 32, 16: 16, 32: 8, 64: 4}  # bits of an element -> the least inner dimension of a matrix instruction
PATCHED = (tl, tl.core, tl.math, tl.standard, tl.core.tensor, tl.core.dtype, tl.core.tensor_descriptor_base)


def interpret(kernel: JITFunction, grid: tuple[int, int, int], args: Sequence[Any]) -> collections.Counter:
    """Runs `kernel`, with all of its arguments in order, on CPU tensors; returns what was counted.

    Raises:
        Fault: an access out of bounds, a race, or a product too small for a tensor core.
    """
    checks = _Checks(dict(zip(kernel.arg_names, args, strict=True)))
    with _interpreting(), _patched(checks):
        try:
            _interpreted(kernel).run(*args, grid=grid, warmup=False)
        except InterpreterError as error:
            raise error.__cause__ or error from None
    return checks.counts


class _Checks:
    """The arguments' memory, and which program read and wrote each of its elements."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.counts: collections.Counter = collections.Counter()
        self.program = 0
        tensors = {
            (t.data_ptr(), _elements(t)): (name, t)
            for name, t in arguments.items()
            if isinstance(t, Tensor) and t.numel()
        }
        found = sorted((start, start + size * t.element_size(), name) for (start, size), (name, t) in tensors.items())
        self.starts = np.array([start for start, _, _ in found] or [0], np.int64)
        self.ends = np.array([end for _, end, _ in found] or [0], np.int64)
        self.names = [name for _, _, name in found] or ["nothing"]
        self.writer = [np.full(end - start, NOBODY, np.int32) for start, end, _ in found]
        self.reader = [owner.copy() for owner in self.writer]

    def access(self, kind: str, pointers: Any, mask: Any) -> None:
        shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
        address = np.broadcast_to(pointers.data, shape)[np.broadcast_to(mask.data, shape)].astype(np.int64).ravel()
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        self.counts[f"bytes {kind}"] += size * address.size
        if not address.size:
            return
        piece = np.maximum(np.searchsorted(self.starts, address, side="right") - 1, 0)
        outside = (address < self.starts[piece]) | (address + size > self.ends[piece])
        if outside.any():
            first = int(np.flatnonzero(outside)[0])
            over, name = address[first] - self.starts[piece[first]], self.names[piece[first]]
            raise Fault(
                f"program {self.program}: {kind} of {int(outside.sum())} elements, the first {over} bytes into {name}"
            )
        for i in np.unique(piece):
            self._race(kind, i, address[piece == i] - self.starts[i])

    def _race(self, kind: str, piece: int, at: np.ndarray) -> None:
        writer, reader = self.writer[piece], self.reader[piece]
        wrote, read = writer[at], reader[at]
        others = (wrote != NOBODY) & (wrote != self.program)
        if kind == "load":
            reader[at] = np.where((read == NOBODY) | (read == self.program), self.program, SEVERAL)
        elif kind == "store":
            others |= (read != NOBODY) & (read != self.program)
            if np.unique(at).size != at.size:
                raise Fault(f"program {self.program}: one store writes an element of {self.names[piece]} twice")
            writer[at] = self.program
        else:
            others = (wrote != NOBODY) & (wrote != ATOMIC) | (read != NOBODY)
            writer[at] = ATOMIC
        if others.any():
            raise Fault(f"race: {kind} of program {self.program} where another one accesses {self.names[piece]}")


def _elements(tensor: Tensor) -> int:
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1


@contextlib.contextmanager
def _patched(checks: _Checks) -> Iterator[None]:
    """The interpreter's builder with honest arithmetic and checked memory."""
    names = (
        "create_dot",
        "binary_op",
        "cast_impl",
        "create_masked_load",
        "create_masked_store",
        "create_atomic_rmw",
        "set_grid_idx",
    )
    plain = {name: getattr(Builder, name) for name in names}

    def dot(self, a, b, c, precision, most):
        depth, least = a.data.shape[-1], LEAST_DEPTH[a.dtype.scalar.primitive_bitwidth]
        if depth < least:
            raise Fault(f"tl.dot over {depth} elements: tensor cores take {least} and more")
        x, y = (_operand(operand, precision) for operand in (a, b))
        checks.counts["multiply-adds"] += a.data.size * b.data.shape[-1]
        return Handle((np.matmul(x, y) + c.data).astype(c.data.dtype), c.dtype.scalar)

    def binary(self, left, right, op):
        bitwise = op in (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
        if left.dtype.scalar != tl.bfloat16 or left.data.dtype != np.uint16 or bitwise:
            return plain["binary_op"](self, left, right, op)
        result = op(bf16_to_float(left.data), bf16_to_float(right.data))
        return Handle(result if result.dtype == bool else float_to_bf16(result), left.dtype.scalar)

    def cast(self, source, type):
        of, to = source.dtype.scalar, type.scalar
        if of == tl.bfloat16 and to != tl.bfloat16:
            return Handle(bf16_to_float(source.data).astype(triton_interpreter._get_np_dtype(type)), to)
        if to == tl.bfloat16 and of != tl.bfloat16:
            return Handle(float_to_bf16(source.data.astype(np.float32)), to)
        return plain["cast_impl"](self, source, type)

    def load(self, pointers, mask, *rest):
        checks.access("load", pointers, mask)
        return plain["create_masked_load"](self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        checks.access("store", pointers, mask)
        return plain["create_masked_store"](self, pointers, value, mask, *rest)

    def atomic(self, op, pointers, value, mask, *rest):
        checks.access("atomic", pointers, mask)
        return plain["create_atomic_rmw"](self, op, pointers, value, mask, *rest)

    def begin_program(self, x, y, z):
        checks.program = (x * self.grid_dim[1] + y) * self.grid_dim[2] + z
        checks.counts["programs"] += 1
        return plain["set_grid_idx"](self, x, y, z)

    options = triton_interpreter.interpreter_builder.options
    precisions = ("tf32", "tf32x3", "ieee", "bf16x3", "bf16x6")
    triton_interpreter.interpreter_builder.options = triton_interpreter.InterpreterOptions(
        debug=True, allowed_dot_input_precisions=precisions
    )
    for name, function in zip(names, (dot, binary, cast, load, store, atomic, begin_program), strict=True):
        setattr(Builder, name, function)
    try:
        yield
    finally:
        triton_interpreter.interpreter_builder.options = options
        for name, function in plain.items():
            setattr(Builder, name, function)


def _operand(operand: Any, precision: Any) -> np.ndarray:
    """An operand of `tl.dot` as the tensor core reads it."""
    if operand.dtype.scalar == tl.bfloat16:
        return bf16_to_float(operand.data)
    if operand.dtype.scalar == tl.float32 and precision == ir.INPUT_PRECISION.TF32:
        return to_tf32(np.ascontiguousarray(operand.data, np.float32).view(np.uint32))
    return operand.data.astype(np.float64 if operand.data.dtype == np.float64 else np.float32)


@contextlib.contextmanager
def _interpreting() -> Iterator[None]:
    """Interprets kernels that were decorated for compilation, and puts back what the interpreter patches in `tl`."""
    before = [(owner, dict(vars(owner))) for owner in PATCHED]
    call = JITFunction.__call__
    try:
        with knobs.runtime.scope():
            knobs.runtime.interpret = True
            JITFunction.__call__ = lambda self, *args, **kwargs: _interpreted(self)(*args, **kwargs)
            yield
    finally:
        JITFunction.__call__ = call
        for owner, attributes in before:
            for name in vars(owner).keys() - attributes.keys():
                delattr(owner, name)
            for name, value in attributes.items():
                if vars(owner).get(name) is not value:
                    setattr(owner, name, value)


_functions: dict[Any, Any] = {}


def _interpreted(kernel: JITFunction) -> Any:
    """Over a copy of the function: the interpreter puts names into its globals."""
    fn = kernel.fn
    if fn not in _functions:
        copied = types.FunctionType(fn.__code__, dict(fn.__globals__), fn.__name__, fn.__defaults__, fn.__closure__)
        copied.__dict__.update(fn.__dict__)
        copied.__kwdefaults__, copied.__annotations__ = fn.__kwdefaults__, dict(fn.__annotations__)
        copied.__module__, copied.__qualname__ = fn.__module__, fn.__qualname__
        _functions[fn] = triton_interpreter.InterpretedFunction(copied)
    return _functions[fn]
