"""Milliseconds of a training step, sparse and dense masked side by side, on copies."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

SECONDS = 0.6  # that all repeats of both sides take together, if a step is short
STEPS = 50  # in a repeat at most
WARM_UP = 3  # calls of each: with the third a step that is replayed has been recorded


def side_by_side(sparse: Callable[[], Any], dense: Callable[[], Any]) -> dict[str, Any]:
    """Times two steps in turns; each is called with nothing and returns when its work is done.

    Returns:
        medians `sparse_ms` and `dense_ms`; `speedup`, the median of the repeats' ratios dense / sparse; and their
        `spread`, lowest and highest.
    """
    for step in (sparse, dense):
        _seconds(step, WARM_UP)
    both = _seconds(sparse, 1) + _seconds(dense, 1)
    repeats = 7 if both < SECONDS / 4 else 3
    steps = max(1, min(STEPS, int(SECONDS / repeats / both)))
    times = [(_seconds(sparse, steps) / steps, _seconds(dense, steps) / steps) for _ in range(repeats)]
    ratios = [dense_time / sparse_time for sparse_time, dense_time in times]
    return {
        "sparse_ms": 1000 * statistics.median(sparse_time for sparse_time, _ in times),
        "dense_ms": 1000 * statistics.median(dense_time for _, dense_time in times),
        "speedup": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
    }


def _seconds(step: Callable[[], Any], count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        step()
    return time.perf_counter() - began
