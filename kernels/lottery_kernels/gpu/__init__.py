"""Triton kernels for CUDA tensors, registered into the operators when one first meets a CUDA tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

_library: torch.library.Library | None = None
_off: str | None = None  # why the backend cannot be had


def load() -> bool:
    """Registers the CUDA kernels once; whether they are in place. If not, `why_off` says why."""
    global _library, _off
    if _library is None and _off is None:
        try:
            launchers = _launchers()
        except Exception as error:  # triton missing, or broken in whatever way
            _off = f"triton cannot be imported: {type(error).__name__}: {error}"
            return False
        _library = torch.library.Library("lottery_kernels", "IMPL")
        for name, launcher in launchers.items():
            _library.impl(name, _kernel(name, launcher), "CUDA")
    return _library is not None


def why_off() -> str | None:
    """Why no CUDA tensor is served by these kernels on this machine, or None if they are."""
    if not torch.cuda.is_available():
        built = "this build of PyTorch has no CUDA" if torch.version.cuda is None else "no CUDA device was found"
        return f"no GPU: {built}"
    if not load():
        return _off
    from . import settings

    return settings.unsupported(torch.float16, (16, 16), settings.Target.current())


def tuned() -> dict[str, int]:
    """{GPU and version of Triton: how many launches it has measured settings for}: see `gpu.tune`."""
    if not load():
        return {}
    from . import tune

    return tune.stored()


def unsupported(dtype: torch.dtype, block: tuple[int, int]) -> str | None:
    """Why a layer with values of `dtype` in `block`s runs dense masked on a GPU, or None if its kernels run."""
    if not load():
        return _off
    from . import settings

    target = settings.Target.current() if torch.cuda.is_available() else None
    return settings.unsupported(dtype, block, target)


def nothing_to_save(weight_shape: Sequence[int], groups: int, dtype: torch.dtype) -> str | None:
    """Why skipping blocks cannot make a layer faster that is too narrow, or None if it can.

    A dense product does 2 · out · in/groups · taps operations for (out + in) numbers that it reads and writes. Where
    that is less than a GPU can do in the time that they take to move, the dense layer waits for memory already, and the
    sparse one moves the same numbers. An A100 does 200 operations a byte (312 TFLOP/s, 1.56 TB/s) on half types, an
    H100 more; in exact fp32 it is 12.
    """
    out, inputs, *taps = weight_shape
    moved = (out + inputs * groups) * dtype.itemsize
    intensity = 2 * out * inputs * math.prod(taps) / max(1, moved)
    needed = 200 if dtype.itemsize == 2 else 12
    if intensity >= needed:
        return None
    return (
        f"too narrow: {intensity:.0f} operations for a byte of its activations, a GPU does {needed} while it moves one"
    )


def _launchers() -> dict[str, Callable[..., torch.Tensor]]:
    from . import conv, conv_wgrad, linear

    return {
        "linear": linear.product,
        "linear_dgrad": linear.transposed_product,
        "linear_wgrad": linear.block_gradient,
        "conv2d": conv.product,
        "conv2d_dgrad": conv.transposed_product,
        "conv2d_wgrad": conv_wgrad.block_gradient,
    }


def _kernel(name: str, launcher: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    from ..operators import by_reference, check_tensors
    from .settings import unsupported as without_kernel

    reference = by_reference(name)
    op = getattr(torch.ops.lottery_kernels, name).default
    wgrad = name.endswith("wgrad")

    def kernel(*args: Any) -> torch.Tensor:
        if args[0].device != args[1].device:
            check_tensors(op, args)
        block = args[4] if wgrad else args[1].shape[1:]
        if without_kernel(args[0].dtype, tuple(block)) is None:
            return launcher(*args)
        return reference(*args)

    return kernel
