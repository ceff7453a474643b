"""A mask turned into index arrays.

A weight is looked at as a matrix, `[groups, out/groups, taps, in/groups]` (a linear layer has one group and one tap),
and tiled into blocks of `(rows, cols)` within one group and one tap. A `Pattern` lists the live blocks, those with at
least one remaining weight, twice: by output row (compressed sparse rows, the order of the packed `values`) and by input
column (the transpose, which points into the same values, so that they are never copied).

A 4×4 mask with 2×2 blocks, both 2×2 block columns numbered from 0:

    1 1 . .
    1 1 . .        row_ptr  0 1 3      block row 0 has entry 0, block row 1 entries 1 and 2
    . . 1 .        col      0 0 1      entry 0 lies in block column 0, entries 1 and 2 in 0 and 1
    . 1 . .        t_ptr    0 2 3      block column 0 has two entries of the transpose, column 1 has one
                   t_row    0 1 1      which lie in block rows 0 and 1, and 1
                   t_index  0 1 2      and are values[0], values[1] and values[2]
                   alive    [[1 1]   [[. .]   [[1 .]
                             [1 1]]   [. 1]]   [. .]]      None where every position of every live block remains
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

INT32_MAX = 2**31 - 1
RUNS = (1, 2, 4, 8)  # neighbouring block rows or columns that a program of a GPU may work off together


@dataclass(frozen=True)
class Grid:
    """How blocks of `(rows, cols)` tile a weight, from shapes alone."""

    groups: int
    rows: int  # block rows in a group
    taps: int
    cols: int  # block columns in a group and tap
    block: tuple[int, int]
    outputs: int  # out / groups
    inputs: int  # in / groups
    conv: bool
    kernel: tuple[int, ...]  # (kh, kw), or () for a linear weight

    @classmethod
    def of(cls, weight_shape: Sequence[int], block: tuple[int, int], groups: int = 1) -> Grid:
        out, inputs, *kernel = weight_shape
        outputs = out // groups
        rows, cols = -(-outputs // block[0]), -(-inputs // block[1])
        return cls(groups, rows, math.prod(kernel), cols, block, outputs, inputs, len(kernel) == 2, tuple(kernel))

    def split(self, weight: Tensor) -> Tensor:
        """Dense weight -> `[groups, rows, taps, cols, r, c]`; tail blocks are padded with zeros."""
        r, c = self.block
        matrix = weight.reshape(self.groups, self.outputs, self.inputs, self.taps).transpose(2, 3)
        pad = (0, self.cols * c - self.inputs, 0, 0, 0, self.rows * r - self.outputs)
        if any(pad):
            matrix = torch.nn.functional.pad(matrix, pad)
        return matrix.reshape(self.groups, self.rows, r, self.taps, self.cols, c).permute(0, 1, 3, 4, 2, 5)

    def join(self, blocks: Tensor) -> Tensor:
        """`[groups, rows, taps, cols, r, c]` -> dense weight with the strides of a new one; the inverse of `split`."""
        r, c = self.block
        matrix = blocks.permute(0, 1, 4, 2, 3, 5).reshape(self.groups, self.rows * r, self.taps, self.cols * c)
        matrix = matrix[:, : self.outputs, :, : self.inputs].transpose(2, 3)
        # flat first: a 1×1 kernel's strides would else pass for channels_last, and convolutions choose by them
        return matrix.reshape(-1).contiguous().view(self.groups * self.outputs, self.inputs, *self.kernel)


def entries(index: Sequence[Tensor], grid: Grid) -> tuple[Tensor, Tensor]:
    """Block row and column of each live block, int64 `[nnz]`, from the arrays of a pattern."""
    row_ptr, col = index[0].long(), index[1].long()
    rows = torch.arange(grid.groups * grid.rows, device=col.device)
    return torch.repeat_interleave(rows, row_ptr.diff(), output_size=col.shape[0]), col


def pack(weight: Tensor, index: Sequence[Tensor], block: tuple[int, int], groups: int = 1) -> Tensor:
    """Live blocks of a dense weight, `[nnz, r, c]`, zero where not alive. Differentiable."""
    grid = Grid.of(weight.shape, block, groups)
    row, col = entries(index, grid)
    blocks = grid.split(weight).reshape(grid.groups * grid.rows, grid.taps * grid.cols, *block)
    return alive_only(blocks[row, col], index)


def unpack(values: Tensor, index: Sequence[Tensor], weight_shape: Sequence[int], groups: int = 1) -> Tensor:
    """Dense weight with `values` at the live positions and zero elsewhere. Differentiable."""
    block = (values.shape[1], values.shape[2])
    grid = Grid.of(weight_shape, block, groups)
    row, col = entries(index, grid)
    blocks = values.new_zeros(grid.groups * grid.rows, grid.taps * grid.cols, *block)
    blocks = blocks.index_put((row, col), alive_only(values, index))
    return grid.join(blocks.reshape(grid.groups, grid.rows, grid.taps, grid.cols, *block))


def alive_only(values: Tensor, index: Sequence[Tensor]) -> Tensor:
    """`values` with dead positions set to zero; NaN and infinities there vanish too."""
    alive = index[-1]
    return values.where(alive, values.new_zeros(())) if alive.dtype == torch.bool else values


@dataclass(frozen=True, eq=False)
class Pattern:
    """Index arrays of the live blocks of one weight; immutable.

    All arrays are int32. With R block rows, C block columns of the input (groups and channel blocks, without taps) and
    nnz live blocks: `row_ptr [R + 1]`, `col [nnz]` (`tap * cols + channel block`), `t_ptr [C + 1]`, `t_row [nnz]`
    (`tap * rows + block row within the group`), `t_index [nnz]`; `alive` is bool `[nnz, r, c]`, or None where every
    position of every live block remains. The module's docstring has a worked example.

    `index` is these arrays as a list, `alive` last and left out if None. On a CUDA device the arrays of `schedule`
    stand between them.

    Make one with `Pattern.from_mask`.
    """

    weight_shape: tuple[int, ...]
    block: tuple[int, int]
    groups: int
    row_ptr: Tensor
    col: Tensor
    t_ptr: Tensor
    t_row: Tensor
    t_index: Tensor
    alive: Tensor | None
    live: int  # remaining weights
    on_cpu: Pattern | None = field(default=None, repr=False)  # what `to` copies from; None: this is it
    index: list[Tensor] = field(init=False, repr=False)  # the arrays as the operators take them

    def __post_init__(self) -> None:
        cuda = self.device.type == "cuda"
        object.__setattr__(self, "index", self.scheduled_index if cuda else [*self._arrays, *self._alive])
        if self.on_cpu is None:
            self._check_bounds()

    @classmethod
    def from_mask(cls, mask: Tensor, block: tuple[int, int] = (1, 1), groups: int = 1) -> Pattern:
        """The pattern of a bool mask in the shape of a dense weight, True where a weight remains.

        Args:
            mask: bool `[out, in]` or `[out, in/groups, kh, kw]`.
            block: (rows, cols) of a block. Sizes need not divide the weight's: tail blocks are padded.
            groups: of a convolution.

        Raises:
            TypeError: `mask` is no bool tensor, or `block` no pair of integers.
            ValueError: a shape, block or group count that does not fit, a mask on the meta device.
        """
        block = _check_arguments(mask, block, groups)
        grid = Grid.of(mask.shape, block, groups)
        blocks = grid.split(mask.detach().cpu())
        alive = blocks.flatten(-2).any(-1)  # [groups, rows, taps, cols]
        group, row, tap, col = alive.nonzero(as_tuple=True)
        nnz = row.numel()
        if max(nnz, grid.taps * grid.cols, grid.taps * grid.rows) > INT32_MAX:
            raise ValueError(f"mask has {nnz} live blocks of {block}: at most {INT32_MAX} can be indexed")

        t_key = ((group * grid.cols + col) * grid.taps + tap) * grid.rows + row
        t_index = t_key.argsort()
        kept = blocks[group, row, tap, col]
        pattern = cls(
            weight_shape=tuple(mask.shape),
            block=block,
            groups=groups,
            row_ptr=_pointers(group * grid.rows + row, grid.groups * grid.rows),
            col=(tap * grid.cols + col).int(),
            t_ptr=_pointers(group * grid.cols + col, grid.groups * grid.cols),
            t_row=(tap * grid.rows + row)[t_index].int(),
            t_index=t_index.int(),
            alive=None if kept.all() else kept,
            live=int(kept.sum()),
        )
        return pattern

    @property
    def device(self) -> torch.device:
        return self.col.device

    @property
    def nnz(self) -> int:
        """Live blocks."""
        return self.col.shape[0]

    @property
    def density(self) -> float:
        """Share of the weights that remain."""
        return self.live / max(1, math.prod(self.weight_shape))

    @property
    def mask(self) -> Tensor:
        """The mask that the pattern was made from: bool, in the dense weight's shape, on the pattern's device."""
        source = self.on_cpu or self
        ones = torch.ones(source.nnz, *self.block, dtype=torch.bool, device="cpu")
        return source.unpack(ones).to(self.device)

    def pack(self, weight: Tensor) -> Tensor:
        """Dense weight -> `values [nnz, r, c]`, zero where not alive. Differentiable."""
        if tuple(weight.shape) != self.weight_shape:
            raise ValueError(f"weight has shape {tuple(weight.shape)}, the pattern is of {self.weight_shape}")
        return pack(weight, self.to(weight.device).index, self.block, self.groups)

    def unpack(self, values: Tensor) -> Tensor:
        """`values [nnz, r, c]` -> dense weight, zero where pruned. Differentiable."""
        if tuple(values.shape) != (self.nnz, *self.block):
            raise ValueError(f"values have shape {tuple(values.shape)}, the pattern has {(self.nnz, *self.block)}")
        return unpack(values, self.to(values.device).index, self.weight_shape, self.groups)

    def to(self, device: torch.device | str) -> Pattern:
        """The same pattern on another device, always copied from the CPU: a meta device has nothing to copy from."""
        device = torch.device(device)
        if device == self.device:
            return self
        source = self.on_cpu or self
        if device.type == "cpu":
            return source
        names = ("row_ptr", "col", "t_ptr", "t_row", "t_index") + (("alive",) if source.alive is not None else ())
        moved = {name: getattr(source, name).to(device) for name in names}
        return replace(source, **moved, on_cpu=source)

    @cached_property
    def schedule(self) -> list[Tensor]:
        """What GPU kernels need besides, int32: `row [nnz]`, the block row of each entry; `column [nnz]`, the block
        column of each entry of the transpose; `row_order` and `column_order`, in what order to work off runs of `RUNS`
        neighbouring block rows or columns: for runs of one, of two and so on, one after another, the numbers of the
        runs by falling number of live blocks."""
        source = self.on_cpu or self
        pointers = [source.row_ptr, source.t_ptr]
        arrays = [torch.repeat_interleave(p.diff().long()) for p in pointers] + [_order_of_runs(p) for p in pointers]
        return [array.int().to(self.device) for array in arrays]

    @property
    def scheduled_index(self) -> list[Tensor]:
        """`index` as GPU kernels take it, on any device."""
        return [*self._arrays, *self.schedule, *self._alive]

    @property
    def _arrays(self) -> list[Tensor]:
        return [self.row_ptr, self.col, self.t_ptr, self.t_row, self.t_index]

    @property
    def _alive(self) -> list[Tensor]:
        return [] if self.alive is None else [self.alive]

    def __reduce__(self) -> tuple:
        """As NumPy arrays: `torch.load` moves tensors to where it is told, but this must come back on the CPU."""
        source = self.on_cpu or self
        kept = {item.name: getattr(source, item.name) for item in fields(Pattern) if item.init}
        return _unpickled, ({key: kept[key].numpy() if isinstance(kept[key], Tensor) else kept[key] for key in kept},)

    def __deepcopy__(self, memo: dict) -> Pattern:
        return self  # immutable

    def _check_bounds(self) -> None:
        """Kernels trust these arrays with addresses, so nothing out of range may enter (a damaged pickle, say)."""
        grid = Grid.of(self.weight_shape, self.block, self.groups)
        checks = {
            "row_ptr": _is_pointer(self.row_ptr, grid.groups * grid.rows, self.nnz),
            "t_ptr": _is_pointer(self.t_ptr, grid.groups * grid.cols, self.nnz),
            "col": _within(self.col, self.nnz, grid.taps * grid.cols),
            "t_row": _within(self.t_row, self.nnz, grid.taps * grid.rows),
            "t_index": _within(self.t_index, self.nnz, self.nnz),
            "alive": self.alive is None or tuple(self.alive.shape) == (self.nnz, *self.block),
        }
        for name, fits in checks.items():
            if not fits:
                raise ValueError(
                    f"{name} does not fit a pattern of {self.nnz} blocks {self.block} in a weight of "
                    f"shape {self.weight_shape}"
                )


def _unpickled(kept: dict[str, Any]) -> Pattern:
    arrays = {key: torch.from_numpy(value) for key, value in kept.items() if isinstance(value, np.ndarray)}
    return Pattern(**(kept | arrays))  # bounds are checked anew


def _pointers(row: Tensor, rows: int) -> Tensor:
    """Row numbers of sorted or unsorted entries -> int32 `[rows + 1]`, where each row's entries begin."""
    return torch.cat([row.new_zeros(1), torch.bincount(row, minlength=rows).cumsum(0)]).int()


