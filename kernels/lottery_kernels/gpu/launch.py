"""What every launcher does: reads a pattern's arrays, checks arguments, and launches on the right device."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .settings import Target, Tile, unsupported

MOST_PROGRAMS = 2**31 - 1  # of a CUDA grid's first dimension


class Index(NamedTuple):
    """The arrays of `Pattern.scheduled_index` by name."""

    row_ptr: Tensor
    col: Tensor
    t_ptr: Tensor
    t_row: Tensor
    t_index: Tensor
    row: Tensor
    row_order: Tensor
    column_order: Tensor
    alive: Tensor | None

    @classmethod
    def of(cls, index: Sequence[Tensor]) -> Index:
        alive = index[-1] if index[-1].dtype == torch.bool else None
        if len(index) != (8 if alive is None else 9):
            where = index[0].device
            raise ValueError(
                f"index holds {len(index)} arrays on {where}; GPU kernels take Pattern.scheduled_index, which is the "
                "index of a pattern on a CUDA device"
            )
        return cls._make([*index[:8], alive])

    @property
    def nnz(self) -> int:
        return self.col.shape[0]

    @property
    def alive_bytes(self) -> Tensor:
        """`alive` as bytes; where there is none, any array in its place: the kernel will not read it."""
        return self.col if self.alive is None else self.alive.view(torch.uint8)


def check(values: Tensor, index: Index, dims: int, groups: int = 1, **activations: tuple[Tensor | None, int]) -> Target:
    """Raises unless all tensors fit together and this target can run the blocks; returns the target.

    Args:
        values: `[nnz, r, c]`.
        dims: 2 for rows of features, 4 for images.
        groups: of a convolution; must divide the features of every activation.
        activations: name = (tensor, its features). Features are the second dimension, of `bias` the only one.

    Raises:
        TypeError: dtypes that differ. ValueError: devices that differ, a wrong shape, a block without a kernel.
    """
    if values.dim() != 3 or values.shape[0] != index.nnz:
        raise ValueError(f"values have shape {tuple(values.shape)}, the pattern has {index.nnz} live blocks")
    if index.col.device != values.device:
        raise ValueError(f"the pattern is on {index.col.device}, values are on {values.device}")
    for name, (tensor, features) in activations.items():
        if tensor is None:
            continue
        if tensor.device != values.device:
            raise ValueError(f"{name} is on {tensor.device}, values are on {values.device}")
        if tensor.dtype != values.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, values have {values.dtype}")
        if tensor.dim() != (1 if name == "bias" else dims):
            raise ValueError(f"{name} has {tensor.dim()} dimensions, this takes {1 if name == 'bias' else dims}")
        if tensor.shape[min(1, tensor.dim() - 1)] != features:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the weight needs {features} features")
        if features % groups:
            raise ValueError(f"{name} has {features} features, which groups={groups} does not divide")
    batches = {name: t.shape[0] for name, (t, _) in activations.items() if t is not None and name != "bias"}
    if len(set(batches.values())) > 1:
        (one, size), (other, size_too) = batches.items()
        raise ValueError(f"{one} has {size} {'rows' if dims == 2 else 'images'}, {other} has {size_too}")
    target = Target.current()
    reason = unsupported(values.dtype, (values.shape[1], values.shape[2]), target)
    if reason:
        raise ValueError(reason)
    return target


def launch(kernel: Any, programs: int, args: Sequence[Any], tile: Tile | None, **constants: Any) -> None:
    """`kernel` on `programs` programs, on the device of the first tensor of `args`.

    Raises:
        ValueError: more programs than a launch can have.
        RuntimeError: the GPU has not the resources, or its driver refuses, or an earlier kernel has failed.
    """
    if programs > MOST_PROGRAMS:
        raise ValueError(f"{_name(kernel)} would need {programs} programs; a launch has at most {MOST_PROGRAMS}")
    options = {} if tile is None else {"num_warps": tile.warps, "num_stages": tile.stages}
    device = args[0].device
    with _current_device(device):
        try:
            kernel[(programs,)](*args, **constants, **options)
        except OutOfResources as error:
            raise RuntimeError(
                f"{_name(kernel)} does not fit this GPU ({Target.current()}) with {tile}: {error}"
            ) from error
        except RuntimeError as error:
            raise RuntimeError(
                f"{_name(kernel)} could not be launched on {device} ({Target.current()}) with {tile}: {error}. The "
                "fault may be an earlier kernel's: CUDA_LAUNCH_BLOCKING=1 shows whose"
            ) from error


def _name(kernel: Any) -> str:
    return kernel.fn.__name__


def _current_device(device: torch.device) -> contextlib.AbstractContextManager:
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else contextlib.nullcontext()
