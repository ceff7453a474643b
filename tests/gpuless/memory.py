"""Global and shared memory that refuse what a GPU would silently do wrong."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from torch import Tensor

BASE = 0x7E0000000000  # where global memory begins, so that an offset is not taken for an address
NOBODY, SEVERAL, ATOMIC = -1, -2, -3
SECTOR = 32  # bytes that memory moves at once


class Fault(Exception):
    """What a GPU would answer with wrong numbers or an illegal access."""


class GlobalMemory:
    """The tensors that a launch was given, each in a piece of its own with nothing in between.

    With `races` it is kept which program read and wrote every two bytes: one program must not touch what another
    writes in the same launch.
    """

    def __init__(self, tensors: Sequence[Tensor], races: bool = True) -> None:
        self._of: dict[int, int] = {}  # id of a tensor -> offset
        self._pieces: list[tuple[Tensor, int, int]] = []  # tensor, offset, bytes
        placed: dict[tuple[int, int], int] = {}
        end = 4096
        for tensor in tensors:
            size = _extent(tensor)
            start = (end // 256 + 2) * 256 + tensor.data_ptr() % 256
            key = (tensor.data_ptr(), size)
            if size and key in placed:  # the same memory under two names
                self._of[id(tensor)] = placed[key]
                continue
            placed[key] = self._of[id(tensor)] = start
            if size:
                self._pieces.append((tensor, start, size))
                end = start + size
        self.bytes = np.full((end // 512 + 2) * 512, 0xFF, np.uint8)
        for tensor, start, size in self._pieces:
            self.bytes[start : start + size] = _bytes(tensor, size)
        self._starts = np.array([start for _, start, _ in self._pieces] or [0])
        self._ends = np.array([start + size for _, start, size in self._pieces] or [0])
        self._writer = self._reader = None
        if races:
            self._writer = np.full(self.bytes.size // 2, NOBODY, np.int32)
            self._reader = self._writer.copy()

    def address(self, tensor: Tensor) -> int:
        return BASE + self._of[id(tensor)]

    def write_back(self) -> None:
        """What was stored, into the tensors."""
        for tensor, start, size in self._pieces:
            _bytes(tensor, size)[:] = self.bytes[start : start + size]

    def offsets(self, address: np.ndarray, size: int, what: str) -> np.ndarray:
        """Checked offsets into `bytes` of accesses of `size` bytes."""
        offset = address - BASE
        piece = np.maximum(np.searchsorted(self._starts, offset, side="right") - 1, 0)
        bad = (offset < self._starts[piece]) | (offset + size > self._ends[piece])
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            over = int(offset[first] - self._starts[piece[first]])
            tensor = self._pieces[piece[first]][0] if self._pieces else None
            where = "no tensor" if tensor is None else f"a tensor of shape {tuple(tensor.shape)}"
            raise Fault(f"{int(bad.sum())} threads outside of any tensor, the first {over} bytes into {where}: {what}")
        if (offset % size).any():
            raise Fault(f"misaligned access of {size} bytes: {what}")
        return offset

    def note(self, kind: str, program: np.ndarray, offset: np.ndarray, size: int, what: str) -> None:
        """Remembers a load, store or atomic by `program`s; raises at a race."""
        if self._writer is None or self._reader is None:
            return
        for first in range(0, max(size, 2), 2):
            at = (offset + first) // 2
            writer, reader = self._writer[at], self._reader[at]
            if kind == "load":
                bad = (writer != NOBODY) & (writer != program)
                self._reader[at] = np.where((reader == NOBODY) | (reader == program), program, SEVERAL)
                self._reader[at[self._reader[at] != program]] = SEVERAL  # two programs in this very instruction
            elif kind == "store":
                bad = ((writer != NOBODY) & (writer != program)) | ((reader != NOBODY) & (reader != program))
                self._writer[at] = program
                bad |= self._writer[at] != program
            else:
                bad = (writer != NOBODY) & (writer != ATOMIC) | (reader != NOBODY)
                self._writer[at] = ATOMIC
            if bad.any():
                raise Fault(f"race between programs, {int(bad.sum())} threads: {what}")


class SharedMemory:
    """`size` bytes for each of `programs` programs, poisoned; addresses are a program's own."""

    def __init__(self, programs: int, size: int) -> None:
        self.size = size
        self.stride = (size // 1024 + 2) * 1024
        self.bytes = np.full(programs * self.stride, 0xFF, np.uint8)
        self.views = {width: self.bytes.view(f"u{width}") for width in (1, 2, 4, 8)}

    def units(self, program: np.ndarray, address: np.ndarray, size: int, width: int, what: str) -> np.ndarray:
        """Checked indices, in units of `width` bytes into `views[width]`, of accesses of `size` bytes."""
        if address.size and (address.min() < 0 or address.max() + size > self.size):
            raise Fault(f"outside of the {self.size} bytes of shared memory: {what}")
        if (address % min(size, 16)).any():
            raise Fault(f"misaligned access of shared memory: {what}")
        return (program * self.stride + address) // width


def sectors(thread: np.ndarray, offset: np.ndarray) -> int:
    """Sectors that aligned accesses touch, each counted once for every warp instruction."""
    if offset.size == 0:
        return 0
    key = np.sort((thread // 32) * (1 << 40) + offset // SECTOR)
    return 1 + int(np.count_nonzero(key[1:] != key[:-1]))


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    if tensor.numel() == 0:
        return 0
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()


def _bytes(tensor: Tensor, size: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(tensor.data_ptr()))
