"""A run on disk: which file holds what.

::

    RUN/
      run.json                   format, settings (all that decides the bits), layers {name: {shape, weights, rate,
                                 block, blocks}}
      environment.jsonl          one line a start or resume: versions, device, threads, time
      replicate-0/
        initial.safetensors      θ0: every parameter and buffer, dense
        rewind.safetensors       θk, only if settings["rewind"] > 0
        round-00/                the dense network
        round-01/                the ticket after one pruning
        round-01-reinit/         its controls, where asked for: -reinit, -random, -oneshot
      replicate-1/ ...

A stage (one training: a round or a branch of one) is a folder of

==================== ==================================================================================================
mask.safetensors     {layer: bool, dense shape}; True = remains. Layers are named by their module, as in run.json
start.safetensors    only for a reinit: the new draw. All others start from initial (or rewind)
kernels.json         how it runs, decided before the first step: {"layers": {layer: "sparse 1x1" or "dense masked"},
                     "reason", "choices", "threads", "sampled"}: choices as `lottery_kernels.choices` returns them,
                     with a reason for each layer; threads that steps are fastest on, null: all that PyTorch uses;
                     sampled as in result.json
evaluations.jsonl    one line an evaluation: {"iteration", "val_loss", "val_accuracy", "test_…", "train_…"};
                     accuracies 0–1
checkpoint.pt        only while it trains: all that an exact continuation needs
weights.safetensors  after the last step: every parameter and buffer, dense; pruned positions 0
result.json          written last: a stage with it is finished, one without it is redone from its checkpoint
==================== ==================================================================================================

``result.json`` holds ``replicate, round, branch, density, layers {layer: {"weights", "remaining"}}, start`` (iteration
it started from), ``iterations`` (it ended at), ``evaluations`` (their count), ``early_stop`` and ``final`` (the
evaluation records of the lowest ``val_loss`` and of the last iteration; null where there is none; final also has
``train_accuracy_all``, over the whole training set), ``kernels`` (as in kernels.json, without threads) and ``timing``
{``seconds`` spent in steps, ``step_ms`` their mean, ``sampled``: null or {``sparse_ms``, ``dense_ms``, ``speedup``,
``spread`` [lowest, highest ratio of the repeats], ``threads`` [sparse, dense]}, sampled side by side on copies before
the first step; ``sparse_ms`` is the step as the stage ran it}.
Everything but ``timing`` is equal, bit for bit, between equal runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lth import files

FORMAT = 1
TICKET = "ticket"  # the branch that iterative pruning itself makes
BRANCHES = ("reinit", "random", "oneshot")


class RunError(RuntimeError):
    """A run's folder cannot be used as asked; the message says why and what would do."""


@dataclass(frozen=True, order=True)
class Stage:
    """One training: round `round` of replicate `replicate`, of the ticket itself or of a branch."""

    replicate: int
    round: int
    branch: str = TICKET

    @property
    def folder(self) -> str:
        suffix = "" if self.branch == TICKET else f"-{self.branch}"
        return f"replicate-{self.replicate}/round-{self.round:02d}{suffix}"

    def __str__(self) -> str:
        branch = "" if self.branch == TICKET else f" ({self.branch})"
        return f"round {self.round}{branch} of replicate {self.replicate}"


