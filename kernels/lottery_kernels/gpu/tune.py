"""Launch settings that were measured on this machine's GPU, kept in a file. Only with LOTTERY_KERNELS_TUNE=1.

The tables of `settings.py` are reasoned, not measured, unless they say so. Here the search starts from a table's tile,
measures the tiles that differ from it in one setting, goes on from the fastest, and ends where no neighbour is faster.
What was found is kept by GPU, version of Triton, kernel, types, block and sizes (rounded up to powers of two), and used
from then on. A tile decides the order of sums, so tuning changes the last bits of results: once, for as long as the
file lives.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from .settings import Target, Tile

LIMITS = {
    "rows": (16, 256),
    "warps": (1, 8),
    "stages": (2, 6),
    "group": (1, 32),
}  # least and most; all but stages double
GAIN = 0.02  # by which a neighbour must be faster: less is noise
MOVES = 3


class Sizes(NamedTuple):
    """What a launch works on: rows of activations, lines of blocks or 1, live blocks."""

    rows: int
    lines: int
    nnz: int


def enabled() -> bool:
    return os.environ.get("LOTTERY_KERNELS_TUNE", "0") not in ("", "0")


def best_tile(
    kernel: Any,
    table: Tile,
    block: tuple[int, int],
    traits: Sequence[object],
    sizes: Sizes,
    target: Target,
    run: Callable[[Tile], None],
    fixed: Sequence[str] = (),
) -> Tile:
    """The tile to launch with: that of the table, or where tuning is asked for the fastest that was measured.

    Nothing is measured while a CUDA graph is captured.

    Args:
        kernel: the Triton function.
        table: the table's tile, where the search starts.
        block: what `cols` and `depth` of a tile divide.
        traits: what else the kernel is compiled for.
        run: launches with a tile; called many times, over the same tensors.
        fixed: settings of a tile that the kernel does not have.
    """
    if not enabled():
        return table
    known = _tiles(_device_name(target))
    key = " ".join(map(str, (kernel.fn.__name__, kernel.cache_key[:12], *block, *traits, *map(_rounded_up, sizes))))
    if key not in known and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        known[key] = _fastest(table, block, target, run, fixed)
        _store(_device_name(target), known)
    return known.get(key, table)


def neighbours(tile: Tile, block: tuple[int, int], target: Target, fixed: Sequence[str] = ()) -> Iterator[Tile]:
    """The tiles that differ in one setting by one step."""
    limits = {**LIMITS, "cols": (16, block[0]), "depth": (16, block[1])}
    if target.backend == "hip":
        fixed = (*fixed, "stages")
    for name, (least, most) in limits.items():
        value = getattr(tile, name)
        steps = (value - 1, value + 1) if name == "stages" else (value // 2, 2 * value)
        for step in steps:
            if name not in fixed and least <= step <= most:
                yield replace(tile, **{name: step})


def milliseconds(run: Callable[[], None]) -> float:
    """Median time on the GPU."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=5, rep=20, return_mode="median"))


def stored() -> dict[str, int]:
    """{GPU and version of Triton: how many launches it has measured tiles for}, of all that is kept on this machine."""
    return {path.stem: len(found) for path in sorted(folder().glob("*.json")) if (found := _read(path))}


def folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lottery-kernels" / "tiles"


def forget() -> None:
    """Drops what this process has read or measured; files stay."""
    _read_files.clear()


def _fastest(
    table: Tile, block: tuple[int, int], target: Target, run: Callable[[Tile], None], fixed: Sequence[str]
) -> Tile:
    best, times = table, {table: milliseconds(lambda: run(table))}
    for _ in range(MOVES):
        for tile in neighbours(best, block, target, fixed):
            if tile not in times:
                times[tile] = _milliseconds_or_never(tile, run)
        fastest = min(times, key=times.__getitem__)
        if times[fastest] > (1 - GAIN) * times[best]:
            break
        best = fastest
    return best


def _milliseconds_or_never(tile: Tile, run: Callable[[Tile], None]) -> float:
    try:
        return milliseconds(lambda: run(tile))
    except Exception:  # what does not fit the GPU, or the compiler refuses; the table's own tile has run before
        return float("inf")


# The file: {key: tile}. One for each GPU and version of Triton.

_read_files: dict[Path, dict[str, Tile]] = {}


def _tiles(device: str) -> dict[str, Tile]:
    path = _path(device)
    if path not in _read_files:
        _read_files[path] = _read(path)
    return _read_files[path]


def _path(device: str) -> Path:
    return folder() / f"{re.sub(r'[^A-Za-z0-9]+', '-', device)}_triton-{triton.__version__}.json"


def _read(path: Path) -> dict[str, Tile]:
    """What a file holds; nothing, with a warning, if it is damaged."""
    if not path.exists():
        return {}
    try:
        return {str(key): _tile(value) for key, value in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"{path} is damaged and is not used: {error}", stacklevel=2)
        return {}


def _tile(settings: dict[str, int]) -> Tile:
    if not all(isinstance(value, int) and value > 0 for value in settings.values()):
        raise ValueError(f"no tile has {settings}")
    missing = {field.name for field in fields(Tile)} - settings.keys()
    if missing:
        raise ValueError(f"a tile lacks {', '.join(sorted(missing))}")
    return Tile(**settings)


def _store(device: str, known: dict[str, Tile]) -> None:
    """Writes what is known, with what other processes have written since, in one piece."""
    path = _path(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a damaged file was warned of when it was read
        known.update({key: tile for key, tile in _read(path).items() if key not in known})
    content = json.dumps({key: asdict(tile) for key, tile in sorted(known.items())}, indent=0)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
        os.replace(temporary, path)
    except OSError as error:
        warnings.warn(f"measured launch settings are lost when this process ends: {error}", stacklevel=2)
        with contextlib.suppress(OSError):
            if temporary is not None:
                temporary.unlink()


def _device_name(target: Target) -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{target.backend} {target.arch}"


def _rounded_up(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()
