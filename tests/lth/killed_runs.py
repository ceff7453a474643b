"""Run as a program: kills a tiny search at every write, resumes it, and prints where the outcome differs.

    python -m tests.lth.killed_runs FOLDER SEARCH KERNELS EVERY

Every kill has a fork of its own, so that torch is imported once; one thread, because threads do not survive a fork. The
child dies by SIGKILL at the n-th call that writes, half of the bytes written; a second child resumes. SEARCH: of
`tiny`. EVERY: only every so many calls.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.lth import tiny

WRITING = ("write", "fsync", "replace", "ftruncate")


def kill_at(number: int) -> Callable[[], int]:
    """From now on the call `number` (from 1) of those that write kills this process; returns a counter of such calls.

    Nothing waits for the disk any more: a killed process loses no page that it has written.
    """
    calls = 0

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                if name == "write":
                    descriptor, data = arguments
                    real(descriptor, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return None if name == "fsync" else real(*arguments)

        return call

    for name in WRITING:
        setattr(os, name, counted(name, getattr(os, name)))
    return lambda: calls


def in_child(work: Callable[[], None]) -> int:
    """Runs `work` in a fork; its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path, search_name: str, kernels: str, every: int) -> None:
    torch.set_num_threads(1)

    def search(folder: Path, kernels: str, resume: bool = False) -> None:
        find = getattr(tiny, search_name)
        find(out=folder, resume=resume, kernels=kernels, rewind=3, branches=("reinit", "random"))

    whole, broken = folder / "whole", folder / "broken"
    search(folder / "first", kernels)  # imports and compiles what is wanted later
    count = kill_at(0)
    search(whole, kernels)
    expected, calls = tiny.bits(whole), count()
    for number in range(1, calls + 1, every):
        shutil.rmtree(broken, ignore_errors=True)

        def killed(number: int = number) -> None:
            kill_at(number)
            search(broken, kernels)

        assert in_child(killed) == -signal.SIGKILL, f"call {number} of {calls} did not happen"
        assert in_child(lambda: search(broken, kernels, resume=True)) == 0, f"not resumed after call {number}"
        assert tiny.bits(broken) == expected, f"other bits after call {number}"
        assert not list(broken.rglob("checkpoint.pt")), f"a checkpoint is left after call {number}"
    print(f"{len(range(1, calls + 1, every))} kills, equal bits")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
