"""Executes a parsed kernel: all threads of all programs at once, one instruction after another."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

import numpy as np

from . import arithmetic, matrix, transfer
from .memory import Fault, GlobalMemory, SharedMemory
from .parse import Address, Immediate, Instruction, Operand, Program, Register

TYPES: dict[str, type] = {
    **{f"{kind}{bits}": getattr(np, f"uint{bits}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": getattr(np, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": getattr(np, f"float{bits}") for bits in (16, 32, 64)},
}
STEPS = 5_000_000  # instructions after which a launch is taken to hang

Handler = Callable[["Machine", Instruction, np.ndarray | None], None]


class Asynchronous:
    """Operations that happen as late as the wait instructions allow.

    A unit (a thread or a warp) commits what it has begun as a group, and waits until all but its latest n are done.
    """

    def __init__(self, units: int) -> None:
        self._committed = np.zeros(units, np.int64)
        self._begun: list[tuple[np.ndarray, np.ndarray, Callable[[np.ndarray], None]]] = []

    def begin(self, units: np.ndarray, finish: Callable[[np.ndarray], None]) -> None:
        """`finish(which)` does the operation for those of `units` that the bool array picks."""
        self._begun.append((units, self._committed[units], finish))

    def commit(self, units: np.ndarray) -> None:
        self._committed[units] += 1

    def wait(self, units: np.ndarray, latest: int) -> None:
        waiting = np.zeros(self._committed.size, bool)
        waiting[units] = True
        left = []
        for begun, group, finish in self._begun:
            done = waiting[begun] & (group < self._committed[begun] - latest)
            if done.any():
                finish(done)
            if not done.all():
                keep = np.flatnonzero(~done)
                left.append((begun[keep], group[keep], _picked(finish, keep, begun.size)))
        self._begun = left


def _picked(finish: Callable[[np.ndarray], None], keep: np.ndarray, size: int) -> Callable[[np.ndarray], None]:
    def rest(done: np.ndarray) -> None:
        which = np.zeros(size, bool)
        which[keep[done]] = True
        finish(which)

    return rest


class Machine:
    """One launch. Arrays have an entry per thread, `size` in all: programs in order, their threads in order.

    Threads whose paths part are run lowest instruction first, so that they meet again. `active` are those that run
    now (None: all), a handler's `mask` those of them that its guard lets through.
    """

    def __init__(
        self,
        program: Program,
        params: Sequence[int | float],
        grid: tuple[int, int, int],
        shared: int,
        memory: GlobalMemory,
        counts: collections.Counter,
        programs: Sequence[int] | None = None,
    ) -> None:
        self.program, self.params, self.memory, self.counts = program, params, memory, counts
        self.executed = np.zeros(len(program.instructions), np.int64)  # by how many warps, for each instruction
        chosen = np.arange(grid[0] * grid[1] * grid[2]) if programs is None else np.asarray(programs)
        self.size = chosen.size * program.threads
        self.warps = self.size // 32
        thread = np.arange(self.size)
        self.slot = thread // program.threads  # which of the executed programs
        self.number = chosen[self.slot].astype(np.int32)  # its number in the grid
        self.shared = SharedMemory(chosen.size, shared)
        self.copies = Asynchronous(self.size)
        self.products = Asynchronous(self.warps)
        self._registers: dict[str, np.ndarray] = {}
        tid, zero = (thread % program.threads).astype(np.uint32), np.zeros(self.size, np.uint32)
        self._registers |= {"%tid.x": tid, "%tid.y": zero, "%tid.z": zero, "%laneid": tid % np.uint32(32)}
        across = (self.number % grid[0], self.number // grid[0] % grid[1], self.number // grid[0] // grid[1])
        for axis, number, count in zip("xyz", across, grid, strict=True):
            self._registers[f"%ctaid.{axis}"] = number.astype(np.uint32)
            self._registers[f"%nctaid.{axis}"] = np.full(self.size, count, np.uint32)

    # Registers

    def register(self, name: str) -> np.ndarray:
        """The bits of a register; a register that was never written reads as zero."""
        if name not in self._registers:
            self._registers[name] = np.zeros(self.size, self.program.registers[name])
        return self._registers[name]

    def read(self, operand: Operand, type: str) -> np.ndarray:
        """An operand as `type`: an array, or one number for all threads."""
        if isinstance(operand, Register):
            bits = self.register(operand.name)
            if bits.dtype == bool:
                return ~bits if operand.negated else bits
            dtype = TYPES[type]
            return bits.view(dtype) if bits.dtype.itemsize == np.dtype(dtype).itemsize else bits.astype(dtype)
        assert isinstance(operand, Immediate), operand
        if type == "pred":
            return np.bool_(operand.number != 0)  # type: ignore[return-value]
        if operand.float_bits:
            return np.array([operand.number], f"u{operand.float_bits // 8}").view(f"f{operand.float_bits // 8}")[0]
        bits = np.dtype(TYPES[type]).itemsize * 8
        return np.array([operand.number & ((1 << bits) - 1)], f"u{bits // 8}").view(TYPES[type])[0]

    def write(self, operand: Operand, value: np.ndarray, mask: np.ndarray | None) -> None:
        assert isinstance(operand, Register), operand
        if operand.name == "_":
            return
        bits = self.register(operand.name)
        value = np.asarray(value)
        if bits.dtype != bool:
            same = value.dtype.itemsize == bits.dtype.itemsize
            value = np.ascontiguousarray(value).view(bits.dtype) if same else value.astype(bits.dtype)
        np.copyto(
            bits,
            value if value.size > 1 or value.ndim == 0 else value.reshape(()),
            where=True if mask is None else mask,
        )

    def address(self, operand: Operand) -> np.ndarray:
        assert isinstance(operand, Address), operand
        total = np.full(self.size, operand.offset, np.int64)
        for name in operand.registers:
            total += self.register(name).astype(np.int64)
        return total

    def threads(self, mask: np.ndarray | None) -> np.ndarray:
        return np.arange(self.size) if mask is None else np.flatnonzero(mask)

    def whole_warps(self, mask: np.ndarray | None, what: str) -> np.ndarray:
        """Numbers of the warps that execute an instruction which all threads of a warp must execute."""
        if mask is None:
            return np.arange(self.warps)
        lanes = mask.reshape(-1, 32)
        if (lanes.any(1) != lanes.all(1)).any():
            raise Fault(f"only a part of a warp executes {what}")
        return np.flatnonzero(lanes[:, 0])

    # Control

    def run(self) -> None:
        code, starts = self.program.instructions, set(self.program.labels.values())
        handlers = [HANDLERS.get(instruction.name) for instruction in code]
        at = np.zeros(self.size, np.int64)
        alive = np.ones(self.size, bool)
        self._follow(alive, at)
        with np.errstate(all="ignore"):
            for _ in range(STEPS):
                pc = self._pc
                if self.active is not None and pc in starts:
                    at[self.active] = pc
                    self._follow(alive, at)
                    pc = self._pc
                instruction = code[pc]
                mask = self._guarded(instruction.guard)
                self.executed[pc] += self._warps_active
                if instruction.name in ("bra", "ret", "exit"):
                    taken = (alive if self.active is None else self.active) if mask is None else mask
                    at[alive if self.active is None else self.active] = pc + 1
                    if instruction.name == "bra":
                        at[taken] = self.program.labels[str(instruction.target)]
                    else:
                        alive[taken] = False
                    if not alive.any():
                        break
                    self._follow(alive, at)
                    continue
                handler = handlers[pc]
                if handler is None:
                    raise NotImplementedError(f"the emulator does not know {instruction.text}")
                handler(self, instruction, mask)
                self._pc += 1
            else:
                raise Fault(f"not at an end after {STEPS} instructions")
        self.counts["instructions"] += int(self.executed.sum())

    def _follow(self, alive: np.ndarray, at: np.ndarray) -> None:
        """Makes those threads active that are the least far."""
        self._pc = int(at[alive].min())
        active = alive & (at == self._pc)
        self.active = None if active.all() else active
        self._warps_active = self.warps if self.active is None else int(active.reshape(-1, 32).any(1).sum())

    def _guarded(self, guard: Register | None) -> np.ndarray | None:
        if guard is None:
            return self.active
        passed = self.read(guard, "pred")
        if self.active is not None:
            return passed & self.active
        return None if passed.all() else passed


def _nothing(machine: Machine, instruction: Instruction, mask: np.ndarray | None) -> None:
    """Barriers and fences: threads run in lock-step."""


HANDLERS: dict[str, Handler] = {
    **arithmetic.HANDLERS,
    **transfer.HANDLERS,
    **matrix.HANDLERS,
    **dict.fromkeys(("bar", "barrier", "fence", "membar"), _nothing),
}
