"""Which kernel and which block a layer gets, and the reason, in a form that can be stored and replayed."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import gpu, operators
from .measure import fastest
from .pattern import Grid, Pattern, check_block
from .targets import Target

BlockChoice = tuple[int, int] | Literal["auto"]
Block = BlockChoice | Mapping[str, BlockChoice] | Callable[[str, nn.Module, Tensor], BlockChoice]
When = Literal["faster", "always"] | Callable[[str, nn.Module, Tensor], bool] | Mapping[str, Mapping[str, Any]]

AUTO_BLOCKS = [(64, 64), (32, 32), (16, 16), (8, 8), (4, 4), (1, 1)]
AUTO_WASTE = 1.25  # stored positions per live one that a larger block may cost


@dataclass(frozen=True)
class Choice:
    """How one target will be computed."""

    pattern: Pattern
    sparse: bool
    reason: str

    def record(self) -> dict[str, Any]:
        """As `choices` returns it and `when` takes it; fit for JSON."""
        kernel = "sparse" if self.sparse else "dense"
        return {"kernel": kernel, "block": list(self.pattern.block), "reason": self.reason}


def choose(model: nn.Module, targets: Sequence[Target], block: Block, when: When, example: Any) -> list[Choice]:
    """A choice for each target; `sparsify` explains the arguments and errors."""
    if isinstance(when, Mapping):
        return _replay(targets, when)
    if not callable(when) and when not in ("faster", "always"):
        raise ValueError(f'when must be "faster", "always", a callable or recorded choices, got {when!r}')
    patterns = _patterns(targets, _blocks(targets, block))
    if when == "always":
        return [Choice(pattern, True, "asked for: always") for pattern in patterns]
    if callable(when):
        verdicts = [bool(when(target.name, target.layer, target.mask)) for target in targets]
        return [
            Choice(pattern, sparse, f"asked for: when() gave {sparse}")
            for pattern, sparse in zip(patterns, verdicts, strict=True)
        ]
    return _faster(model, targets, patterns, example)


def best_block(mask: Tensor, groups: int = 1) -> tuple[int, int]:
    """The largest block that covers the mask with little waste: at most 1.25 stored positions per live one."""
    live = int(mask.sum())
    for block in AUTO_BLOCKS:
        blocks = Grid.of(mask.shape, block, groups).split(mask)  # [groups, rows, taps, cols, r, c]
        if int(blocks.flatten(-2).any(-1).sum()) * math.prod(block) <= AUTO_WASTE * live:
            return block
    return (1, 1)


def refusal(target: Target, pattern: Pattern) -> str | None:
    """Why no compiled kernel can serve this layer, or could not win; None if one may. The reference, which serves
    otherwise, computes dense and cannot win. What a backend cannot run or do well is said here."""
    device, dtype, kind = target.leaf.device.type, target.leaf.dtype, _kind(target)
    if device == "cuda":
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        reason = gpu.why_off() or gpu.unsupported(dtype, pattern.block)
        reason = reason or gpu.nothing_to_save(pattern.weight_shape, pattern.groups, dtype)
        if reason is not None:
            return reason
    if not operators._backend_serves(kind, device):
        return f"there are no compiled sparse kernels for {kind} on {device} here"
    grid = Grid.of(pattern.weight_shape, pattern.block, pattern.groups)
    if pattern.nnz == grid.groups * grid.rows * grid.taps * grid.cols:
        return "every {}x{} block has a live weight, so none can be skipped".format(*pattern.block)
    return None


def from_table(target: Target, pattern: Pattern) -> tuple[bool, str]:
    """Whether sparse wins by the package's crossover.json, and why.

    The file maps device type -> operator ("linear", "conv2d") -> a list of `{"block": [rows, cols], "density": d}`:
    with blocks of at least that size sparse wins where the stored share of positions (a block's dead positions count)
    is below d. The largest block that fits into the layer's counts. The thresholds are cautious: below them sparse was
    at least 1.2 times as fast, forward and backward, in every size that was measured.
    """
    device, kind = target.leaf.device.type, _kind(target)
    stored = pattern.nnz * math.prod(pattern.block) / max(1, math.prod(pattern.weight_shape))
    fitting = [
        entry
        for entry in _table().get(device, {}).get(kind, ())
        if entry["block"][0] <= pattern.block[0] and entry["block"][1] <= pattern.block[1]
    ]
    if not fitting:
        return False, f"nothing was measured for {kind} with blocks {pattern.block} on {device}"
    entry = max(fitting, key=lambda entry: math.prod(entry["block"]))
    sparse = stored < entry["density"]
    relation = "below" if sparse else "not below"
    return sparse, f"stored density {stored:.3g} is {relation} {entry['density']}, where sparse {kind} wins on {device}"


def _faster(model: nn.Module, targets: Sequence[Target], patterns: Sequence[Pattern], example: Any) -> list[Choice]:
    verdicts: list[tuple[bool, str] | None] = []
    for target, pattern in zip(targets, patterns, strict=True):
        reason = refusal(target, pattern)
        verdicts.append((False, reason) if reason else None)
    if example is not None:
        open_ = [i for i, verdict in enumerate(verdicts) if verdict is None]
        measured = fastest(model, [targets[i] for i in open_], [patterns[i] for i in open_], example) if open_ else []
        for i, verdict in zip(open_, measured, strict=True):
            verdicts[i] = verdict
    choices = []
    for target, pattern, verdict in zip(targets, patterns, verdicts, strict=True):
        choices.append(Choice(pattern, *(verdict or from_table(target, pattern))))
    return choices


def _replay(targets: Sequence[Target], recorded: Mapping[str, Mapping[str, Any]]) -> list[Choice]:
    names = {target.name for target in targets}
    if names != recorded.keys():
        raise ValueError(
            f"when records choices for {sorted(recorded)}, but the masked layers are {sorted(names)}: replay needs the "
            "same"
        )
    for name, record in recorded.items():
        if record.get("kernel") not in ("sparse", "dense"):
            raise ValueError(f'when: the kernel of {name!r} must be "sparse" or "dense", got {record.get("kernel")!r}')
    blocks = [check_block(recorded[target.name].get("block")) for target in targets]
    return [
        Choice(pattern, recorded[target.name]["kernel"] == "sparse", recorded[target.name].get("reason", "replayed"))
        for target, pattern in zip(targets, _patterns(targets, blocks), strict=True)
    ]


def _blocks(targets: Sequence[Target], block: Block) -> list[tuple[int, int]]:
    if isinstance(block, Mapping):
        unknown = block.keys() - {target.name for target in targets}
        if unknown:
            raise ValueError(f"block names {sorted(unknown)}, which are no masked layers")
    blocks = []
    for target in targets:
        chosen: Any = block
        if isinstance(block, Mapping):
            chosen = block.get(target.name, (1, 1))
        elif callable(block):
            chosen = block(target.name, target.layer, target.mask)
        blocks.append(best_block(target.mask, target.groups) if chosen == "auto" else check_block(chosen))
    return blocks


def _patterns(targets: Sequence[Target], blocks: Sequence[tuple[int, int]]) -> list[Pattern]:
    pairs = zip(targets, blocks, strict=True)
    return [Pattern.from_mask(target.mask, block, target.groups) for target, block in pairs]


def _kind(target: Target) -> str:
    return "conv2d" if isinstance(target.layer, nn.Conv2d) else "linear"


@functools.cache
def _table() -> dict[str, dict[str, list[dict[str, Any]]]]:
    return json.loads(resources.files(__package__).joinpath("crossover.json").read_text())