def _order_of_runs(pointer: Tensor) -> Tensor:
    orders = []
    for size in RUNS:
        ends = torch.cat([pointer[:-1:size], pointer[-1:]])
        orders.append(ends.diff().argsort(descending=True, stable=True))
    return torch.cat(orders)


def runs(order: Tensor, lines: int, size: int) -> Tensor:
    """Of `row_order` or `column_order` of a pattern with `lines` block rows or columns: the runs of `size` of them."""
    before = sum(-(-lines // smaller) for smaller in RUNS if smaller < size)
    return order[before : before + -(-lines // size)]


def _is_pointer(pointer: Tensor, rows: int, nnz: int) -> bool:
    if pointer.dtype != torch.int32 or tuple(pointer.shape) != (rows + 1,):
        return False
    return bool(pointer[0] == 0 and pointer[-1] == nnz and (pointer.diff() >= 0).all())


def _within(array: Tensor, nnz: int, bound: int) -> bool:
    if array.dtype != torch.int32 or tuple(array.shape) != (nnz,):
        return False
    return nnz == 0 or bool(array.min() >= 0 and array.max() < bound)


def check_block(block: object) -> tuple[int, int]:
    """`block` as a pair of positive ints.

    Raises:
        TypeError, ValueError: it is none.
    """
    if not (isinstance(block, tuple | list) and len(block) == 2 and all(type(size) is int for size in block)):
        raise TypeError(f"block must be a pair of integers (rows, cols), got {block!r}")
    if min(block) < 1:
        raise ValueError(f"block must be positive, got {block!r}")
    return (block[0], block[1])


def _check_arguments(mask: Tensor, block: object, groups: int) -> tuple[int, int]:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, True where a weight remains, got {given}")
    if mask.dim() not in (2, 4):
        raise ValueError(f"mask must be [out, in] or [out, in/groups, kh, kw], got shape {tuple(mask.shape)}")
    if mask.is_meta:
        raise ValueError("mask is on the meta device and has no data: a pattern needs to know what remains")
    if type(groups) is not int or groups < 1 or mask.shape[0] % groups:
        raise ValueError(f"groups must be a positive integer that divides the {mask.shape[0]} outputs, got {groups!r}")
    return check_block(block)
