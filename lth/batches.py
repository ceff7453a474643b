"""A batch as the tensors that it holds, for steps that are captured or recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def tensors_of(batch: Any) -> list[Tensor]:
    """What a batch holds, in its order.

    Raises:
        TypeError: it is no tensor, and no tuple, list or dict of tensors.
    """
    parts = [batch] if isinstance(batch, Tensor) else list(batch.values() if isinstance(batch, Mapping) else batch)
    if not all(isinstance(part, Tensor) for part in parts):
        held = ", ".join(sorted({type(part).__name__ for part in parts}))
        raise TypeError(f"graph: a batch holds {held}; it takes a tensor, or a tuple, list or dict of tensors")
    return parts


def like(batch: Any, tensors: Sequence[Tensor]) -> Any:
    """`tensors` held as `batch` holds its own."""
    if isinstance(batch, Tensor):
        return tensors[0]
    if isinstance(batch, Mapping):
        return dict(zip(batch, tensors, strict=True))
    return tuple(tensors) if isinstance(batch, tuple) else list(tensors)
