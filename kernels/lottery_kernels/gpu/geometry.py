"""Stride, padding and dilation of a convolution, and what the GPU kernels need to know of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..pattern import Grid, Pattern
from .launch import Index, Lines


class Geometry(NamedTuple):
    """Pairs (height, width)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Geometry:
        return cls(pair(stride), pair(padding), pair(dilation))

    def output(self, size: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """Height and width of the result of an image of `size`."""
        room = [size[i] + 2 * self.padding[i] - self.dilation[i] * (kernel[i] - 1) - 1 for i in (0, 1)]
        if min(room) < 0:
            raise ValueError(
                f"kernel {tuple(kernel)} with dilation {self.dilation} is larger than an image of {tuple(size)} with "
                f"padding {self.padding}"
            )
        return [room[i] // self.stride[i] + 1 for i in (0, 1)]

    def check_output(self, dy: Tensor, x_shape: Sequence[int], weight_shape: Sequence[int]) -> None:
        size = self.output(x_shape[2:], weight_shape[2:])
        if list(dy.shape[2:]) != size:
            raise ValueError(f"dy has shape {tuple(dy.shape)}, a convolution of this x gives height and width {size}")

    def constants(self, y: Tensor, x: Tensor, weight_shape: Sequence[int], groups: int) -> dict[str, int]:
        """What the kernels have compiled in, since a network meets few sizes of images."""
        return {
            **{"YH": y.shape[2], "YW": y.shape[3], "XH": x.shape[2], "XW": x.shape[3]},
            **{"STRIDE_XN": x.stride(0), "STRIDE_XH": x.stride(2), "STRIDE_XW": x.stride(3)},
            **{"K": x.shape[1] // groups, "N": y.shape[1] // groups, "GROUPS": groups, "KW": weight_shape[3]},
            **{"STRIDE_H": self.stride[0], "STRIDE_W": self.stride[1]},
            **{"PAD_H": self.padding[0], "PAD_W": self.padding[1]},
            **{"DILATION_H": self.dilation[0], "DILATION_W": self.dilation[1]},
        }

    def lines_by_phase(self, arrays: Index, weight_shape: Sequence[int], grid: Grid) -> Lines:
        """The transposed index sorted by phase; `begin` is `[phases · C + 1]`.

        Row h of dx with h = i · stride + o sees tap k if k · dilation - padding - o is divisible by the stride. Made
        once for a pattern and a geometry, without asking the device for anything.
        """
        (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w) = self
        if stride_h == stride_w == 1:
            return Lines(arrays.t_ptr, arrays.t_row, arrays.t_index, arrays.column, arrays.column_order)
        cache = _by_phase.setdefault(arrays.t_row, {})
        if self not in cache:
            device, columns = arrays.t_row.device, grid.groups * grid.cols
            tap = arrays.t_row.long() // grid.rows
            phase_h = (tap // weight_shape[3] * dilation_h - pad_h) % stride_h
            phase_w = (tap % weight_shape[3] * dilation_w - pad_w) % stride_w
            key, order = torch.sort((phase_h * stride_w + phase_w) * columns + arrays.column, stable=True)
            ends = torch.arange(stride_h * stride_w * columns + 1, device=device)
            begin = torch.searchsorted(key, ends).int()
            row, entry, line = (array[order] for array in (arrays.t_row, arrays.t_index, arrays.column))
            cache[self] = Lines(begin, row, entry, line, arrays.column_order)
        return cache[self]


_by_phase: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # t_row -> {Geometry: Lines}


def check_groups(pattern: Pattern, groups: int) -> None:
    if groups != pattern.groups:
        raise ValueError(f"groups={groups}, but the pattern was made for {pattern.groups}")


def pair(sizes: Sequence[int]) -> tuple[int, int]:
    return (int(sizes[0]), int(sizes[1]))
