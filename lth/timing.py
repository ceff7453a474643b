"""Milliseconds of a training step, on copies: sparse and dense masked side by side, and on fewer threads."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

SECONDS = 0.6  # that all repeats of both sides take together, if a step is short
STEPS = 50  # in a repeat at most
WARM_UP = 3  # calls of each: with the third a step that is replayed has been recorded
LONG = 0.02  # seconds of a step that is worth all threads, whatever it computes


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


def fastest_threads(step: Callable[[], Any]) -> int:
    """How many threads a step is fastest on: as many as PyTorch may use, half of them, a quarter, … or one.

    Threads that wake for a few microseconds of work can cost more than they do.
    """
    counts = [torch.get_num_threads()]
    while counts[-1] > 1:
        counts.append(counts[-1] // 2)
    _seconds(step, WARM_UP)
    once = _seconds(step, 1)
    if once > LONG:
        return counts[0]
    steps = max(1, min(STEPS, int(LONG / once)))
    times: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(5):
        for count in counts:
            with threads(count):
                _seconds(step, 1)
                times[count].append(_seconds(step, steps))
    return min(counts, key=lambda count: statistics.median(times[count]))


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """PyTorch computes on so many threads meanwhile; None: on as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seconds(step: Callable[[], Any], count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        step()
    return time.perf_counter() - began