class StageFiles:
    """The folder of one stage."""

    def __init__(self, run: Run, stage: Stage) -> None:
        self.run, self.stage = run, stage
        self.path = run.path / stage.folder

    @property
    def finished(self) -> bool:
        return (self.path / "result.json").exists()

    @property
    def has_mask(self) -> bool:
        """Whether the stage has begun: its mask is the first that it saves."""
        return (self.path / "mask.safetensors").exists()

    def mask(self) -> dict[str, Tensor]:
        return files.read_tensors(self.path / "mask.safetensors")

    def start(self) -> dict[str, Tensor]:
        """The weights that the stage started from: its own draw, θk or θ0."""
        own = self.path / "start.safetensors"
        if own.exists():
            return files.read_tensors(own)
        return self.run.rewind(self.stage.replicate) if self.stage.round else self.run.initial(self.stage.replicate)

    def weights(self) -> dict[str, Tensor]:
        return files.read_tensors(self.path / "weights.safetensors")

    def kernels(self) -> dict[str, Any] | None:
        """None before they are chosen. A checkpoint continues on the kernels that it was made with, and no others."""
        path = self.path / "kernels.json"
        if path.exists():
            return files.read_json(path)
        if (self.path / "checkpoint.pt").exists():
            raise files.DamagedFile(f"{path}: missing")
        return None

    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations so far; of a finished stage, all of them."""
        records = files.read_lines(self.path / "evaluations.jsonl")
        if self.finished and len(records) != (count := self.result()["evaluations"]):
            raise files.DamagedFile(
                f"{self.path / 'evaluations.jsonl'}: truncated, {len(records)} of {count} lines are left"
            )
        return records

    def result(self) -> dict[str, Any]:
        return files.read_json(self.path / "result.json")

    def checkpoint(self) -> dict[str, Any] | None:
        path = self.path / "checkpoint.pt"
        return files.read_checkpoint(path) if path.exists() else None

    def save_mask(self, mask: Mapping[str, Tensor]) -> None:
        files.write_tensors(self.path / "mask.safetensors", mask)

    def save_start(self, weights: Mapping[str, Tensor]) -> None:
        files.write_tensors(self.path / "start.safetensors", weights)

    def save_kernels(self, kernels: Mapping[str, Any]) -> None:
        files.write_json(self.path / "kernels.json", kernels)

    def append_evaluation(self, record: Mapping[str, Any]) -> None:
        files.append_line(self.path / "evaluations.jsonl", record)

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        files.sync_lines(self.path / "evaluations.jsonl")
        files.write_checkpoint(self.path / "checkpoint.pt", state)

    def keep_evaluations(self, checkpoint: Mapping[str, Any] | None) -> None:
        """Cuts the evaluations after a checkpoint (None: all), which a resumed stage makes again."""
        path = self.path / "evaluations.jsonl"
        count = 0 if checkpoint is None else checkpoint["evaluations"]
        records = self.evaluations()
        if len(records) < count:
            raise files.DamagedFile(f"{path}: truncated, {len(records)} of {count} evaluations are left")
        if path.exists():
            files.write_lines(path, records[:count])

    def finish(self, weights: Mapping[str, Tensor], result: Mapping[str, Any]) -> None:
        """Saves the final weights, then the result, and only then drops the checkpoint."""
        files.sync_lines(self.path / "evaluations.jsonl")
        files.write_tensors(self.path / "weights.safetensors", weights)
        files.write_json(self.path / "result.json", result)
        self.drop_checkpoint()

    def drop_checkpoint(self) -> None:
        files.remove(self.path / "checkpoint.pt")


class Run:
    """The folder of a run. Make one with :meth:`create` or :meth:`open`."""

    def __init__(self, path: Path, description: dict[str, Any]) -> None:
        self.path, self.description = path, description

    @classmethod
    def create(cls, path: Path, settings: Mapping[str, Any], layers: Mapping[str, Any]) -> Run:
        """Starts a run in an empty or new folder."""
        if path.exists() and (not path.is_dir() or any(not entry.name.startswith(".") for entry in path.iterdir())):
            raise RunError(f"{path} exists and holds something else than a run; choose another folder (--out)")
        description = {"format": FORMAT, "settings": dict(settings), "layers": dict(layers)}
        files.write_json(path / "run.json", description)
        return cls(path, description)

    @classmethod
    def open(cls, path: Path) -> Run:
        """Opens a run for reading or to resume it."""
        if not (path / "run.json").exists():
            raise RunError(f"{path} holds no run: there is no run.json in it")
        description = files.read_json(path / "run.json")
        if description.get("format") != FORMAT:
            raise files.DamagedFile(
                f"{path / 'run.json'}: format {description.get('format')!r}, this version reads {FORMAT}"
            )
        return cls(path, description)

    @property
    def settings(self) -> dict[str, Any]:
        return self.description["settings"]

    @property
    def layers(self) -> dict[str, dict[str, Any]]:
        return self.description["layers"]

    def stage(self, stage: Stage) -> StageFiles:
        return StageFiles(self, stage)

    def finished(self) -> list[StageFiles]:
        """The finished stages, by replicate, round and branch (the ticket first)."""
        found = []
        for path in self.path.glob("replicate-*/round-*/result.json"):
            match = re.fullmatch(
                rf"replicate-(\d+)/round-(\d+)(?:-({'|'.join(BRANCHES)}))?",
                path.parent.relative_to(self.path).as_posix(),
            )
            if match:
                found.append(Stage(int(match[1]), int(match[2]), match[3] or TICKET))
        return [
            self.stage(s) for s in sorted(found, key=lambda s: (s.replicate, s.round, s.branch != TICKET, s.branch))
        ]

    def initial(self, replicate: int) -> dict[str, Tensor]:
        return files.read_tensors(self.path / f"replicate-{replicate}" / "initial.safetensors")

    def rewind(self, replicate: int) -> dict[str, Tensor]:
        """θk; θ0 where the settings rewind to initialisation."""
        name = "rewind" if self.settings["rewind"] else "initial"
        return files.read_tensors(self.path / f"replicate-{replicate}" / f"{name}.safetensors")

    def has(self, replicate: int, name: str) -> bool:
        return (self.path / f"replicate-{replicate}" / f"{name}.safetensors").exists()

    def save(self, replicate: int, name: str, weights: Mapping[str, Tensor]) -> None:
        """Saves `initial` or `rewind` weights."""
        files.write_tensors(self.path / f"replicate-{replicate}" / f"{name}.safetensors", weights)

    def environment(self) -> list[dict[str, Any]]:
        """Where the run was started and resumed, one record a time."""
        return files.read_lines(self.path / "environment.jsonl")

    def append_environment(self, record: Mapping[str, Any]) -> None:
        files.write_lines(self.path / "environment.jsonl", [*self.environment(), dict(record)])


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the folder `path` (made if need be) against a second process; the lock ends with the process."""
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{path} is in use by another process") from None
        yield
    finally:
        os.close(descriptor)
