"""A Triton driver with no GPU behind it.

    with stand_in("sm_90") as gpu:
        y = linear(x, values, pattern)      # CPU tensors
    gpu.launches[-1].counts["mma"]

The launch goes through Triton's own host path (binder, specialisation, cache, check of resources), compiled as for
the real target. Then the emulator executes the compiled code, or Triton's interpreter the source, or nobody.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver as triton_driver

from .execute import Machine
from .interpreter import interpret
from .memory import GlobalMemory
from .parse import Program, parse
from .targets import GPUS, Gpu


@dataclass
class Launch:
    """One launch of a kernel; `counts` is what was counted while it was executed, by the emulator also how often warps
    executed each instruction of `program`."""

    name: str
    grid: tuple[int, int, int]
    asm: dict[str, Any]  # ptx, ttgir, cubin …
    metadata: Any
    source: Any  # the function that was compiled
    args: Sequence[Any]
    constants: set[int]  # positions of the arguments that were compiled in
    counts: collections.Counter = field(default_factory=collections.Counter)
    program: Program | None = None
    executed: np.ndarray | None = None


class StandIn(DriverBase):
    """Stands in for one GPU; `edit` may change the PTX before it is executed, `programs` picks those that are.

    Args:
        gpu: which one.
        execute: "emulator" (sm_80 and sm_90), "interpreter", or None: launches are compiled and recorded only.
        edit: PTX -> PTX.
        programs: launch -> numbers of the programs to execute, None for all. The rest of the result stays unwritten.
        races: whether to look for races between programs, which takes time and memory.
    """

    def __init__(
        self,
        gpu: Gpu,
        execute: Literal["emulator", "interpreter"] | None = "emulator",
        edit: Callable[[str], str] | None = None,
        programs: Callable[[Launch], Sequence[int]] | None = None,
        races: bool = True,
    ) -> None:
        self.gpu, self.execute, self.edit, self.programs, self.races = gpu, execute, edit, programs, races
        self.launches: list[Launch] = []
        self.utils = _Utils(gpu)
        self.launcher_cls = _Launcher

    def run(self, launch: Launch) -> None:
        self.launches.append(launch)
        if self.execute == "interpreter":
            launch.counts += interpret(launch.source, launch.grid, launch.args)
        elif self.execute == "emulator":
            self._emulate(launch)

    def _emulate(self, launch: Launch) -> None:
        ptx = self.edit(launch.asm["ptx"]) if self.edit else launch.asm["ptx"]
        taken = [arg for i, arg in enumerate(launch.args) if i not in launch.constants]
        memory = GlobalMemory([arg for arg in taken if isinstance(arg, torch.Tensor)], self.races)
        params = [memory.address(arg) if isinstance(arg, torch.Tensor) else arg for arg in taken]
        programs = self.programs(launch) if self.programs else None
        program = parse(ptx)
        machine = Machine(program, params, launch.grid, launch.metadata.shared, memory, launch.counts, programs)
        machine.run()
        launch.program, launch.executed = program, machine.executed
        memory.write_back()

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.gpu.target

    def get_current_device(self) -> int:
        return self.gpu.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing can be timed without a GPU")


class _Utils:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        """(module, function, registers, spills, threads at most). Without a module nothing is unloaded later."""
        return None, name, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.gpu.shared, "multiprocessor_count": self.gpu.processors}


class _Launcher:
    def __init__(self, src: Any, metadata: Any) -> None:
        self.src, self.metadata = src, metadata

    def __call__(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        args = rest[-len(self.src.signature) :]
        driver = triton_driver.active
        kernels = self.src.fn.device_caches[driver.get_current_device()][0].values()
        asm = next(kernel.asm for kernel in kernels if kernel.metadata is self.metadata)
        constants = {path[0] for path in self.src.constants}
        driver.run(Launch(self.metadata.name, (x, y, z), asm, self.metadata, self.src.fn, args, constants))


@contextmanager
def stand_in(gpu: str, **options: Any) -> Iterator[StandIn]:
    """Makes `gpu` (a name in `GPUS`) Triton's device; options are those of `StandIn`."""
    before = triton_driver._active
    driver = StandIn(GPUS[gpu], **options)
    triton_driver.set_active(driver)
    try:
        yield driver
    finally:
        triton_driver._active = before
